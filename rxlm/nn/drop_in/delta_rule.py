"""The recurrence of the drop-in layers, from projected q, k and v to normalised merged heads.

Two layers put projections around it: their own (:mod:`.layer`), or those of the softmax attention
that they stand beside (:mod:`.mixing`). The steps, and what both directions mean, are in
:mod:`.layer`.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head dimension, n order, R recent
tokens that a cache keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rxlm.errors import UserError
from rxlm.nn.drop_in.operator_modes import RecurrentSettings, gelu_of_state, virtual_tokens
from rxlm.nn.drop_in.pooling import CausalAvgPool1d
from rxlm.nn.short_conv import RealTokensFirst
from rxlm.ops.linear_attention import l2_normalize
from rxlm.ops.linear_attention.value_gates import value_gated_delta_rule


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

    Args: see :class:`rxlm.nn.drop_in.layer.LinearAttention`.
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


def _forget_constants_of_tptt(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Drop the constants that TPTT stores beside its weights."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}virtual_token_expander")]:
        del state_dict[name]
