"""Memory attention: rewrites the slots of every layer after a turn (RxT, arXiv 2510.03561, 3.3).

One module serves all published variants; they differ in what the slots attend to *before* they
read the encoded turn:

* ``simple``: nothing.
* ``self``: the layer's own slots.
* ``interlayer``: the mean of the slots over all layers.
* ``self-interlayer``: a learned gate between the layer's own slots and that mean.
* ``grouped-self-interlayer``: the same with the mean over the layer's group.

The layers are independent given the previous slots, so their weights are stacked and one batched
product serves all of them.

Shapes: L layers, B batch, S slots, T encoded tokens, D width, H query heads, G key/value heads,
K head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from rxlm.memory.gates import GateSettings, ResidualGate
from rxlm.memory.norms import MemoryNorm, MemoryNormType
from rxlm.memory.slots import InitialMemory, InitType
from rxlm.nn.attention import KeyValue
from rxlm.ops.attention import attend, visible_keys
from rxlm.ops.rotary import apply_rotary, rotary_phases, token_positions

MemoryVariant = Literal[
    "simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer"
]


@dataclass(frozen=True)
class HeadSettings:
    """Head counts of one stacked attention."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    dropout: float = 0.0


@dataclass(frozen=True)
class MemorySettings:
    """Everything that shapes a :class:`MemoryAttention`; see :mod:`rxlm.rxt.config`."""

    num_layers: int
    num_slots: int
    dim: int
    variant: MemoryVariant
    write_heads: HeadSettings
    mix_heads: HeadSettings
    gate: GateSettings = field(default_factory=GateSettings)
    mix_gate: GateSettings = field(default_factory=GateSettings)
    norm_type: MemoryNormType = "classic-rms"
    norm_init_gate: float = -2.0
    norm_per_dim_scale: bool = False
    norm_decay: float = 0.9
    num_groups: int = 1
    init_type: InitType = "learned"
    init_std: float = 0.1
    slot_identity: bool = True
    copy_path_init: bool = True
    write_sharpness: float = 3.0
    write_competition: bool = False
    rope_base: float = 10000.0
    eps: float = 1e-6


