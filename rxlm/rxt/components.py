"""The encoder and the decoder of a Reactive Transformer.

What they are *not*: generation, conversation, files. See :mod:`rxlm.rxt.alpha`.

Shapes: B batch, T tokens, P past and present tokens, L layers, S slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.checkpointing import recompute
from rxlm.nn.recurrent_cache import CarriedLayer, CarriedState, RecurrentCache
from rxlm.nn.turn_layout import TurnLayout
from rxlm.ops.attention import visible_keys
from rxlm.ops.rotary import rotary_phases, token_positions
from rxlm.rxt.attention_heads import LINEAR_KINDS, LOCAL_KIND, MEMORY_DRIVEN_KIND
from rxlm.rxt.component_fields import Stack
from rxlm.rxt.component_rules import encoder_problems
from rxlm.rxt.component_saving import StoredComponent
from rxlm.rxt.config import RxTComponentConfig
from rxlm.rxt.conversation import check_carried
from rxlm.rxt.decode_values import DecodeCache, MemoryReading
from rxlm.rxt.freezing import FreezingMethods
from rxlm.rxt.layers import LayerCache, ReactiveLayer

Kept = TypeVar("Kept")


class _Component(StoredComponent, FreezingMethods):
    """Embedding and layer stack that encoder and decoder share.

    Attributes:
        checkpoint_layers: whether training forgets what happens inside a layer and computes it
            again in the backward pass: less memory, more time, the same result.
    """

    CONFIG = RxTComponentConfig
    checkpoint_layers = False

    def __init__(
        self, config: RxTComponentConfig, *, reads_memory: bool, bidirectional: bool = False
    ) -> None:
        super().__init__()
        config.require_supported()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        # Std D**-0.5 fits a tied head; the factor D**0.5 on the input restores unit scale.
        nn.init.normal_(self.embedding.weight, std=config.embed_dim**-0.5)

        def stack(name: Stack, count: int) -> nn.ModuleList:
            reads = reads_memory and name == "memory"
            return nn.ModuleList(
                ReactiveLayer(
                    config, i, reads_memory=reads, bidirectional=bidirectional, stack=name
                )
                for i in range(count)
            )

        self.initial_layers = stack("initial", len(config.stateless_layers_config or ()))
        self.layers = stack("memory", config.num_layers)
        self.final_layers = stack("final", len(config.final_stateless_layers_config or ()))
        # Whether a layer's mask goes over all tokens; local layers make their own.
        kinds = {plan.attention for _, plan in config.layer_plans}
        self._has_keys = bool(kinds - {*LINEAR_KINDS, LOCAL_KIND})

    @property
    def all_layers(self) -> tuple[ReactiveLayer, ...]:
        """Every layer in the order in which they run; those with a memory are ``layers``."""
        stacks = (self.initial_layers, self.layers, self.final_layers)
        return tuple(cast(ReactiveLayer, layer) for stack in stacks for layer in stack)

    def load_shared_embedding(self, embedding: nn.Embedding) -> None:
        """Use ``embedding`` (the same object) in place of the own one."""
        self.embedding = embedding

    def _run(
        self, layer: Callable[..., tuple[Tensor, Kept]], x: Tensor, **inputs: Any
    ) -> tuple[Tensor, Kept]:
        """Run a :class:`ReactiveLayer`, or a method of one, checkpointed if so set."""
        if self.checkpoint_layers and self.training:
            return recompute(layer, x, **inputs)
        return layer(x, **inputs)

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the first layer gets: ``[B, T]`` to ``[B, T, D]``."""
        return self.embedding(ids) * self.config.embed_dim**0.5

    def _phases(self, positions: Tensor) -> Tensor | None:
        if self.config.use_nope:
            return None
        return rotary_phases(positions, self.config.head_dim_resolved, self.config.rope_base)


