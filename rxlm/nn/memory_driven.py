"""What MD-GDN adds to KDA: a memory that sets the gates and the state an interaction starts from.

    m        = norm(mean of the slots)
    offsets  = up(down(m))                      'add': the same for every token of the interaction
               up(SiLU(tokens(x) + down(m)))    'concat': up(SiLU(linear([x; m])))
    gates    = KDA's, with the offsets (and a bias) added to the logits of decay and write strength
    memory   = scale * sum_j write_j k_j v_j^T / sqrt(number of slots)
    start    = keep * carried + (1 - keep) * memory

``keep`` is a sigmoid of m, one number a head, and 0 for a conversation without a past. All that
depends on memory alone is computed once per interaction. ``up`` starts at zero: decays start as
KDA's, writes mostly closed. Slots become keys and values through one bottleneck as wide as a head,
so the parameters grow with the width of the model times that of a head, not with the size of the
state.

Shapes: B batch, T tokens, S slots, D width, HV value heads, K/V head dimensions, R bottleneck (V),
C = HV * (K + 1) gates.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.ops.linear_attention import l2_normalize

MemoryFusionMode = Literal["add", "concat"]

INITIAL_KEEP_LOGIT = 7.0
"""99.9 % of the carried state pass into the next interaction: 98 % after 24 of them. Windows of
training are shorter than conversations, so what fades slowly is hardly corrected by training."""
INITIAL_WRITE_LOGIT = -3.0
"""Added to the logits of the write strength: a token erases and writes 5 % unless it has learned to
write more. At one half, as in KDA, hundreds of tokens of small talk would erase what was told."""
INITIAL_SCALE = 0.1
"""Of the state from memory: small, so that it does not disturb; not 0, so that all of it learns."""


class MemoryCondition(NamedTuple):
    """What one layer takes from the memory of an interaction.

    Attributes:
        offset: 'add': ``[B, C]``, added to the logits of the gates; 'concat': ``[B, R]``, the
            memory's share of the bottleneck.
        state: ``[B, HV, K, V]`` float32 (float64 in a float64 model), the state from memory.
        keep: ``[B, HV]``, which share of a carried state stays.
    """

    offset: Tensor
    state: Tensor
    keep: Tensor


class MemoryFusion(nn.Module):
    """The parameters of MD-GDN beyond those of KDA."""

    def __init__(
        self,
        dim: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        mode: MemoryFusionMode,
        norm_eps: float,
    ) -> None:
        """Build the projections.

        Args:
            dim: D.
            num_value_heads: HV.
            key_dim: K.
            value_dim: V, also the bottleneck R.
            mode: how memory enters the gates.
            norm_eps: of the norm of the mean slot.
        """
        super().__init__()
        self.mode = mode
        self._heads = (num_value_heads, key_dim, value_dim)
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.down = nn.Linear(dim, value_dim, bias=False)
        if mode == "concat":
            self.tokens = nn.Linear(dim, value_dim, bias=False)
        self.up = nn.Linear(value_dim, num_value_heads * (key_dim + 1), bias=False)
        self.slot_bottleneck = nn.Linear(dim, value_dim, bias=False)
        self.slot_key = nn.Linear(value_dim, num_value_heads * key_dim, bias=False)
        self.slot_value = nn.Linear(value_dim, num_value_heads * value_dim, bias=False)
        self.slot_write = nn.Linear(dim, num_value_heads, bias=False)
        self.write_bias = nn.Parameter(torch.empty(num_value_heads))
        self.scale = nn.Parameter(torch.empty(num_value_heads))
        self.keep = nn.Linear(dim, num_value_heads)
        for parameter in (self.write_bias, self.scale):
            parameter._full_precision = True  # type: ignore[attr-defined]
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Set what has a start of its own: few writes, a past that is kept, little memory."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.keep.weight)
        nn.init.constant_(self.keep.bias, INITIAL_KEEP_LOGIT)
        nn.init.constant_(self.write_bias, INITIAL_WRITE_LOGIT)
        nn.init.constant_(self.scale, INITIAL_SCALE)

    def forward(self, slots: Tensor, slot_mask: Tensor | None = None) -> MemoryCondition:
        """Read a memory, once per interaction.

        Args:
            slots: ``[B, S, D]``, normalised.
            slot_mask: ``[B, S]`` bool, which slots exist; None = all. A row without any slot has
                no offset in 'add' mode and no state from memory.
        """
        if slot_mask is None:
            slot_mask = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        exists = slot_mask.unsqueeze(-1)
        count = slot_mask.sum(dim=1).clamp(min=1).unsqueeze(-1)
        # Masked slots may hold anything, infinities included: they are replaced, not multiplied.
        slots = slots.masked_fill(~exists, 0.0)
        mean = self.norm((slots.sum(dim=1) / count).to(slots.dtype))
        offset = self.down(mean)
        if self.mode == "add":
            offset = self.up(offset)
        state = self._state(slots, exists, count)
        return MemoryCondition(offset, state, self.keep(mean).to(state.dtype).sigmoid())

    def _state(self, slots: Tensor, exists: Tensor, count: Tensor) -> Tensor:
        heads, key_dim, value_dim = self._heads
        narrow = self.slot_bottleneck(slots)
        key = _at_least_float32(self.slot_key(narrow)).unflatten(-1, (heads, key_dim))
        value = _at_least_float32(self.slot_value(narrow)).unflatten(-1, (heads, value_dim))
        write = _at_least_float32(self.slot_write(slots)).sigmoid().masked_fill(~exists, 0.0)
        weighted = l2_normalize(key) * write.unsqueeze(-1)
        with torch.autocast(slots.device.type, enabled=False):
            state = torch.einsum("bshk,bshv->bhkv", weighted, value)
        scale = self.scale.to(state.dtype) / count.to(state.dtype).sqrt()
        return state * scale[:, :, None, None]

    def gate_offsets(self, x: Tensor, condition: MemoryCondition) -> tuple[Tensor, Tensor]:
        """Return what is added to the logits of decay and write strength.

        Args:
            x: ``[B, T, D]``; its values matter in 'concat' mode only.
            condition: from :meth:`forward`.

        Returns:
            ``[B, T, HV * K]`` and ``[B, T, HV]``, with T = 1 in 'add' mode.
        """
        offsets = condition.offset.unsqueeze(1)
        if self.mode == "concat":
            offsets = self.up(F.silu(self.tokens(x) + offsets))
        heads, key_dim, _ = self._heads
        decay, write = offsets.split((heads * key_dim, heads), dim=-1)
        return decay, write + self.write_bias

    @staticmethod
    def initial_state(
        condition: MemoryCondition, carried: Tensor | None, started: Tensor | None
    ) -> Tensor:
        """Return the state ``[B, HV, K, V]`` that an interaction starts from.

        Args:
            condition: from :meth:`forward`.
            carried: ``[B, HV, K, V]``, the state after the interaction before; None = no row has
                one.
            started: ``[B]`` bool, which rows have one; None = none.
        """
        if carried is None or started is None:
            # The gate stays in the graph: no parameter is without a gradient at the first turn.
            carried = torch.zeros_like(condition.state)
            started = torch.zeros(carried.shape[0], dtype=torch.bool, device=carried.device)
        keep = torch.where(started.unsqueeze(-1), condition.keep, 0.0)[:, :, None, None]
        return keep * carried.to(keep.dtype) + (1.0 - keep) * condition.state


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
