"""The state of one version of a conversation as a file: written whole or not at all, and checked.

    states/<turn id>.safetensors    'slots' [L, 1, S, D]; of a model that carries a state also
                                    'carried' [R, 1, HV, K, V] and 'started' [1]

A file holds numbers of one conversation, no text. Its digest is in the index, so that what is not
what was written is never used. Not here: the index (``store``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rxlm.errors import RunError, UserError
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.rxt.conversation import ConversationState, check_carried, check_slots
from rxlm.serve.interface import StateDamagedError
from rxlm.storage.files import sync_directory

SUFFIX = ".safetensors"
TEMPORARY = ".tmp"


class StateRow(NamedTuple):
    """What the index knows of a state: digest and size of its file, and its counters."""

    sha256: str
    num_bytes: int
    seed: int
    draws: int
    num_turns: int


class StateShape(NamedTuple):
    """What states of a model look like: (L, S, D), and (R, HV, K, V) or None."""

    memory: tuple[int, int, int]
    carried: tuple[int, int, int, int] | None


class StateFiles:
    """The folder of state files."""

    def __init__(self, folder: Path, shape: StateShape) -> None:
        """Use ``folder``, which is made if missing."""
        self.folder, self._shape = folder, shape
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, turn_id: str) -> Path:
        """Return where the state after a turn is."""
        return self.folder / f"{turn_id}{SUFFIX}"

    def write(self, states: Mapping[str, ConversationState]) -> dict[str, StateRow]:
        """Write states by the ids of their turns; after the return they survive a power cut.

        Raises:
            RunError: if the disk refuses; what was written of them is not referred to by anyone.
        """
        rows = {}
        try:
            for turn_id, state in states.items():
                content = _content(state)
                path = self.path(turn_id)
                temporary = path.with_suffix(TEMPORARY)
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                digest = hashlib.sha256(content).hexdigest()
                rows[turn_id] = StateRow(
                    digest, len(content), state.seeds[0], state.draws[0], state.num_turns[0]
                )
            if states:
                # Once for all of them: the index names none before.
                sync_directory(self.folder)
        except OSError as error:
            raise RunError(
                f"could not write a state to {self.folder} ({error}): the turn is not kept; free "
                "some space."
            ) from error
        return rows

    def read(self, turn_id: str, row: StateRow) -> ConversationState:
        """Return a state.

        Raises:
            StateDamagedError: if the file is missing, or not what was written.
        """
        try:
            content = self.path(turn_id).read_bytes()
        except OSError as error:
            raise _damaged(turn_id, f"its file cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise _damaged(turn_id, "its file is not what was written")
        try:
            return self._state(safetensors.torch.load(content), row)
        except (SafetensorError, KeyError, UserError) as error:
            raise _damaged(turn_id, f"its file does not hold one: {error}") from error

    def delete(self, turn_ids: Iterable[str]) -> None:
        """Delete the states after these turns, where they are there."""
        for turn_id in turn_ids:
            self.path(turn_id).unlink(missing_ok=True)

    def sweep(self, known: set[str]) -> int:
        """Delete what a kill left behind: all files but those of ``known`` turns; return how
        many."""
        count = 0
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, TEMPORARY) and (
                path.suffix == TEMPORARY or path.stem not in known
            ):
                path.unlink(missing_ok=True)
                count += 1
        return count

    def _state(self, tensors: Mapping[str, Tensor], row: StateRow) -> ConversationState:
        slots = tensors["slots"]
        check_slots(slots, self._shape.memory, "its memory")
        carried = None
        if self._shape.carried is not None:
            carried = CarriedState(tensors["carried"], tensors["started"])
            check_carried(carried, self._shape.carried, 1, "its carried state")
        return ConversationState(slots, (row.seed,), (row.draws,), (row.num_turns,), carried)


def _content(state: ConversationState) -> bytes:
    assert state.batch_size == 1, "a file holds one conversation"
    tensors = {"slots": state.slots}
    if state.carried is not None:
        tensors |= {"carried": state.carried.states, "started": state.carried.started}
    return safetensors.torch.save(
        {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt", "rxlm": "conversation"},
    )


def is_finite(state: ConversationState) -> list[bool]:
    """Return which of the B conversations hold finite numbers only."""
    finite = torch.isfinite(state.slots).flatten(2).all(dim=2).all(dim=0)
    if state.carried is not None:
        finite = finite & torch.isfinite(state.carried.states).flatten(2).all(dim=2).all(dim=0)
    return [bool(value) for value in finite.tolist()]


def _damaged(turn_id: str, reason: str) -> StateDamagedError:
    return StateDamagedError(
        f"the memory after turn {turn_id} cannot be used: {reason}. Go back to an earlier turn "
        "(undo), or start anew."
    )