class StackedAttention(nn.Module):
    """Softmax attention of L layers at once: weights ``[L, in, out]``, inputs ``[L, B, ., D]``.

    With ``competition`` the queries share each token out among themselves (softmax over queries)
    before each takes the mean of its shares: slot attention, arXiv 2006.15055, algorithm 1.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        heads: HeadSettings,
        *,
        sharpness: float,
        copy_path: bool,
        competition: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.competition = competition
        kv_width = heads.num_key_value_heads * heads.head_dim
        self.query = _stacked(num_layers, dim, heads.num_heads * heads.head_dim, gain=sharpness)
        self.key = _stacked(num_layers, dim, kv_width)
        self.value = _stacked(num_layers, dim, kv_width)
        out_width = max(heads.num_heads, heads.num_key_value_heads) * heads.head_dim
        self.output = _stacked(num_layers, out_width, dim)
        if copy_path:
            self._initialize_copy_path(kv_width, dim)

    @torch.no_grad()
    def _initialize_copy_path(self, kv_width: int, dim: int) -> None:
        # See nn.attention.initialize_copy_path: the written value starts as what was read.
        repeats = max(1, self.heads.num_heads // self.heads.num_key_value_heads)
        for layer in range(self.value.shape[0]):
            value = torch.eye(dim) if kv_width == dim else torch.empty(dim, kv_width)
            if kv_width != dim:
                nn.init.orthogonal_(value)
            self.value[layer].copy_(value)
            per_head = value.t().reshape(-1, self.heads.head_dim, dim)
            spread = per_head.repeat_interleave(repeats, dim=0).reshape(-1, dim) / repeats
            self.output[layer].copy_(spread)

    def project(self, source: Tensor, phases: Tensor | None = None) -> KeyValue:
        """Project keys and values of ``[L, B, P, D]`` to ``[L * B, P, G, K]``."""
        key = self._split(_layerwise(source, self.key), self.heads.num_key_value_heads)
        value = _layerwise(source, self.value)
        if phases is not None:
            key = apply_rotary(key, phases)
        return KeyValue(key, self._split(value, self.heads.num_key_value_heads))

    def forward(self, x: Tensor, key_value: KeyValue, mask: Tensor | None) -> Tensor:
        """Attend from ``x`` ``[L, B, S, D]``; the mask is ``[B, 1, 1, P]`` bool or None."""
        num_layers, batch_size = x.shape[:2]
        if self.competition:
            return self._compete(x, key_value, mask)
        query = self._split(_layerwise(x, self.query), self.heads.num_heads)
        if mask is not None:
            mask = mask.repeat(num_layers, 1, 1, 1)
        dropout = self.heads.dropout if self.training else 0.0
        mixed = attend(query, key_value.key, key_value.value, mask, dropout=dropout).flatten(-2)
        return _layerwise(mixed.view(num_layers, batch_size, *mixed.shape[1:]), self.output)

    def _compete(self, x: Tensor, key_value: KeyValue, mask: Tensor | None) -> Tensor:
        keys, values = (part.unflatten(0, x.shape[:2]) for part in key_value)
        weights = self.weights(x, keys, None if mask is None else mask[:, 0, 0])
        weights = nn.functional.dropout(weights, self.heads.dropout, self.training)
        values = values.repeat_interleave(weights.shape[2] // values.shape[3], dim=3)
        mixed = torch.einsum("lbhsp,lbphk->lbshk", weights.to(values.dtype), values)
        return _layerwise(mixed.flatten(-2), self.output)

    def weights(self, x: Tensor, keys: Tensor, key_mask: Tensor | None) -> Tensor:
        """Return the attention weights of :meth:`forward`, ``[L, B, max(H, G), S, P]``, fp32.

        Args:
            x: ``[L, B, S, D]``.
            keys: ``[L, B, P, G, K]``.
            key_mask: bool ``[B, P]``; rows without a real key get equal weights.
        """
        heads = self.heads
        count = max(heads.num_heads, heads.num_key_value_heads)
        query = _layerwise(x, self.query).unflatten(-1, (heads.num_heads, heads.head_dim))
        query = query.repeat_interleave(count // heads.num_heads, dim=3)
        keys = keys.repeat_interleave(count // heads.num_key_value_heads, dim=3)
        scores = torch.einsum("lbshk,lbphk->lbhsp", query, keys).float() * heads.head_dim**-0.5
        if self.competition:
            # Logarithms of the shares of a token: their softmax over tokens is shares / sum.
            scores = scores.log_softmax(dim=-2)
        if key_mask is not None:
            # The lowest finite number, not -inf: a row without any key would be NaN.
            lowest = torch.finfo(torch.float32).min
            scores = scores.masked_fill(~key_mask[None, :, None, None, :], lowest)
        return scores.softmax(dim=-1)

    def _split(self, x: Tensor, num_heads: int) -> Tensor:
        num_layers, batch_size, length, _ = x.shape
        return x.reshape(num_layers * batch_size, length, num_heads, self.heads.head_dim)


class MemoryAttention(nn.Module):
    """Rewrites short-term memory from the encoder's states of one finished turn.

    ``slots, states -> slots``: a pure function of its inputs; nothing is kept inside. The
    projections of the encoded turn do not depend on the slots, so many turns can be projected in
    one batch (:meth:`project`) and then scanned with the cheap :meth:`write`.
    """

    def __init__(self, settings: MemorySettings) -> None:
        super().__init__()
        self.settings = settings
        num_layers, num_slots, dim = settings.num_layers, settings.num_slots, settings.dim
        self.initial = InitialMemory(
            num_layers, num_slots, dim, init_type=settings.init_type, std=settings.init_std
        )
        self.slot_norm = self._memory_norm()
        self.source_norm = nn.RMSNorm(dim, eps=settings.eps, elementwise_affine=False)
        if settings.slot_identity:
            # Slots that start alike receive alike updates and collapse; an identity of std 1,
            # added after the norm, gives each slot its own question to the turn.
            self.slot_identity = nn.Parameter(torch.randn(num_layers, 1, num_slots, dim))
            self.slot_identity._no_weight_decay = True  # type: ignore[attr-defined]
        self.write_attention = StackedAttention(
            num_layers,
            dim,
            settings.write_heads,
            sharpness=settings.write_sharpness,
            copy_path=settings.copy_path_init,
            competition=settings.write_competition,
        )
        self.gate = ResidualGate(num_layers, num_slots, dim, settings.gate, settings.eps)
        if settings.variant != "simple":
            self._build_mixing()

    def _build_mixing(self) -> None:
        settings = self.settings
        num_layers, num_slots, dim = settings.num_layers, settings.num_slots, settings.dim
        self.mix_norm = self._memory_norm()
        self.mix_attention = StackedAttention(
            num_layers,
            dim,
            settings.mix_heads,
            sharpness=1.0,
            copy_path=settings.copy_path_init,
        )
        self.mix_gate = ResidualGate(num_layers, num_slots, dim, settings.mix_gate, settings.eps)
        if settings.variant in ("self-interlayer", "grouped-self-interlayer"):
            self.source_gate = ResidualGate(
                num_layers, num_slots, dim, GateSettings(init=0.0), settings.eps
            )

    def _memory_norm(self) -> MemoryNorm:
        settings = self.settings
        return MemoryNorm(
            settings.num_layers,
            settings.num_slots,
            settings.dim,
            norm_type=settings.norm_type,
            init_gate=settings.norm_init_gate,
            per_dim_scale=settings.norm_per_dim_scale,
            decay=settings.norm_decay,
            eps=settings.eps,
        )

    def forward(self, slots: Tensor, states: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Return the memory after a turn.

        Args:
            slots: memory before the turn, ``[L, B, S, D]``; left unchanged.
            states: encoder states of the whole turn, ``[L, B, T, D]``.
            key_mask: ``[B, T]`` bool, True where a token is real.

        Returns:
            memory after the turn, ``[L, B, S, D]``. Rows without any real token are unchanged.
        """
        return self.write(slots, self.project(states, key_mask), key_mask)

    def project(self, states: Tensor, key_mask: Tensor | None = None) -> KeyValue:
        """Project encoded turns ``[L, B, T, D]``; keys are rotated by token position.

        Returns:
            keys and values ``[L * B, T, G, K]``.
        """
        positions = token_positions(key_mask, states.shape[2], states.device)
        phases = self._phases(positions)
        if phases.dim() == 3:
            phases = phases.repeat(states.shape[0], 1, 1)
        return self.write_attention.project(self.source_norm(states), phases)

    def project_real(self, states: Tensor, key_mask: Tensor) -> KeyValue:
        """Do as :meth:`project` for real tokens only; what stands at padding is zero.

        For many turns at once, whose padding (to the longest of all) is most of what there is.
        """
        num_layers = states.shape[0]
        (real,) = key_mask.flatten().nonzero(as_tuple=True)
        positions = token_positions(key_mask, states.shape[2], states.device)
        phases = self._phases(positions.expand(key_mask.shape).flatten()[real])
        packed = states.flatten(1, 2)[:, real]
        projected = self.write_attention.project(self.source_norm(packed[:, None]), phases)

        def spread(part: Tensor) -> Tensor:
            rows = part.new_zeros(num_layers, key_mask.numel(), *part.shape[2:])
            return rows.index_copy(1, real, part).unflatten(1, key_mask.shape).flatten(0, 1)

        return KeyValue(*(spread(part) for part in projected))

    def _phases(self, positions: Tensor) -> Tensor:
        return rotary_phases(positions, self.settings.write_heads.head_dim, self.settings.rope_base)

    def write(self, slots: Tensor, encoded: KeyValue, key_mask: Tensor | None = None) -> Tensor:
        """Write one projected turn into the slots; arguments as in :meth:`forward`."""
        mask = visible_keys(key_mask, 1, encoded.key.shape[1], causal=False, device=slots.device)
        mixed = self._mix(slots)
        written = self.gate(mixed, self.write_attention(self._question(mixed), encoded, mask))
        if key_mask is None:
            return written
        return torch.where(key_mask.any(dim=1)[None, :, None, None], written, slots)

    def write_weights(
        self, slots: Tensor, states: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        """Return how much each slot attends to each token of the turn that :meth:`forward` writes.

        The readable twin of what happens inside the fused kernel; arguments as there.

        Returns:
            fp32 weights ``[L, B, max(H, G), S, T]`` that sum to one over the real tokens.
        """
        query = self._question(self._mix(slots))
        keys = self.project(states, key_mask).key.unflatten(0, slots.shape[:2])
        return self.write_attention.weights(query, keys, key_mask)

    def _question(self, mixed: Tensor) -> Tensor:
        query = self.slot_norm(mixed)
        return query + self.slot_identity if self.settings.slot_identity else query

    def _mix(self, slots: Tensor) -> Tensor:
        """Let slots attend to slots, as the variant says, before they read the turn."""
        variant = self.settings.variant
        if variant == "simple":
            return slots
        normed = self.mix_norm(slots)
        if variant == "self":
            source = normed
        elif variant == "interlayer":
            source = self.mix_norm(slots.mean(dim=0, keepdim=True).expand_as(slots))
        else:
            source = self.source_gate(normed, self.mix_norm(self._group_mean(slots)))
        update = self.mix_attention(normed, self.mix_attention.project(source), None)
        return self.mix_gate(slots, update)

    def _group_mean(self, slots: Tensor) -> Tensor:
        num_groups = self.settings.num_groups if self.settings.variant.startswith("grouped") else 1
        grouped = slots.unflatten(0, (num_groups, -1))
        return grouped.mean(dim=1, keepdim=True).expand_as(grouped).flatten(0, 1)


def _layerwise(x: Tensor, weight: Tensor) -> Tensor:
    # [L, B, P, in] x [L, in, out] as one batched product of L matrices.
    return torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3])


def _stacked(num_layers: int, inputs: int, outputs: int, gain: float = 1.0) -> nn.Parameter:
    # nn.Linear's variance for every layer: uniform in +-sqrt(3 / inputs) has std inputs**-0.5.
    bound = gain * math.sqrt(3.0 / inputs)
    return nn.Parameter(torch.empty(num_layers, inputs, outputs).uniform_(-bound, bound))
