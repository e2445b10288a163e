"""One linear attention module. GLA, DeltaNet, Gated DeltaNet and KDA are settings, not classes.

    q, k, v  = projections of x, through a short convolution and SiLU
    q, k     = scaled to length 1 (the delta rule needs it; not GLA)
    gates    = decay and write strength from x (:mod:`rxlm.nn.linear_gates`)
    heads    = the mechanism (:mod:`rxlm.ops.linear_attention`), from the state of the past
    y        = output(norm(heads) * activation(gate(x)))

No positions: order comes from the recurrence, so nothing is rotated. Padding leaves no trace on
either side, neither in the state nor in the convolution.

In both directions (for an encoder): projections, convolution (centred), norm and output are
shared, each direction has gates of its own. The second scan runs over the reversed tokens and
reads *before* its token is written, so that the token itself counts once. It costs a second scan
and a second set of gates, nothing else.

With ``memory_fusion`` KDA becomes MD-GDN: gates and first state depend on a memory, too
(:mod:`rxlm.nn.memory_driven`). Without a memory it is KDA, to the last bit.

Shapes: B batch, T tokens, D width, H query/key heads, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.linear_gates import Gates, TokenGates
from rxlm.nn.linear_settings import FORMS, LinearAttentionSettings
from rxlm.nn.memory_driven import MemoryCondition, MemoryFusion
from rxlm.nn.recurrent_cache import CarriedLayer, RecurrentCache
from rxlm.nn.short_conv import RealTokensFirst, ShortConvolution
from rxlm.nn.turn_layout import TurnLayout
from rxlm.ops import linear_attention as ops

_OPERATIONS: dict[str, Callable[..., ops.LinearAttentionResult]] = {
    "gla": ops.gla,
    "deltanet": ops.deltanet,
    "gated_deltanet": ops.gated_deltanet,
    "kda": ops.kda,
}


class LinearSelfAttention(nn.Module):
    """Self-attention with a state of constant size. State is passed in and returned, never kept."""

    def __init__(self, settings: LinearAttentionSettings) -> None:
        super().__init__()
        self.settings = settings
        dim, value_dim, value_heads = settings.dim, settings.value_dim, settings.value_heads
        key_width, value_width = settings.num_heads * settings.key_dim, value_heads * value_dim
        self._widths = (key_width, key_width, value_width)
        self.query_key_value = nn.Linear(dim, sum(self._widths), bias=False)
        self.gates = self._make_gates()
        if settings.bidirectional:
            self.backward_gates = self._make_gates()
        if settings.conv_size is not None:
            self.short_convolution = ShortConvolution(
                sum(self._widths), settings.conv_size, centred=settings.bidirectional
            )
        self.norm = nn.RMSNorm(value_dim, eps=settings.norm_eps)
        if settings.gated:
            self.output_gate = (
                nn.Sequential(
                    nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, value_width)
                )
                if settings.mechanism == "kda"
                else nn.Linear(dim, value_width, bias=False)
            )
        self.output = nn.Linear(value_width, dim, bias=False)
        if settings.memory_fusion is not None:
            self.memory_fusion = MemoryFusion(
                dim,
                value_heads,
                settings.key_dim,
                value_dim,
                settings.memory_fusion,
                settings.norm_eps,
            )

    @torch.no_grad()
    def initialize_copy_path(self, output_scale: float = 1.0) -> None:
        """Make the state hold tokens as they are, and the output what is read of it.

        Values start as the hidden states (of the first channels if they are narrower, repeated if
        they are wider, so that each head can hold them), the convolution of values as none, the
        output as the mean of those copies times ``output_scale``. As with
        slots (:func:`rxlm.nn.attention.initialize_copy_path`), what was written can then be said
        again from the start, and training finds out early *which* token to look for.

        Args:
            output_scale: factor on the path, usually ``(2 * num_layers) ** -0.5``.
        """
        width, dim = self._widths[-1], self.settings.dim
        copies = torch.eye(dim).repeat(-(-width // dim), 1)[:width]
        self.query_key_value.weight[-width:] = copies
        self.output.weight.copy_(copies.T * (output_scale * min(1.0, dim / width)))
        if self.settings.conv_size is not None:
            of_values = self.short_convolution.weight[-width:]
            of_values.zero_()
            of_values[:, -1] = 1.0

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        memory: MemoryCondition | None = None,
        carried: CarriedLayer | None = None,
    ) -> tuple[Tensor, RecurrentCache | None]:
        """Run over new tokens.

        Args:
            x: ``[B, T, D]``.
            key_mask: ``[B, T]`` bool, True at real tokens, wherever they stand; None = all. The
                others change nothing and yield zeros.
            cache: what was seen before; None for nothing. Unchanged.
            memory: what ``memory_fusion`` read, the same for all tokens of an interaction; None =
                without memory.
            carried: the state of earlier interactions, for the first tokens of a new one (those
                without ``cache``); None = there is none.

        Returns:
            ``[B, T, D]``, and the cache with the new tokens; None in both directions.

        Raises:
            UserError: for a cache or a carried state where attention goes in both directions, a
                carried state or a mask of another shape or type, or a memory that is not read.
        """
        if self.settings.bidirectional and (cache is not None or carried is not None):
            raise UserError(
                "linear attention in both directions has no cache: it sees later tokens, so the "
                "whole sequence is computed at once."
            )
        if key_mask is not None:
            _check_mask(x, key_mask)
        if memory is not None and self.settings.memory_fusion is None:
            raise UserError(
                "this linear attention reads no memory: build it with memory_fusion='add' or "
                "'concat'."
            )
        state = self._first_state(x, memory, carried) if cache is None else cache.state
        if key_mask is None or x.shape[1] == 1:
            return self._attend(x, key_mask, cache, state, memory)
        order = RealTokensFirst(key_mask)
        y, cache = self._attend(order.pack(x), order.key_mask, cache, state, memory)
        return order.unpack(y), cache

    def forward_turns(
        self,
        x: Tensor,
        layout: TurnLayout,
        memory: MemoryCondition | None = None,
        carried: CarriedLayer | None = None,
        backprop_turns: int | None = None,
    ) -> tuple[Tensor, CarriedLayer]:
        """Run KDA or MD-GDN over whole turns of conversations, its state carried from turn to turn.

        The same as :meth:`forward` for one turn after the other, at a fraction of its time: only
        the states are computed in order.

        Args:
            x: ``[B, P, D]``, the tokens in their ``layout``.
            layout: where the turns begin.
            memory: what ``memory_fusion`` read for each of the N * B flat turns; None = without
                memory.
            carried: the state before the first turn; None = there is none.
            backprop_turns: cut the gradient of the state after so many turns; None = never.

        Returns:
            ``[B, P, D]``, and what is carried before each turn and after the last: states
            ``[N + 1, B, HV, K, V]``, started ``[N + 1, B]``.

        Raises:
            UserError: in both directions, for another mechanism or asked for fla, or for shapes
                that do not fit.
        """
        settings = self.settings
        if settings.bidirectional or settings.mechanism != "kda" or settings.backend == "fla":
            raise UserError(
                "turns in their order are read by mechanism 'kda', in one direction, by PyTorch; "
                f"not by {settings.mechanism!r} with bidirectional={settings.bidirectional}, "
                f"backend={settings.backend!r}."
            )
        _check_mask(x, layout.mask)
        self._check_carried(carried, x.shape[0])
        exists = layout.lengths > 0
        before = torch.zeros_like(exists[0]) if carried is None else carried.started
        started = torch.cat((before[None], exists | before)).cummax(dim=0).values
        mixed = self.query_key_value(x)
        if settings.conv_size is not None:
            mixed = self.short_convolution.over_chunks(mixed, layout.begins)
        query, key, value = self._heads(mixed)
        place = layout.place
        offsets = None
        if memory is not None:
            # Chunks are rows here: each reads the memory of its turn.
            rows = x.unflatten(1, (layout.turn.shape[1], -1)).flatten(0, 1)
            of_chunks = memory._replace(offset=memory.offset.index_select(0, place))
            decay, write = self.memory_fusion.gate_offsets(rows, of_chunks)
            offsets = tuple(
                part.expand(-1, rows.shape[1], -1).reshape(*x.shape[:2], -1)
                for part in (decay, write)
            )
        gates = self.gates(x, offsets)
        assert gates.log_decay is not None and gates.write_strength is not None
        keep, added = self._starts(memory, layout, started)
        cut = None
        if backprop_turns is not None:
            cut = layout.begins & (layout.turn % backprop_turns == 0) & (layout.turn > 0)
        heads, states = ops.kda_with_starts(
            query,
            key,
            value,
            gates.log_decay,
            gates.write_strength,
            keep=keep,
            added=added,
            cut=cut,
            initial_state=None if carried is None else carried.state,
            key_mask=layout.mask,
        )
        history = CarriedLayer(layout.states_of_turns(states), started)
        return self._finish(x, heads), history

    def backend(self, x: Tensor, num_tokens: int | None = None) -> ops.BackendChoice:
        """Return which backend computes ``num_tokens`` (default: those of ``x``) and why.

        Args:
            x: hidden states ``[B, T, D]`` as :meth:`forward` gets them.
            num_tokens: T.
        """
        return ops.select_backend(
            self.settings.mechanism,
            backend=self.settings.backend,
            form=self._form(x.shape[1] if num_tokens is None else num_tokens),
            device=x.device,
            dtype=x.dtype,
            key_dim=self.settings.key_dim,
            needs_gradient=torch.is_grad_enabled(),
        )

    def _make_gates(self) -> TokenGates:
        settings = self.settings
        return TokenGates(
            settings.mechanism,
            settings.dim,
            settings.value_heads,
            settings.key_dim,
            settings.value_dim,
            carried=settings.carried,
            write_stretch=settings.write_stretch,
            decay_shrinkage=settings.decay_shrinkage,
        )

    def _form(self, num_tokens: int) -> Literal["chunk", "recurrent", "step"]:
        return "step" if num_tokens == 1 else FORMS[self.settings.mode]

    def _first_state(
        self, x: Tensor, memory: MemoryCondition | None, carried: CarriedLayer | None
    ) -> Tensor | None:
        """Return the state that the first token of an interaction meets; None for zeros."""
        self._check_carried(carried, x.shape[0])
        if memory is None:
            return None if carried is None else carried.state
        return self.memory_fusion.initial_state(
            memory,
            None if carried is None else carried.state,
            None if carried is None else carried.started,
        )

    def _check_carried(self, carried: CarriedLayer | None, batch: int) -> None:
        settings = self.settings
        shape = (batch, settings.value_heads, settings.key_dim, settings.value_dim)
        if carried is None or (carried.state.shape, carried.started.shape) == (shape, shape[:1]):
            return
        raise UserError(
            f"linear attention: carried state {list(carried.state.shape)} of "
            f"{list(carried.started.shape)} rows, expected {list(shape)}."
        )

    def _starts(
        self, memory: MemoryCondition | None, layout: TurnLayout, started: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return factor ``[B, Q, HV]`` and summand of the state before each chunk.

        Args:
            memory: of each flat turn; None leaves the state as it is.
            layout: which chunks begin a turn; nothing happens at the others.
            started: ``[N + 1, B]`` bool, whether there was a turn before.
        """
        settings = self.settings
        chunks = layout.begins.shape
        if memory is None:
            sizes = (settings.value_heads, settings.key_dim, settings.value_dim)
            dtype = _state_dtype(self.norm.weight)
            nothing = self.norm.weight.new_zeros(*chunks, *sizes, dtype=dtype)
            return torch.ones_like(nothing[..., 0, 0]), nothing
        place = layout.place
        keep = memory.keep * started[:-1].flatten().unsqueeze(-1)
        added = (1.0 - keep)[..., None, None] * memory.state
        other = ~layout.begins.unsqueeze(-1)
        keep = keep.index_select(0, place).unflatten(0, chunks).masked_fill(other, 1.0)
        added = added.index_select(0, place).unflatten(0, chunks)
        return keep, added.masked_fill(other[..., None, None], 0.0)

    def _attend(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        cache: RecurrentCache | None,
        state: Tensor | None,
        memory: MemoryCondition | None,
    ) -> tuple[Tensor, RecurrentCache | None]:
        """Do what :meth:`forward` does, for rows whose real tokens come first."""
        query, key, value, recent = self._project(x, key_mask, cache)
        if self.settings.bidirectional:
            heads = self._both_directions(x, query, key, value, key_mask)
            return self._finish(x, heads), None
        offsets = None if memory is None else self.memory_fusion.gate_offsets(x, memory)
        gates = self.gates(x, offsets)
        heads, state = self._operate(query, key, value, gates, key_mask, state)
        return self._finish(x, heads), RecurrentCache(state, recent)

    def _project(
        self, x: Tensor, key_mask: Tensor | None, cache: RecurrentCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys ``[B, T, H, K]``, values ``[B, T, HV, V]``, convolution inputs."""
        mixed = self.query_key_value(x)
        recent = mixed.new_empty(x.shape[0], 0, sum(self._widths))
        if self.settings.conv_size is not None:
            past = None if cache is None else cache.recent
            mixed, recent = self.short_convolution(mixed, key_mask, past)
        return *self._heads(mixed), recent

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut what was projected and convolved into queries, keys and values of the heads."""
        settings = self.settings
        delta_rule = ops.MECHANISMS[settings.mechanism].delta_rule
        if settings.conv_size is None and delta_rule:
            mixed = F.silu(mixed)
        query, key, value = mixed.split(self._widths, dim=-1)
        query = query.unflatten(-1, (settings.num_heads, settings.key_dim))
        key = key.unflatten(-1, (settings.num_heads, settings.key_dim))
        value = value.unflatten(-1, (settings.value_heads, settings.value_dim))
        if delta_rule:
            query, key = ops.l2_normalize(query), ops.l2_normalize(key)
        return query, key, value

    def _operate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Gates,
        key_mask: Tensor | None,
        state: Tensor | None,
    ) -> ops.LinearAttentionResult:
        given: list[Any] = [gate for gate in gates if gate is not None]
        return _OPERATIONS[self.settings.mechanism](
            query,
            key,
            value,
            *given,
            initial_state=state,
            key_mask=key_mask,
            form=self._form(query.shape[1]),
            backend=self.settings.backend,
        )

    def _both_directions(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """Return what each token reads of itself and the past, plus what it reads of the future.

        Both scans run as one batch of 2 B. In the second, the query of token t stands at token
        t + 1, whose state holds exactly the tokens after t; at padding it reads zeros.
        """
        nothing = torch.zeros_like(query[:, :1])
        delayed = torch.cat((nothing, query), dim=1)[:, : query.shape[1]]
        gates = Gates(
            *(
                None if one is None or other is None else torch.cat((one, other.flip(1)))
                for one, other in zip(self.gates(x), self.backward_gates(x), strict=True)
            )
        )
        heads, _ = self._operate(
            torch.cat((query, delayed.flip(1))),
            torch.cat((key, key.flip(1))),
            torch.cat((value, value.flip(1))),
            gates,
            None if key_mask is None else torch.cat((key_mask, key_mask.flip(1))),
            None,
        )
        past, future = heads.chunk(2)
        future = future.flip(1)
        return past + torch.cat((future[:, 1:], torch.zeros_like(future[:, :1])), dim=1)

    def _finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """Norm, gate and output projection: heads ``[B, T, HV, V]`` to ``[B, T, D]``."""
        mixed = self.norm(heads.to(self.norm.weight.dtype)).flatten(-2)
        if self.settings.gated:
            gate = self.output_gate(x)
            # KDA was published with a sigmoid, the others with SiLU.
            gate = gate.sigmoid() if self.settings.mechanism == "kda" else F.silu(gate)
            mixed = mixed * gate
        return self.output(mixed)


def _state_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _check_mask(x: Tensor, key_mask: Tensor) -> None:
    if key_mask.shape != x.shape[:2] or key_mask.dtype != torch.bool:
        raise UserError(
            f"linear attention: key_mask is {key_mask.dtype} {list(key_mask.shape)}, expected "
            f"torch.bool {list(x.shape[:2])}, True where a token is real."
        )
