"""A conversation as a value: its memory, its randomness, how long it is.

Nothing here computes with a model. Whoever keeps an old value has undone everything since.

Shapes: L layers, B conversations, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.recurrent_cache import CarriedState


@dataclass(frozen=True, eq=False)
class ConversationState:
    """All that B conversations carry from one turn to the next.

    Attributes:
        slots: short-term memory ``[L, B, S, D]``.
        seeds: of each row's random draws.
        draws: tokens each row has chosen so far, i.e. the index of its next draw.
        num_turns: turns that each row's memory holds (a system prompt is not a turn).
        carried: the state that the decoder's MD-GDN layers carry; None: they start afresh, or the
            model has none.
    """

    slots: Tensor
    seeds: tuple[int, ...]
    draws: tuple[int, ...]
    num_turns: tuple[int, ...]
    carried: CarriedState | None = None

    def __post_init__(self) -> None:
        rows = {self.slots.shape[1], len(self.seeds), len(self.draws), len(self.num_turns)}
        if self.carried is not None:
            rows |= {self.carried.states.shape[1], len(self.carried.started)}
        assert len(rows) == 1, "slots, seeds, draws and num_turns describe the same conversations"

    @classmethod
    def start(
        cls, slots: Tensor, seed: int, carried: CarriedState | None = None
    ) -> ConversationState:
        """Return conversations before their first turn; row b draws from stream ``seed + b``."""
        batch_size = slots.shape[1]
        zeros = (0,) * batch_size
        seeds = tuple(seed + row for row in range(batch_size))
        return cls(slots, seeds, zeros, zeros, carried)

    @classmethod
    def stack(cls, states: Sequence[ConversationState]) -> ConversationState:
        """Join conversations of the same model into one batch, in order."""
        if not states:
            raise UserError("no conversations to stack: give at least one state.")
        carried = [state.carried for state in states if state.carried is not None]
        if carried and len(carried) != len(states):
            raise UserError(
                f"{len(carried)} of {len(states)} states hold a carried state: conversations of "
                "different models cannot be stacked."
            )
        return cls(
            torch.cat([state.slots for state in states], dim=1),
            tuple(seed for state in states for seed in state.seeds),
            tuple(draws for state in states for draws in state.draws),
            tuple(turns for state in states for turns in state.num_turns),
            CarriedState(
                torch.cat([item.states for item in carried], dim=1),
                torch.cat([item.started for item in carried]),
            )
            if carried
            else None,
        )

    @property
    def batch_size(self) -> int:
        """Number of conversations B."""
        return len(self.seeds)

    def select(self, rows: Sequence[int]) -> ConversationState:
        """Return the conversations ``rows``, in that order; a row may be repeated."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.slots.device)
        return ConversationState(
            self.slots.index_select(1, index),
            tuple(self.seeds[row] for row in rows),
            tuple(self.draws[row] for row in rows),
            tuple(self.num_turns[row] for row in rows),
            None if self.carried is None else self.carried.select(rows),
        )

    def repeat(self, times: int) -> ConversationState:
        """Return every conversation ``times`` times, copies beside each other."""
        return self.select([row for row in range(self.batch_size) for _ in range(times)])

    def with_rows(self, rows: Sequence[int], others: ConversationState) -> ConversationState:
        """Return this value with its conversations ``rows`` exchanged for those of ``others``.

        The other conversations keep their values bit for bit (on the device and in the dtype of
        ``others``). Row ``rows[i]`` becomes conversation ``i`` of ``others``.
        """
        assert len(rows) == others.batch_size == len(set(rows)), "one conversation for each row"
        source = list(range(self.batch_size))
        for place, row in enumerate(rows):
            source[row] = self.batch_size + place
        here = self.to(others.slots.device, others.slots.dtype)
        return ConversationState.stack([here, others]).select(source)

    def replaced(
        self,
        *,
        slots: Tensor | None = None,
        seeds: tuple[int, ...] | None = None,
        draws: tuple[int, ...] | None = None,
        num_turns: tuple[int, ...] | None = None,
        carried: CarriedState | None = None,
    ) -> ConversationState:
        """Return this value with the given parts exchanged."""
        return replace(
            self,
            slots=self.slots if slots is None else slots,
            seeds=self.seeds if seeds is None else seeds,
            draws=self.draws if draws is None else draws,
            num_turns=self.num_turns if num_turns is None else num_turns,
            carried=self.carried if carried is None else carried,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ConversationState:
        """Return the value on ``device``, the slots in ``dtype``, if given."""
        return self.replaced(
            slots=self.slots.to(device=device, dtype=dtype),
            carried=None if self.carried is None else self.carried.to(device),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the value is made of."""
        return [self.slots, *(() if self.carried is None else self.carried)]

    def detach(self) -> ConversationState:
        """Return the value outside of every autograd graph."""
        carried = None if self.carried is None else self.carried.detach()
        return self.replaced(slots=self.slots.detach(), carried=carried)


def check_slots(
    slots: Tensor,
    shape: tuple[int, int, int],
    what: str = "memory",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ``UserError`` unless ``slots`` is a finite ``[L, B, S, D]`` for a model.

    Args:
        slots: what was given.
        shape: (L, S, D) of the model.
        what: what the message calls it (a file, an argument).
        dtype: of the model's memory; None: any floating-point type will do.
    """
    num_layers, num_slots, dim = shape
    if not isinstance(slots, Tensor):
        raise UserError(
            f"{what}: expected a tensor [{num_layers}, B, {num_slots}, {dim}], got "
            f"{type(slots).__name__}."
        )
    given = tuple(slots.shape)
    if len(given) != 4 or (given[0], *given[2:]) != shape or given[1] < 1:
        raise UserError(
            f"{what} has shape {list(given)}, but this model's is [{num_layers} layers, "
            f"conversations, {num_slots} slots, {dim} wide]: it was made by another model."
        )
    if not slots.is_floating_point():
        raise UserError(f"{what} has dtype {slots.dtype}; expected a floating-point tensor.")
    if dtype is not None and slots.dtype != dtype:
        raise UserError(
            f"{what} has dtype {slots.dtype}, but this model's memory is {dtype}: it was made by "
            f"another model, or this one in another precision; convert it with .to({dtype}) if "
            "that is meant."
        )
    if not bool(torch.isfinite(slots).all()):
        count = int((~torch.isfinite(slots)).sum())
        raise UserError(
            f"{what} has {count} values that are not finite: it is damaged; use an earlier state."
        )


def check_carried(
    carried: CarriedState,
    shape: tuple[int, int, int, int] | None,
    batch_size: int,
    what: str = "carried state",
    check_values: bool = True,
) -> None:
    """Raise ``UserError`` unless ``carried`` fits a model and a number of conversations.

    Args:
        carried: what was given.
        shape: (R, HV, K, V) of the model; None if it carries nothing.
        batch_size: B.
        what: what the message calls it.
        check_values: whether values have to be finite, which takes a look at all of them.
    """
    if shape is None:
        raise UserError(
            f"{what} was given, but this model has no md_gdn layer that carries a state: it was "
            "made by another model."
        )
    expected = [shape[0], batch_size, *shape[1:]]
    given = list(carried.states.shape)
    if given != expected or list(carried.started.shape) != [batch_size]:
        raise UserError(
            f"{what} has states {given} and started {list(carried.started.shape)}, expected "
            f"{expected} and {[batch_size]}: it was made by another model."
        )
    if not carried.states.is_floating_point() or carried.started.dtype != torch.bool:
        raise UserError(
            f"{what} has states of dtype {carried.states.dtype} and started of "
            f"{carried.started.dtype}; expected floating point and torch.bool."
        )
    if check_values and not bool(torch.isfinite(carried.states).all()):
        raise UserError(
            f"{what} has values that are not finite: it is damaged; use an earlier state."
        )
