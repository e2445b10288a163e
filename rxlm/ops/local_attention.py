"""Softmax attention of each token to its neighbourhood, in memory that grows with T x window.

The sequence is cut into blocks of queries; each block attends to the slice of keys that any of its
queries sees, through the fused kernels behind :func:`rxlm.ops.attention.attend`. Nothing of size
T x T exists, nothing is padded, and no key is gathered or copied. The other backends compute the
same: ``sdpa`` with one full mask (the reference, quadratic), ``flex`` with PyTorch's FlexAttention.

Not here: positions (the module rotates), caches (:mod:`rxlm.nn.local_cache`), and the quirks of
other packages (:mod:`rxlm.ops.local_attention_compat`).

Shapes: B batch, T queries, P keys, H query heads, G key/value heads, K head dimension, W window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.attention import attend

Backend = Literal["blocks", "sdpa", "flex"]
"""``blocks``: linear memory, any device. ``sdpa``: one full mask. ``flex``: CUDA only."""

_LARGEST_EXPONENT = 40.0
"""Within a block decay factors stay below exp(40): their products are finite in float32."""
_CLAMP = 60.0


@dataclass(frozen=True)
class LocalPattern:
    """Which keys a query sees.

    With s = i // window * window, the first position of the window of query i:

    * not ``exact``: keys j with s - back <= j < s + window + forward,
    * ``exact``: keys j with -forward <= i - j <= back,
    * ``causal``: of these the keys with j <= i.

    Attributes:
        window: W.
        back: tokens before the window (exact: before the query).
        forward: tokens after the window (exact: after the query).
        causal: whether no query sees a later key.
        exact: whether the limits count from the query instead of from its window.
    """

    window: int
    back: int
    forward: int = 0
    causal: bool = True
    exact: bool = True

    @classmethod
    def sliding(cls, window: int, *, causal: bool = True) -> LocalPattern:
        """Return the exact window of ``window`` tokens, the query included (on each side)."""
        return cls(window, window - 1, 0 if causal else window - 1, causal, exact=True)

    @property
    def reach(self) -> tuple[int, int]:
        """Most tokens before and after a query that it can see."""
        extra = 0 if self.exact else self.window - 1
        return self.back + extra, 0 if self.causal else self.forward + extra

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return bool ``[..., T, P]`` for positions ``[..., T]`` and ``[..., P]``."""
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        origin = query if self.exact else query // self.window * self.window
        size = 1 if self.exact else self.window
        seen = (key >= origin - self.back) & (key < origin + size + self.forward)
        return seen & (key <= query) if self.causal else seen

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """Return the range [low, high) of keys that queries ``first`` to ``last`` see."""
        if self.exact:
            low, high = first - self.back, last + 1 + self.forward
        else:
            low = first // self.window * self.window - self.back
            high = last // self.window * self.window + self.window + self.forward
        return low, min(high, last + 1) if self.causal else high


class Decay(NamedTuple):
    """Decay with distance (xPos, Sun et al. 2022, arXiv 2212.10554): products of feature f of query
    i and key j are multiplied by ``exp(-rate[f] * (i - j))``; ``rate`` ``[K]`` >= 0."""

    rate: Tensor


class ScoreChanges(NamedTuple):
    """What besides the pattern decides about the scores; everything may be left out.

    Attributes:
        key_mask: bool ``[B, P]``, True at keys that may be seen.
        mask: bool ``[T, P]`` or ``[B, T, P]``, True where a query may see a key.
        bias: ``[H, W, W + back + forward]``, added to the scores; rows are positions in a window,
            columns count from ``back`` before it. The same for every window.
        hide_self: whether a query sees its own key only if it sees no other (shared queries and
            keys).
        decay: decay with distance.
    """

    key_mask: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    hide_self: bool = False
    decay: Decay | None = None