class RxTEncoder(_Component):
    """Bidirectional reader of a finished turn."""

    KIND = "RxTEncoder"

    def __init__(self, config: RxTComponentConfig | dict[str, Any]) -> None:
        config = RxTComponentConfig.parse(config)
        problems = encoder_problems(config)
        if problems:
            raise UserError("\n".join(problems))
        super().__init__(config, reads_memory=False, bidirectional=True)

    def forward(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Encode turns.

        Args:
            ids: token ids ``[B, T]``.
            key_mask: ``[B, T]`` bool, True at real tokens (either padding side); None = all.

        Returns:
            the states after every layer with a memory, ``[L, B, T, D]``; padded positions hold
            finite values that nothing may read.
        """
        length = ids.shape[1]
        mask = (
            visible_keys(key_mask, length, length, causal=False, device=ids.device)
            if self._has_keys
            else None
        )
        phases = self._phases(token_positions(key_mask, length, ids.device))
        x = self.embed(ids)
        states = []
        for layer in self.all_layers:
            x, _ = self._run(layer, x, mask=mask, phases=phases, key_mask=key_mask)
            states.append(x)
        return torch.stack(states[len(self.initial_layers) :])


class RxTDecoder(_Component):
    """Causal writer of an answer that reads one turn and the memory."""

    KIND = "RxTDecoder"

    def __init__(self, config: RxTComponentConfig | dict[str, Any]) -> None:
        config = RxTComponentConfig.parse(config)
        super().__init__(config, reads_memory=not config.skip_memory_cross_attention)
        self.head_norm = (
            (
                nn.RMSNorm(config.embed_dim, eps=config.norm_eps)
                if config.head_norm_type == "rms_norm"
                else nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
            )
            if config.use_head_norm
            else nn.Identity()
        )
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._reads_memory = not config.skip_memory_cross_attention
        # Places among all layers; stateless layers carry nothing.
        self._carrying = tuple(
            index
            for index, (stack, plan) in enumerate(config.layer_plans)
            if stack == "memory" and plan.attention == MEMORY_DRIVEN_KIND
        )
        if not config.tie_embeddings:
            self.head_weight = nn.Parameter(
                torch.randn(config.vocab_size, config.embed_dim) * config.embed_dim**-0.5
            )

    def read_memory(self, slots: Tensor, slot_mask: Tensor | None = None) -> MemoryReading:
        """Project a memory for all layers; reuse the result for every token of the turn.

        Args:
            slots: ``[L, B, S, D]``; S is free (encoder states of earlier turns can be read the
                same way).
            slot_mask: bool ``[B, S]``, which slots exist; None = all.
        """
        if self.config.skip_memory_cross_attention:
            return MemoryReading(())
        readings = tuple(
            cast(ReactiveLayer, layer).read_slots(layer_slots)
            for layer, layer_slots in zip(self.layers, slots, strict=True)
        )
        conditions = tuple(
            cast(ReactiveLayer, layer).condition(layer_slots, slot_mask)
            for layer, layer_slots in zip(self.layers, slots, strict=True)
        )
        mask = None if slot_mask is None else slot_mask[:, None, None, :]
        return MemoryReading(readings, mask, conditions)

    @property
    def carries_state(self) -> bool:
        """Whether linear self-attention carries its state from one turn to the next."""
        return bool(self._carrying)

    @property
    def carried_shape(self) -> tuple[int, int, int, int] | None:
        """(R, HV, K, V) of this decoder's :class:`CarriedState`; None if nothing is carried."""
        if not self._carrying:
            return None
        widths = self.config.linear_head_widths(MEMORY_DRIVEN_KIND)
        heads = self.config.self_head_fields(MEMORY_DRIVEN_KIND).heads
        return len(self._carrying), heads, widths.key, widths.value

    def nothing_carried(self, batch_size: int) -> CarriedState | None:
        """Return what B conversations carry before their first turn; None if never anything."""
        if self.carried_shape is None:
            return None
        num_layers, *sizes = self.carried_shape
        weight = self.embedding.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return CarriedState(
            torch.zeros(num_layers, batch_size, *sizes, dtype=dtype, device=weight.device),
            torch.zeros(batch_size, dtype=torch.bool, device=weight.device),
        )

    def carry(self, cache: DecodeCache, before: CarriedState | None) -> CarriedState | None:
        """Return what is carried into the next turn.

        Args:
            cache: after the whole turn, its last token included.
            before: what was carried into it. Rows without a token keep that.

        Returns:
            None if this decoder carries nothing.
        """
        if not self._carrying:
            return None
        layers = [cast(RecurrentCache, cache.layers[index]).state for index in self._carrying]
        after = CarriedState(torch.stack(layers), torch.ones_like(cache.lengths, dtype=torch.bool))
        if before is None:
            before = cast(CarriedState, self.nothing_carried(cache.lengths.shape[0]))
        return before.where(cache.lengths == 0, after)

    def forward(
        self,
        ids: Tensor,
        key_mask: Tensor | None = None,
        *,
        memory: MemoryReading | None = None,
        cache: DecodeCache | None = None,
        carried: CarriedState | None = None,
    ) -> tuple[Tensor, DecodeCache]:
        """Run the decoder over new tokens of a turn.

        Args:
            ids: new token ids ``[B, T]``.
            key_mask: ``[B, T]`` bool, True at real new tokens (either padding side); None = all.
            memory: from :meth:`read_memory`; None decodes without memory.
            cache: what was decoded of this turn before; None at its start. Unchanged.
            carried: what the turns before left (:meth:`carry`), given at the start of a turn;
                None = there was none.

        Returns:
            hidden states ``[B, T, D]`` (see :meth:`logits`) and the cache with the new tokens.
        """
        given_mask = key_mask
        if key_mask is None:
            key_mask = torch.ones_like(ids, dtype=torch.bool)
        # Positions count real tokens, so padding on either side moves nothing.
        counts = key_mask.long().cumsum(dim=1)
        past_mask, start = key_mask[:, :0], counts.new_zeros(ids.shape[0])
        if cache is not None:
            past_mask, start = cache.key_mask, cache.lengths
        positions = (counts - 1).clamp(min=0) + start[:, None]
        mask, all_keys = None, past_mask
        if self._has_keys:
            all_keys = torch.cat((past_mask, key_mask), dim=1)
            mask = visible_keys(
                all_keys, ids.shape[1], all_keys.shape[1], causal=True, device=ids.device
            )
        phases = self._phases(positions)
        x = self.embed(ids)
        carried_layers = self._carried_layers(carried, ids.shape[0], cache)
        if memory is not None and self._reads_memory and not memory.layers:
            raise UserError(
                "memory is empty, but this decoder reads one: make it with read_memory(slots), or "
                "give None to decode without memory."
            )
        kept: list[LayerCache] = []
        for index, layer in enumerate(self.all_layers):
            x, present = self._run(
                layer,
                x,
                mask=mask,
                phases=phases,
                key_mask=given_mask,
                past=None if cache is None else cache.layers[index],
                carried=carried_layers.get(index),
                **self.reading_of(index, memory),
            )
            kept.append(cast(LayerCache, present))
        lengths = start + counts[:, -1] if ids.shape[1] else start
        return self.head_norm(x), DecodeCache(tuple(kept), all_keys, lengths)

    def forward_turns(
        self,
        ids: Tensor,
        layout: TurnLayout,
        *,
        memory: MemoryReading | None = None,
        carried: CarriedState | None = None,
        backprop_turns: int | None = None,
    ) -> tuple[Tensor, CarriedState]:
        """Run a decoder that carries a state over whole turns of conversations, in their order.

        The same as :meth:`forward` and :meth:`carry` turn by turn, but only the carried states are
        computed one after the other.

        Args:
            ids: ``[B, P]``, the tokens in their ``layout``.
            layout: where the N turns begin; one without tokens leaves its conversation as it is.
            memory: what each flat turn ``n * B + b`` reads, from :meth:`read_memory`; None = no
                memory.
            carried: of the B conversations before their first turn here; None = nothing.
            backprop_turns: cut the gradient of the carried state after so many turns; None =
                never.

        Returns:
            hidden states ``[B, P, D]``, and what is carried before each turn and after the last,
            states ``[R, (N + 1) * B, HV, K, V]`` with flat index ``m * B + b`` after m turns.
        """
        all_layers = self.all_layers
        if len(self._carrying) < len(all_layers):
            turn_mask = layout.turn_mask
            length, device = layout.longest, ids.device
            mask = visible_keys(turn_mask, length, length, causal=True, device=device)
            turn_phases = self._phases(token_positions(turn_mask, length, device))
        phases = self._phases(layout.position)
        carried_layers = self._carried_layers(carried, ids.shape[0], None)
        x = self.embed(ids)
        histories: list[CarriedLayer] = []
        for index, layer in enumerate(all_layers):
            reading = self.reading_of(index, memory)
            if index in self._carrying:
                x, history = self._run(
                    layer.forward_turns,
                    x,
                    layout=layout,
                    phases=phases,
                    carried=carried_layers.get(index),
                    backprop_turns=backprop_turns,
                    **reading,
                )
                histories.append(history)
            else:
                # Other layers know one turn only: as a padded batch of turns.
                turns, _ = self._run(
                    layer,
                    layout.unpack(x),
                    mask=mask,
                    phases=turn_phases,
                    key_mask=turn_mask,
                    **reading,
                )
                x = layout.pack(turns)
        return self.head_norm(x), CarriedState(
            torch.stack([history.state.flatten(0, 1) for history in histories]),
            histories[0].started.flatten(),
        )

    @torch.no_grad()
    def slot_weights(
        self,
        ids: Tensor,
        *,
        memory: MemoryReading,
        carried: CarriedState | None = None,
    ) -> Tensor:
        """Return which slots each token of whole turns of one length reads; for people to look at.

        Nothing is kept in the model: each layer's weights are computed anew from what it gets.

        Args:
            ids: ``[B, T]``, from [BOS] on, without padding.
            memory: from :meth:`read_memory`.
            carried: as for :meth:`forward`.

        Returns:
            ``[L, B, T, S]``, the mean over heads.

        Raises:
            UserError: if this decoder reads its memory in another way than by attention.
        """
        if not self._reads_memory:
            raise UserError(
                "this decoder has no memory cross-attention (skip_memory_cross_attention), so no "
                "token reads slots with weights."
            )
        length, device = ids.shape[1], ids.device
        mask = (
            visible_keys(None, length, length, causal=True, device=device)
            if self._has_keys
            else None
        )
        phases = self._phases(token_positions(None, length, device))
        carried_layers = self._carried_layers(carried, ids.shape[0], None)
        x = self.embed(ids)
        weights = []
        for index, layer in enumerate(self.all_layers):
            inputs: dict[str, Any] = {
                "mask": mask,
                "phases": phases,
                "carried": carried_layers.get(index),
                **self.reading_of(index, memory),
            }
            if "memory" in inputs:
                weights.append(layer.slot_weights(x, **inputs).mean(dim=1))
            x, _ = layer(x, **inputs)
        return torch.stack(weights)

    def reading_of(self, index: int, memory: MemoryReading | None) -> dict[str, Any]:
        """Return what the layer at ``index`` of all reads of a memory: nothing, if stateless."""
        place = index - len(self.initial_layers)
        if memory is None or not memory.layers or not 0 <= place < len(self.layers):
            return {}
        return {
            "memory": memory.layers[place],
            "memory_mask": memory.mask,
            "condition": memory.conditions[place] if memory.conditions else None,
        }

    def _carried_layers(
        self, carried: CarriedState | None, batch_size: int, cache: DecodeCache | None
    ) -> dict[int, CarriedLayer]:
        """Return what each carrying layer starts from, by its index."""
        if carried is None:
            return {}
        if cache is not None:
            raise UserError(
                "carried and cache were both given: a carried state is where a turn starts, the "
                "cache is of a turn that has started. Give carried with its first tokens only."
            )
        check_carried(carried, self.carried_shape, batch_size, "carried", check_values=False)
        return {index: carried.layer(place) for place, index in enumerate(self._carrying)}

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary: ``[..., D]`` to ``[..., V]``."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.head_weight
        if self.head_bias is not None and hidden.shape[:-1].numel() == 1:
            # On CPUs the product of one row with a bias takes two to three times as long.
            return nn.functional.linear(hidden, weight) + self.head_bias
        return nn.functional.linear(hidden, weight, self.head_bias)
