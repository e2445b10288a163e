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
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.drop_in.delta_rule import DeltaRuleCache, DeltaRuleMixer
from rxlm.nn.drop_in.masks import real_tokens
from rxlm.nn.drop_in.operator_modes import RecurrentSettings, recurrent_settings

logger = logging.getLogger(__name__)

SENSIBLE_SCALE = (1e-2, 1e2)
"""Root mean squares of inputs outside of this range lead to one warning per layer."""


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