NOTHING = ScoreChanges()


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LocalPattern,
    changes: ScoreChanges = NOTHING,
    *,
    start: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "blocks",
) -> Tensor:
    """Attend within the pattern.

    Args:
        query: ``[B, T, H, K]``; the queries are the last T of the P positions.
        key: ``[B, P, G, K]``; G divides H (or H divides G).
        value: ``[B, P, G, K]``.
        pattern: what a query sees by its position.
        changes: masks, bias, decay.
        start: ``[B]``, position of the first query of each row, which says where windows begin;
            None = P - T. Of no effect on exact patterns without bias.
        scale: factor on the scores; default ``K**-0.5``.
        dropout: probability of dropping an attention weight.
        backend: see :data:`Backend`. It runs or raises; none replaces another.

    Returns:
        ``[B, T, max(H, G), K]`` in the dtype of ``query``. Queries that see no key get zeros.

    Raises:
        UserError: for a backend that cannot compute this here.
    """
    call = _Call(query, key, value, pattern, changes, start, scale, dropout)
    if backend == "blocks":
        return _by_blocks(call, list(_blocks(call)))
    if backend == "sdpa":
        # Decay factors need short blocks of queries; each sees all keys here.
        cuts = _blocks(call) if changes.decay is not None else ()
        blocks = [_Block(cut.first, cut.last, 0, call.num_keys) for cut in cuts]
        return _by_blocks(call, blocks)
    if backend == "flex":
        from rxlm.ops.local_attention_flex import flex_local_attention

        if query.device.type != "cuda":
            raise UserError(
                f"backend 'flex' on a tensor on {query.device.type}: it is built for CUDA; use "
                "backend='blocks'."
            )
        if dropout:
            raise UserError(f"backend 'flex' has no dropout ({dropout}): use backend='blocks'.")
        return flex_local_attention(query, key, value, pattern, changes, start=start, scale=scale)
    raise UserError(f"backend {backend!r} does not exist: use 'blocks', 'sdpa' or 'flex'.")


class _Block(NamedTuple):
    """Queries [first, last) see keys [low, high); queries count from 0, keys from 0."""

    first: int
    last: int
    low: int
    high: int


