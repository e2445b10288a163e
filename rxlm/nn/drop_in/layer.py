"""``LinearAttention``: a layer to put where softmax attention stood, with the interface of TPTT.

    q, k, v = projections of x
    gates   = sigmoid of the causal average (width 3) of k or v, per key/value channel
    q, k    = SiLU, then scaled to length 1;  v scaled by D^-1/2
    o       = the recurrence of ``operator_mode`` (:mod:`.operator_modes`, and the equations of
              :mod:`rxlm.ops.linear_attention.value_gates`)
    y       = dropout(out_proj(rms_norm(merged heads)))

In both directions the recurrence also runs over the reversed tokens with the same weights (gates
and virtual tokens made in that order), and o is the mean of both. Padding leaves no trace, on
either side. Not here: the layer of the Reactive Transformer (:mod:`rxlm.nn.linear_attention`).

Shapes: B batch, T tokens, H query heads, G key/value heads, D head dimension, n order, R recent
tokens that a cache keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rxlm.errors import UserError
from rxlm.nn.drop_in.masks import real_tokens
from rxlm.nn.drop_in.operator_modes import (
    RecurrentSettings,
    gelu_of_state,
    recurrent_settings,
    virtual_tokens,
)
from rxlm.nn.drop_in.pooling import CausalAvgPool1d
from rxlm.nn.short_conv import RealTokensFirst
from rxlm.ops.linear_attention import l2_normalize
from rxlm.ops.linear_attention.value_gates import value_gated_delta_rule

logger = logging.getLogger(__name__)

SENSIBLE_SCALE = (1e-2, 1e2)
"""Root mean squares of inputs outside of this range lead to one warning per layer."""


class DeltaRuleCache(NamedTuple):
    """The past of B sequences, as a value of constant size.

    Attributes:
        state: ``[B, H, D, D]``.
        recent_keys: ``[B, R, G * D]``, projections at the last R real tokens; zeros before the
            first.
        recent_values: the same of the values.
        num_tokens: ``[B]``, real tokens seen.
    """

    state: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    num_tokens: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> DeltaRuleCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.state.device)
        return DeltaRuleCache(*(tensor.index_select(0, index) for tensor in self))

    def detach(self) -> DeltaRuleCache:
        """Return the value outside of every autograd graph."""
        return DeltaRuleCache(*(tensor.detach() for tensor in self))

    @property
    def num_bytes(self) -> int:
        """Size of the value, independent of how many tokens it stands for."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class DeltaRuleMixer(nn.Module):
    """The layer without its projections: from q, k, v to the normalised merged heads.

    Args: see :class:`LinearAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_key_value_heads: int,
        recurrent: RecurrentSettings,
        *,
        linear_precision: torch.dtype = torch.float32,
        max_chunk_size: int = 64,
        use_linear_checkpoint: bool = False,
        bidirectional: bool = False,
        pooling_size: int = 3,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_key_value_heads": num_key_value_heads,
            "max_chunk_size": max_chunk_size,
            "pooling kernel_size": pooling_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"LinearAttention {name}={size} must be positive.")
        if num_heads % num_key_value_heads:
            raise UserError(
                f"num_heads={num_heads} is not divisible by "
                f"num_key_value_heads={num_key_value_heads}: each key/value head serves equally "
                "many query heads."
            )
        if not linear_precision.is_floating_point:
            raise UserError(f"linear_precision={linear_precision} is not a floating point type.")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_key_value_heads = num_key_value_heads
        self.recurrent = recurrent
        self.linear_precision = linear_precision
        self.max_chunk_size = max_chunk_size
        self.use_linear_checkpoint = use_linear_checkpoint
        self.bidirectional = bidirectional
        self.norm_eps = norm_eps
        self.pool_g = CausalAvgPool1d(num_key_value_heads * head_dim, pooling_size)
        self.num_recent = max(pooling_size, recurrent.order) - 1
        self.register_load_state_dict_pre_hook(_forget_constants_of_tptt)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        cache: DeltaRuleCache | None = None,
    ) -> tuple[Tensor, DeltaRuleCache | None]:
        """Run the recurrence.

        Args:
            query: ``[B, T, H * D]``, as projected.
            key: ``[B, T, G * D]``.
            value: ``[B, T, G * D]``.
            key_mask: ``[B, T]`` bool, True at real tokens, wherever they stand.
            cache: of the tokens before; not in both directions.

        Returns:
            ``[B, T, H * D]`` with root mean square 1 (0 at padding) in the type of ``query``, and
            the cache with the new tokens (None in both directions).

        Raises:
            UserError: for a cache that does not fit.
        """
        new: DeltaRuleCache | None = None
        if self.bidirectional:
            if cache is not None:
                raise UserError("a layer in both directions sees later tokens, so it has no cache.")
            forward, _ = self._compact(query, key, value, key_mask, None)
            backward, _ = self._compact(
                query.flip(1),
                key.flip(1),
                value.flip(1),
                None if key_mask is None else key_mask.flip(1),
                None,
            )
            heads = (forward + backward.flip(1)) / 2
        else:
            heads, new = self._compact(query, key, value, key_mask, cache)
        mean_square = heads.square().mean(-1, keepdim=True)
        return (heads * (mean_square + self.norm_eps).rsqrt()).to(query.dtype), new

    def _compact(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cache: DeltaRuleCache | None,
    ) -> tuple[Tensor, DeltaRuleCache]:
        """Run :meth:`_causal` with the real tokens in front, so that neighbours are neighbours."""
        if key_mask is None or query.shape[1] == 1:
            return self._causal(query, key, value, key_mask, cache)
        order = RealTokensFirst(key_mask)
        query, key, value = (order.pack(tensor) for tensor in (query, key, value))
        heads, new = self._causal(query, key, value, order.key_mask, cache)
        return order.unpack(heads), new

    def _causal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        cache: DeltaRuleCache | None,
    ) -> tuple[Tensor, DeltaRuleCache]:
        """From projections to merged heads ``[B, T, H * D]``, in one direction."""
        batch, length = query.shape[:2]
        if cache is None:
            state = None
            nothing = key.new_zeros(batch, self.num_recent, key.shape[2])
            cache = DeltaRuleCache(query, nothing, nothing, key.new_zeros(batch, dtype=torch.long))
        else:
            self._check_cache(cache, batch)
            state = cache.state
        keys = torch.cat((cache.recent_keys.to(key.dtype), key), dim=1)
        values = torch.cat((cache.recent_values.to(value.dtype), value), dim=1)
        # Rows that have seen fewer than R tokens have their first one here:
        first = self.num_recent - cache.num_tokens.clamp(max=self.num_recent)
        log_decay, strength = self._gates(keys, values, first)
        heads, state = self._recur(query, keys, values, log_decay, strength, state, key_mask)
        counts = length if key_mask is None else key_mask.sum(dim=1)
        last = torch.arange(self.num_recent, device=key.device).expand(batch, -1)
        last = last + (counts if isinstance(counts, int) else counts.unsqueeze(1))
        new = DeltaRuleCache(
            state,
            torch.take_along_dim(keys, last.unsqueeze(-1), dim=1),
            torch.take_along_dim(values, last.unsqueeze(-1), dim=1),
            cache.num_tokens + counts,
        )
        return heads, new

    def _gates(self, keys: Tensor, values: Tensor, first: Tensor) -> tuple[Tensor | None, Tensor]:
        """Log alpha (None if constant) and beta, ``[B, T, H, D]``; ``[B, T, H, 1]`` if constant."""
        positions = torch.arange(keys.shape[1], device=keys.device)
        source = torch.maximum(positions, first.unsqueeze(1)).unsqueeze(-1)
        skipped = self.num_recent - self.pool_g.kernel_size + 1
        pooled: dict[str, Tensor] = {}
        for letter, tensor in (("k", keys), ("v", values)):
            if letter in self.recurrent.alpha_gate + self.recurrent.beta_gate:
                inputs = torch.take_along_dim(tensor.to(self._exact), source, dim=1)[:, skipped:]
                pooled[letter] = self._spread(F.logsigmoid(self.pool_g.windows(inputs)))
        logs = [
            None if gate == "c" else sum(pooled[letter] for letter in gate)
            for gate in (self.recurrent.alpha_gate, self.recurrent.beta_gate)
        ]
        log_alpha, log_beta = (log if isinstance(log, Tensor) else None for log in logs)
        if log_beta is None:
            length = keys.shape[1] - self.num_recent
            channels = 1 if log_alpha is None else self.head_dim
            half = keys.new_full((), 0.5, dtype=self._exact)
            return log_alpha, half.expand(keys.shape[0], length, self.num_heads, channels)
        return log_alpha, log_beta.exp()

    def _recur(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        log_decay: Tensor | None,
        strength: Tensor,
        state: Tensor | None,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        order = self.recurrent.order
        before = self.num_recent - (order - 1)
        virtual = []
        for tensor in (l2_normalize(F.silu(self._split(keys))), self._split(values)):
            # What is missing before the first token is zero in a cache, and stays zero here.
            virtual.append(virtual_tokens(tensor[:, before:], order, self.recurrent.trick))
        heads = query.to(self._exact).unflatten(-1, (self.num_heads, self.head_dim))
        queries = l2_normalize(F.silu(heads))
        key, value = (
            tensor.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=3)
            for tensor in virtual
        )
        inputs = [queries, key, value * self.head_dim**-0.5, log_decay]
        inputs.append(strength.unsqueeze(2).expand(-1, -1, order, -1, -1))
        rounded = [None if x is None else x.to(self.linear_precision) for x in inputs]
        if not self.recurrent.linear and self.use_linear_checkpoint:
            output, state = checkpoint(
                self._operate, *rounded, state, key_mask, use_reentrant=False
            )
        else:
            output, state = self._operate(*rounded, state, key_mask)
        return output.to(self._exact).flatten(-2), state

    def _operate(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        *rounded, state, key_mask = inputs
        linear = self.recurrent.linear
        return value_gated_delta_rule(
            *rounded,
            initial_state=state,
            key_mask=key_mask,
            form="chunk" if linear and rounded[0].shape[1] > 1 else "recurrent",
            chunk_size=self.max_chunk_size,
            state_activation=None if linear else gelu_of_state,
            recompute=self.use_linear_checkpoint,
        )

    @property
    def _exact(self) -> torch.dtype:
        """The type of everything around the recurrence."""
        return torch.float64 if self.linear_precision == torch.float64 else torch.float32

    def _split(self, tensor: Tensor) -> Tensor:
        """``[B, X, G * D]`` to ``[B, X, G, D]``."""
        shape = (self.num_key_value_heads, self.head_dim)
        return tensor.to(self._exact).unflatten(-1, shape)

    def _spread(self, gates: Tensor) -> Tensor:
        """``[B, T, G * D]`` to ``[B, T, H, D]``: each query head gets the gates of its group."""
        return self._split(gates).repeat_interleave(
            self.num_heads // self.num_key_value_heads, dim=2
        )

    def _check_cache(self, cache: DeltaRuleCache, batch: int) -> None:
        width = self.num_key_value_heads * self.head_dim
        expected = [
            (batch, self.num_heads, self.head_dim, self.head_dim),
            (batch, self.num_recent, width),
            (batch, self.num_recent, width),
            (batch,),
        ]
        found = [tuple(tensor.shape) for tensor in cache]
        if found != expected:
            raise UserError(
                f"the cache has shapes {found}, expected {expected}: it belongs to another layer, "
                "or its rows were not selected as those of the input (cache.select)."
            )


class LinearAttention(DeltaRuleMixer):
    """Multi-head linear attention: ``[B, T, hidden_dim]`` to ``[B, T, hidden_dim]``."""

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
        num_key_value_groups: int | None = None,
        bias: bool = True,
        dropout: float | None = None,
        linear_precision: torch.dtype = torch.float32,
        *,
        operator_mode: str = "delta_rule",
        recurrent_config: Mapping[str, Any] | RecurrentSettings | None = None,
        order: int | None = None,
        alpha_gate: str | None = None,
        beta_gate: str | None = None,
        trick: str | None = None,
        use_linear_checkpoint: bool = False,
        max_chunk_size: int = 64,
        bidirectional: bool = False,
        pooling_config: Mapping[str, int] | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        """Make a layer with new weights.

        Args:
            hidden_dim: width of inputs and outputs.
            num_heads: H.
            head_dim: D; None = ``hidden_dim / num_heads``.
            num_key_value_heads: G, a divisor of H; None = H.
            num_key_value_groups: H / G, in place of ``num_key_value_heads``.
            bias: of the four projections.
            dropout: probability of dropping an element of the output.
            linear_precision: what the recurrence gets its inputs in. It sums in float32, in
                float64 if this is float64.
            operator_mode: a key of :data:`~rxlm.nn.drop_in.operator_modes.OPERATOR_MODES`.
            recurrent_config: parts that differ from those of the mode, see
                :class:`~rxlm.nn.drop_in.operator_modes.RecurrentSettings`.
            order: one such part, as are the next three: updates of the state per token.
            alpha_gate: ``c``, ``k``, ``v`` or ``kv``.
            beta_gate: ``c``, ``k``, ``v`` or ``kv``.
            trick: how virtual tokens are made.
            use_linear_checkpoint: recompute inside the recurrence in the backward pass: less
                memory, more time, the same numbers.
            max_chunk_size: most tokens computed at once; never changes the result.
            bidirectional: whether each token sees all others.
            pooling_config: ``{"kernel_size": W}``, tokens that a gate averages over; None = 3.
            norm_eps: added to the mean square of the merged heads.

        Raises:
            UserError: for sizes that do not divide, or names that do not exist.
        """
        if num_heads < 1 or hidden_dim < 1:
            raise UserError(f"hidden_dim={hidden_dim}, num_heads={num_heads}: must be positive.")
        if head_dim is None and hidden_dim % num_heads:
            raise UserError(
                f"hidden_dim={hidden_dim} is not divisible by num_heads={num_heads}: change one of "
                "them, or give head_dim."
            )
        if num_key_value_groups is not None:
            groups = num_heads if num_key_value_heads is None else num_key_value_heads
            if num_key_value_heads is None and num_key_value_groups > 0:
                num_key_value_heads = groups = num_heads // num_key_value_groups
            if num_key_value_groups * groups != num_heads:
                raise UserError(
                    f"num_key_value_groups={num_key_value_groups} with num_heads={num_heads} and "
                    f"num_key_value_heads={num_key_value_heads}: groups times key/value heads must "
                    "be the number of heads."
                )
        pooling = dict(pooling_config or {})
        pooling_size = pooling.pop("kernel_size", 3)
        if pooling:
            raise UserError(
                f"pooling_config has no {', '.join(sorted(pooling))}: it knows kernel_size."
            )
        recurrent = recurrent_settings(operator_mode, recurrent_config)
        parts = {"order": order, "alpha_gate": alpha_gate, "beta_gate": beta_gate, "trick": trick}
        given = {name: part for name, part in parts.items() if part is not None}
        if given:
            recurrent = recurrent_settings(operator_mode, {**vars(recurrent), **given})
        super().__init__(
            num_heads,
            hidden_dim // num_heads if head_dim is None else head_dim,
            num_heads if num_key_value_heads is None else num_key_value_heads,
            recurrent,
            linear_precision=linear_precision,
            max_chunk_size=max_chunk_size,
            use_linear_checkpoint=use_linear_checkpoint,
            bidirectional=bidirectional,
            pooling_size=pooling_size,
            norm_eps=norm_eps,
        )
        self.hidden_dim, self.operator_mode = hidden_dim, operator_mode
        wide, narrow = num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_dim, wide, bias=bias)
        self.k_proj = nn.Linear(hidden_dim, narrow, bias=bias)
        self.v_proj = nn.Linear(hidden_dim, narrow, bias=bias)
        self.out_proj = nn.Linear(wide, hidden_dim, bias=bias)
        self.dropout = nn.Dropout(dropout or 0.0)
        self._scale_is_known = False

    @overload
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: DeltaRuleCache | None = None,
        return_cache: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: DeltaRuleCache | None = None,
        return_cache: Literal[True],
    ) -> tuple[Tensor, DeltaRuleCache]: ...

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        cache: DeltaRuleCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, DeltaRuleCache]:
        """Attend.

        Args:
            x: ``[B, T, hidden_dim]``, best of mean 0 and variance 1.
            attn_mask: which tokens are real; every usual form, see
                :func:`~rxlm.nn.drop_in.masks.real_tokens`.
            cache: of the tokens before; unchanged. None: ``x`` begins the sequence.
            return_cache: whether to return the cache with the new tokens, too.

        Returns:
            ``[B, T, hidden_dim]``, zeros at padding; and the cache, if asked for.

        Raises:
            UserError: for an input, mask or cache that does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden_dim:
            raise UserError(
                f"LinearAttention got {list(x.shape)}, expected [batch, tokens, "
                f"{self.hidden_dim}]: project other widths with nn.Linear first."
            )
        if return_cache and self.bidirectional:
            raise UserError("a layer in both directions sees later tokens, so it has no cache.")
        key_mask = real_tokens(attn_mask, x.shape[0], x.shape[1], has_past=cache is not None)
        self._warn_of_scale(x, key_mask)
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads, new = self.mix(query, key, value, key_mask, cache)
        y = self.dropout(self.out_proj(heads))
        if key_mask is not None:
            y = y.masked_fill(~key_mask.unsqueeze(-1), 0.0)
        if not return_cache:
            return y
        assert new is not None
        return y, new

    def extra_repr(self) -> str:
        """Describe the recurrence in ``print(layer)``."""
        return f"{self.operator_mode}: {self.recurrent}, bidirectional={self.bidirectional}"

    def _warn_of_scale(self, x: Tensor, key_mask: Tensor | None) -> None:
        """Look at the first input only: on a GPU the program has to wait for the answer."""
        if self._scale_is_known or torch.compiler.is_compiling() or not x.numel():
            return
        self._scale_is_known = True
        tokens = x.detach() if key_mask is None else x.detach()[key_mask]
        scale = float(tokens.double().square().mean().sqrt()) if tokens.numel() else 1.0
        low, high = SENSIBLE_SCALE
        if not low <= scale <= high:
            logger.warning(
                "LinearAttention: the root mean square of the input is %.3g, outside of %g to %g; "
                "gates saturate or stay at one half. Normalise inputs "
                "(rxlm.nn.drop_in.scaler.StandardScaler, nn.LayerNorm).",
                scale,
                low,
                high,
            )


def _forget_constants_of_tptt(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Drop the constants that TPTT stores beside its weights."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}virtual_token_expander")]:
        del state_dict[name]
