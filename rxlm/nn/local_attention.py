"""``LocalAttention``: attention of windows to themselves and their neighbours.

Arguments and shapes are those of the packages ``local-attention`` and ``zeta``; their defects are
corrected unless ``compat='local-attention'`` asks for the former's numbers. The list is in
docs/local_attention.md. Not here: projections (:mod:`rxlm.nn.local_mha`), the computation
(:mod:`rxlm.ops.local_attention`).

Shapes: B batch, H heads, X any leading axes (usually B, H), N tokens, D head dimension, W window,
J = W (1 + look_backward + look_forward).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.local_cache import LocalCache, extend, next_positions
from rxlm.ops.local_attention import Backend, Decay, LocalPattern, ScoreChanges, local_attention
from rxlm.ops.local_attention_compat import CompatRule, compat_local_attention
from rxlm.ops.rotary import rotate_halves


class LocalAttention(nn.Module):
    """Softmax attention in which a token sees its window and some windows around it.

    Source of the windows: Liu et al. 2018 (arXiv 1801.10198) and Parmar et al. 2018 (arXiv
    1802.05751). There are no parameters.
    """

    inv_freq: Tensor
    xpos_zeta: Tensor

    def __init__(
        self,
        window_size: int,
        causal: bool = False,
        look_backward: int = 1,
        look_forward: int | None = None,
        dropout: float = 0.0,
        shared_qk: bool = False,
        rel_pos_emb_config: Sequence[int] | None = None,
        dim: int | None = None,
        autopad: bool = False,
        exact_windowsize: bool = False,
        scale: float | None = None,
        use_rotary_pos_emb: bool = True,
        use_xpos: bool = False,
        xpos_scale_base: float | None = None,
        *,
        compat: Literal["local-attention"] | None = None,
        backend: Backend = "blocks",
    ) -> None:
        """Set up.

        Args:
            window_size: W.
            causal: whether no token sees a later one.
            look_backward: windows before the own one that are seen.
            look_forward: windows after it; None = 0 if causal, else 1.
            dropout: probability of dropping an attention weight in training.
            shared_qk: for keys that are the queries: keys get length 1, and a token sees itself
                only if it sees nothing else.
            rel_pos_emb_config: deprecated, its first entry is ``dim``.
            dim: D; needed by ``compat`` for rotary positions, else it is only checked.
            autopad: whether N need not be divisible by W.
            exact_windowsize: whether limits count from the token, not from its window: it sees
                W * look_backward tokens before itself (and W * look_forward after).
            scale: factor on the scores; None = ``D**-0.5``.
            use_rotary_pos_emb: whether queries and keys are rotated.
            use_xpos: whether scores decay with distance, too (xPos, arXiv 2212.10554).
            xpos_scale_base: tokens over which that decay takes its unit step; None = W // 2, at
                least 1.
            compat: ``'local-attention'`` computes what version 1.11.2 of that package does.
            backend: see :data:`rxlm.ops.local_attention.Backend`.

        Raises:
            UserError: for arguments that contradict each other.
        """
        super().__init__()
        if look_forward is None:
            look_forward = 0 if causal else 1
        if rel_pos_emb_config is not None:
            warnings.warn(
                "rel_pos_emb_config is deprecated: give dim instead.",
                DeprecationWarning,
                stacklevel=2,
            )
            dim = rel_pos_emb_config[0]
        for name, value, least in (
            ("window_size", window_size, 1),
            ("look_backward", look_backward, 0),
            ("look_forward", look_forward, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value}: expected an integer >= {least}.")
        if causal and look_forward > 0:
            raise UserError(
                f"causal=True with look_forward={look_forward}: a causal token sees no later one; "
                "use look_forward=None or causal=False."
            )
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"dropout={dropout}: expected a probability below 1.")
        if compat not in (None, "local-attention"):
            raise UserError(f"compat={compat!r}: expected None or 'local-attention'.")
        if use_xpos and not use_rotary_pos_emb and compat is None:
            raise UserError("use_xpos=True needs use_rotary_pos_emb=True: xPos scales rotations.")
        if xpos_scale_base is not None and not 0 < xpos_scale_base < math.inf:
            raise UserError(f"xpos_scale_base={xpos_scale_base}: expected a positive number.")
        self.window_size, self.causal = window_size, causal
        self.look_backward, self.look_forward = look_backward, look_forward
        self.dropout, self.shared_qk, self.dim = dropout, shared_qk, dim
        self.autopad, self.exact_windowsize, self.scale = autopad, exact_windowsize, scale
        self.use_rotary_pos_emb, self.use_xpos = use_rotary_pos_emb, use_xpos
        self.xpos_scale_base = xpos_scale_base
        self.compat, self.backend = compat, backend
        if use_rotary_pos_emb and dim is not None:
            self._check_even(dim)
        if self._compat_rotates:
            assert dim is not None
            # As tensors of the module, so that .double() reaches them as it does there.
            steps = torch.arange(0, dim, 2)
            frequencies = 1.0 / (10000 ** (steps.float() / dim))
            self.register_buffer("inv_freq", frequencies, persistent=False)
            zeta = (steps + 0.4 * dim) / (1.4 * dim)
            self.register_buffer("xpos_zeta", zeta, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        window_size: int | None = None,
        *,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: ``[X, N, D]`` with any leading axes, batch first.
            mask: ``[B, N]``, true (or 1) at keys that may be seen; B divides the product of X.
            input_mask: another name of ``mask``.
            attn_bias: ``[H, W, J]``, added to the scores of every window.
            window_size: W of this call; None = that of the constructor.
            attn_mask: ``[N, N]`` or ``[B, N, N]``, true (or 1) where a query (row) may see a key.
                Not known to the other packages.

        Returns:
            as ``q``. A query that sees no key gets zeros.

        Raises:
            UserError: for shapes that do not fit.
        """
        size = self.window_size if window_size is None else window_size
        length, width = q.shape[-2:]
        self._check_sizes(q, k, v, size)
        if mask is not None and input_mask is not None and self.compat is None:
            raise UserError("mask and input_mask are two names of one argument: give one of them.")
        mask = input_mask if mask is None else mask
        packed = math.prod(q.shape[:-2])
        mask = None if mask is None else _key_mask(mask, packed, length)
        if attn_bias is not None:
            self._check_bias(attn_bias, packed, size)
        if self.compat is not None:
            return self._compat_forward(q, k, v, mask, attn_bias, window_size, attn_mask)
        if length % size and not self.autopad:
            raise UserError(
                f"{length} tokens are not divisible by window_size={size}: use autopad=True (it "
                "changes no result) or cut them."
            )
        if attn_mask is not None:
            attn_mask = _pair_mask(attn_mask, packed, length)
        batch, heads = _layout(q, mask, attn_mask, attn_bias)
        q, k = self._positioned(q, k, torch.arange(length, device=q.device))
        # As [B, N, H, D], without moving anything.
        query, key, value = (
            part.reshape(batch, heads, length, width).transpose(1, 2) for part in (q, k, v)
        )
        bias = attn_bias
        if bias is not None:
            bias = bias.to(q.dtype).repeat(heads // bias.shape[0], 1, 1)
        output = local_attention(
            query,
            key,
            value,
            self.pattern(size),
            ScoreChanges(mask, attn_mask, bias, self.shared_qk, self._decay(width)),
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return output.transpose(1, 2).reshape(q.shape)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        cache: LocalCache | None = None,
    ) -> tuple[Tensor, LocalCache | None]:
        """Attend from new tokens to themselves and the cached past (decoding).

        Positions and windows count real tokens, so padding on either side changes nothing; any
        number of new tokens is taken.

        Args:
            q, k, v: ``[B, H, T, D]`` of the new tokens.
            mask: ``[B, T]``, true (or 1) at real tokens; None = all.
            attn_bias: ``[H, W, J]``.
            cache: from the call before; None at the start. Unchanged.

        Returns:
            ``[B, H, T, D]`` and the cache (None without causality).

        Raises:
            UserError: for shapes that do not fit, ``compat``, and a cache without causality.
        """
        if self.compat is not None:
            raise UserError(
                "compat='local-attention' has no cache (that of the package is wrong from the "
                "second token on): use compat=None to decode."
            )
        if cache is not None and not self.causal:
            raise UserError("a cache needs causal=True: earlier tokens would see the new ones.")
        if q.ndim != 4:
            raise UserError(f"q of shape {list(q.shape)}: expected [batch, heads, tokens, dim].")
        self._check_sizes(q, k, v, self.window_size)
        batch, heads, length, width = q.shape
        mask = None if mask is None else _key_mask(mask, batch, length)
        if mask is not None and len(mask) != batch:
            raise UserError(f"mask of {len(mask)} rows for a batch of {batch}: give one each.")
        bias = attn_bias
        if bias is not None:
            self._check_bias(bias, batch * heads, self.window_size)
            bias = bias.to(q.dtype).repeat(heads // bias.shape[0], 1, 1)
        positions = next_positions(mask, batch, length, cache, q.device)
        q, k = self._positioned(q, k, positions[:, None])
        output, kept = extend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.pattern(self.window_size),
            mask,
            cache,
            ScoreChanges(bias=bias, hide_self=self.shared_qk, decay=self._decay(width)),
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )
        return output.transpose(1, 2), kept

    def pattern(self, window_size: int) -> LocalPattern:
        """Return which keys a query sees with windows of ``window_size``."""
        return LocalPattern(
            window_size,
            self.look_backward * window_size,
            self.look_forward * window_size,
            self.causal,
            self.exact_windowsize,
        )

    def extra_repr(self) -> str:
        """Return what printing a model shows of this module."""
        return (
            f"window_size={self.window_size}, causal={self.causal}, "
            f"look_backward={self.look_backward}, look_forward={self.look_forward}, "
            f"exact_windowsize={self.exact_windowsize}, rotary={self.use_rotary_pos_emb}, "
            f"xpos={self.use_xpos}, compat={self.compat!r}"
        )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        # The package keeps its (constant) frequencies in checkpoints.
        state.pop(f"{prefix}rel_pos.inv_freq", None)
        super()._load_from_state_dict(state, prefix, *others)

    def _positioned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared_qk:
            wide = k if k.dtype == torch.float64 else k.float()
            k = F.normalize(wide, dim=-1).to(k.dtype)
        if self.use_rotary_pos_emb:
            q, k = rotate_halves(q, positions), rotate_halves(k, positions)
        return q, k

    def _decay(self, width: int) -> Decay | None:
        if not self.use_xpos:
            return None
        base = self.xpos_scale_base or max(1, self.window_size // 2)
        steps = torch.arange(0, width, 2, dtype=torch.float64)
        rate = -torch.log((steps + 0.4 * width) / (1.4 * width)) / base
        return Decay(rate.repeat(2))

    @property
    def _compat_rotates(self) -> bool:
        return self.compat is not None and self.use_rotary_pos_emb and self.dim is not None

    def _compat_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        window_size: int | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        if attn_mask is not None:
            raise UserError("compat='local-attention' has no attn_mask: use compat=None.")
        if window_size is not None and not self.use_xpos:
            raise UserError(
                "compat='local-attention' takes window_size per call only with use_xpos=True."
            )
        size = self.window_size if window_size is None else window_size
        length = q.shape[-2]
        query, key, value = (part.reshape(-1, *part.shape[-2:]) for part in (q, k, v))
        if self.autopad:
            pad = (0, 0, 0, -length % self.window_size)
            query, key, value = (F.pad(part, pad) for part in (query, key, value))
            mask = None if mask is None else F.pad(mask, (0, -length % size), value=False)
        rotates = self._compat_rotates
        base = self.window_size // 2 if self.xpos_scale_base is None else self.xpos_scale_base
        output = compat_local_attention(
            query,
            key,
            value,
            CompatRule(
                size,
                self.window_size,
                self.look_backward,
                self.look_forward,
                self.causal,
                self.exact_windowsize,
                self.shared_qk,
                q.shape[-1] ** -0.5 if self.scale is None else self.scale,
                self.dropout if self.training else 0.0,
            ),
            key_mask=mask,
            bias=bias,
            frequencies=self.inv_freq if rotates else None,
            xpos=(self.xpos_zeta, base) if rotates and self.use_xpos else None,
        )
        return output[:, :length].reshape(q.shape)

    def _check_sizes(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
        if not (q.shape == k.shape == v.shape) or q.ndim < 2:
            raise UserError(
                f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected three tensors "
                "of one shape [..., tokens, dim]; to add tokens to earlier ones use extend()."
            )
        if size < 1:
            raise UserError(f"window_size={size}: expected an integer >= 1.")
        if self.use_rotary_pos_emb and (self.compat is None or self.dim is not None):
            if self.dim is not None and self.dim != q.shape[-1]:
                raise UserError(
                    f"dim={self.dim} but heads are {q.shape[-1]} wide: give dim={q.shape[-1]}."
                )
            self._check_even(q.shape[-1])

    @staticmethod
    def _check_even(width: int) -> None:
        if width % 2:
            raise UserError(
                f"heads {width} wide with rotary positions, which turn pairs: use an even width, "
                "or use_rotary_pos_emb=False."
            )

    def _check_bias(self, bias: Tensor, packed: int, size: int) -> None:
        expected = [size, size * (1 + self.look_backward + self.look_forward)]
        if bias.ndim != 3 or list(bias.shape[1:]) != expected or packed % bias.shape[0]:
            raise UserError(
                f"attn_bias of shape {list(bias.shape)}: expected [heads, {expected[0]}, "
                f"{expected[1]}] with heads that divide {packed} sequences."
            )


def _as_bool(mask: Tensor, name: str) -> Tensor:
    """Return a mask of booleans, or of numbers 0 and 1, as booleans."""
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            f"{name} of {mask.dtype} holds other values than 0 and 1: give True (or 1) at what may "
            "be seen. Numbers to add to scores go into attn_bias."
        )
    return mask != 0


def _key_mask(mask: Tensor, packed: int, length: int) -> Tensor:
    if mask.ndim != 2 or mask.shape[1] != length or mask.shape[0] < 1 or packed % mask.shape[0]:
        raise UserError(
            f"mask of shape {list(mask.shape)}: expected [batch, {length}] with a batch that "
            f"divides {packed} sequences."
        )
    return _as_bool(mask, "mask")


def _pair_mask(mask: Tensor, packed: int, length: int) -> Tensor:
    fits = mask.ndim in (2, 3) and list(mask.shape[-2:]) == [length, length]
    if not fits or (mask.ndim == 3 and packed % mask.shape[0]):
        raise UserError(
            f"attn_mask of shape {list(mask.shape)}: expected [{length}, {length}], or [batch, "
            f"{length}, {length}] with a batch that divides {packed} sequences."
        )
    return _as_bool(mask, "attn_mask")


def _layout(
    q: Tensor, mask: Tensor | None, attn_mask: Tensor | None, bias: Tensor | None
) -> tuple[int, int]:
    """Return how the packed sequences are seen, as batch and heads: what is given decides."""
    packed = math.prod(q.shape[:-2])
    batches = {len(attn_mask)} if attn_mask is not None and attn_mask.ndim == 3 else set()
    if mask is not None:
        batches.add(len(mask))
    if len(batches) > 1:
        raise UserError(f"mask and attn_mask are of {sorted(batches)} rows: give one batch size.")
    if batches:
        batch = batches.pop()
        if bias is not None and (packed // batch) % bias.shape[0]:
            raise UserError(
                f"attn_bias of {bias.shape[0]} heads, but a mask of {batch} rows makes "
                f"{packed // batch} heads: shape q [batch, heads, tokens, dim], mask [batch, "
                "tokens]."
            )
        return batch, packed // batch
    heads = q.shape[-3] if q.ndim > 3 else 1
    if bias is not None:
        heads = bias.shape[0]
    return packed // heads, heads