class _Call(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    pattern: LocalPattern
    changes: ScoreChanges
    start: Tensor | None
    scale: float | None
    dropout: float

    @property
    def num_queries(self) -> int:
        return self.query.shape[1]

    @property
    def num_keys(self) -> int:
        return self.key.shape[1]

    @property
    def offset(self) -> int:
        """Number of keys before the first query."""
        return self.num_keys - self.num_queries

    @property
    def is_aligned(self) -> bool:
        """Whether the index of a key says where it stands in its window."""
        return self.start is None or (self.pattern.exact and self.changes.bias is None)


def _by_blocks(call: _Call, blocks: list[_Block]) -> Tensor:
    if not blocks:
        blocks = [_Block(0, call.num_queries, 0, call.num_keys)]
    queries = call.query.split([block.last - block.first for block in blocks], dim=1)
    ranges = [(block.low, block.high) for block in blocks]
    keys, values = _slices(call.key, ranges), _slices(call.value, ranges)
    known: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}
    outputs = [
        _attend_block(call, block, query, key, value, known)
        for block, query, key, value in zip(blocks, queries, keys, values, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _blocks(call: _Call) -> Iterator[_Block]:
    """Cut the queries so that most blocks look alike and few of their scores are hidden."""
    pattern, offset, num_keys = call.pattern, call.offset, call.num_keys
    size = block_size(pattern, call.changes.decay)
    period = size
    if not pattern.exact and call.is_aligned:
        # Blocks end where windows do, else one would reach into a window more than it needs.
        period = max(1, size // pattern.window) * pattern.window
    first = offset
    while first < num_keys:
        last = min(first + size, first // period * period + period, num_keys)
        if call.is_aligned:
            low, high = pattern.bounds(first, last - 1)
        else:
            back, forward = pattern.reach
            low, high = first - back, last + forward
        yield _Block(first - offset, last - offset, max(low, 0), min(high, num_keys))
        first = last


def block_size(pattern: LocalPattern, decay: Decay | None = None) -> int:
    """Return how many queries go together.

    Small blocks hide fewer scores of a sliding window, large ones are faster per score. A window
    whose queries all see the same keys hides none: one block, if that is not very long.
    """
    back, forward = pattern.reach
    size = min(max((back + forward + 1) // 4, 64), 256)
    if not pattern.exact and not pattern.causal:
        size = min(max(pattern.window, size), 1024)
    if decay is not None:
        steepest = float(decay.rate.max())
        if steepest > 0:
            size = max(1, min(size, int(_LARGEST_EXPONENT / steepest)))
    return size


def _attend_block(
    call: _Call,
    block: _Block,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    known: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:
    changes = call.changes
    # Blocks in the middle of a sequence have the same mask; the window phase says which.
    place = (
        (block.first + call.offset) % call.pattern.window
        if not call.pattern.exact or changes.bias is not None
        else 0
    )
    alike = (place, block.low - block.first, block.last - block.first, block.high - block.low)
    if known is None or alike not in known:
        made = _mask_and_bias(call, block)
        if known is not None:
            known[alike] = made
    else:
        made = known[alike]
    mask, bias = made
    if changes.key_mask is not None:
        mask = mask & changes.key_mask[:, None, None, block.low : block.high]
    if changes.mask is not None:
        extra = changes.mask[..., block.first : block.last, block.low : block.high]
        mask = mask & (extra if extra.ndim == 2 else extra[:, None])
    if changes.hide_self:
        mask = _hide_self(mask, block, call.offset)
    if changes.decay is None:
        return attend(query, key, value, mask, bias=bias, dropout=call.dropout, scale=call.scale)
    query, key, value = _decayed(query, key, value, changes.decay, block.low - block.first)
    if bias is not None:
        bias = bias.to(query.dtype)
    output = attend(query, key, value, mask, bias=bias, dropout=call.dropout, scale=call.scale)
    return output.to(call.query.dtype)


def _mask_and_bias(call: _Call, block: _Block) -> tuple[Tensor, Tensor | None]:
    """Return the mask ``[t, J]`` or ``[B, 1, t, J]``, and the bias ``[.., H, t, J]``."""
    device, pattern = call.query.device, call.pattern
    queries = torch.arange(block.first, block.last, device=device) + call.offset
    keys = torch.arange(block.low, block.high, device=device)
    if call.start is not None and not call.is_aligned:
        shift = (call.start.to(device) - call.offset)[:, None]
        queries, keys = queries + shift, keys + shift
    mask = pattern.visible(queries, keys)
    if mask.ndim == 3:
        mask = mask[:, None]
    bias = call.changes.bias
    if bias is None:
        return mask, None
    row = queries % pattern.window
    column = keys[..., None, :] - (queries - row)[..., :, None] + pattern.back
    spread = bias[:, row[..., :, None], column.clamp(0, bias.shape[-1] - 1)]
    # [H, t, J], or [H, B, t, J] with positions that differ from row to row.
    return mask, spread if spread.ndim == 3 else spread.transpose(0, 1)


def _hide_self(mask: Tensor, block: _Block, offset: int) -> Tensor:
    queries = torch.arange(block.first, block.last, device=mask.device) + offset
    own = queries[:, None] == torch.arange(block.low, block.high, device=mask.device)
    others = mask & ~own
    return torch.where(others.any(dim=-1, keepdim=True), others, mask & own)


def _decayed(
    query: Tensor, key: Tensor, value: Tensor, decay: Decay, low: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply by the decay relative to the first query of the block, in float32 or float64.

    ``low`` is the first key relative to that query. Earlier keys and later queries then shrink,
    which cannot overflow; only later keys grow, and a block is short.
    """
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    rate = decay.rate.to(query.device, dtype)
    ahead = torch.arange(query.shape[1], device=query.device, dtype=dtype)
    places = torch.arange(low, low + key.shape[1], device=query.device, dtype=dtype)
    shrink = torch.exp(-ahead[:, None] * rate)[:, None]
    grow = torch.exp((places[:, None] * rate).clamp(max=_CLAMP))[:, None]
    return query.to(dtype) * shrink, key.to(dtype) * grow, value.to(dtype)


class _Slices(torch.autograd.Function):
    """Overlapping slices along the tokens whose gradients are added in one buffer.

    Slicing with autograd's own operators allocates a gradient of the whole sequence per slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, x.shape
        return tuple(x[:, low:high] for low, high in ranges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (low, high), gradient in zip(ctx.ranges, gradients, strict=True):
            total[:, low:high] += gradient
        return total, None


def _slices(x: Tensor, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and x.requires_grad and len(ranges) > 1:
        return cast("tuple[Tensor, ...]", _Slices.apply(x, ranges))
    return tuple(x[:, low:high] for low, high in ranges)
