"""What a person is told when a step cannot be made: which step, which batch, what to change.

Not here: skipping steps with bad numbers (``update.py`` finds them, ``loop.py`` counts them).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rxlm.errors import RunError
from rxlm.training.objective import MemorySaving
from rxlm.training.settings import TrainSettings

_SAID_BY_ALLOCATORS = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on whatever device.

    CUDA has an error of its own; torch's CPU allocator raises a plain RuntimeError, known by what
    it says.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID_BY_ALLOCATORS.search(str(error)))


@contextlib.contextmanager
def memory_reported(
    doing: str,
    batches: Sequence[Any],
    settings: TrainSettings,
    saving: MemorySaving,
    checkpoint: Path | None,
    first_remedy: str | None = None,
) -> Iterator[None]:
    """Turn running out of memory inside the block into one message.

    Args:
        doing: such as ``step 12``.
        batches: the micro-batches that were being computed; empty: not known.
        settings: of the run.
        saving: which settings of the stage save memory.
        checkpoint: the newest one; nothing inside the block may touch it.
        first_remedy: what helps before all else, such as ``set a=b``.

    Raises:
        RunError: in place of the allocator's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = f" with {describe_batches(batches)}" if batches else ""
        said = str(error).strip().split("\n")[0]
        remedy = _remedy(settings, saving, first_remedy)
        raise RunError(
            f"{doing}{what}: out of memory. {remedy} Then start the same command again: it will "
            f"resume from {where_to_resume(checkpoint)}. (The allocator said: {said})"
        ) from error


def where_to_resume(checkpoint: Path | None) -> str:
    """Return the checkpoint that a failed run resumes from, in words."""
    return "the beginning (there is no checkpoint yet)" if checkpoint is None else str(checkpoint)


def describe_batches(batches: Sequence[Any]) -> str:
    """Return how many micro-batches there are, how many numbers they hold, the largest tensor."""
    tensors = [tensor for batch in batches for tensor in _tensors(batch)]
    count = len(batches)
    text = f"{count} micro-batch{'es' * (count > 1)}"
    if not tensors:
        return text
    largest = max(tensors, key=lambda tensor: tensor.numel())
    kind = str(largest.dtype).removeprefix("torch.")
    numbers = sum(tensor.numel() for tensor in tensors)
    return f"{text} of {numbers:,} numbers in all (largest: {kind} {list(largest.shape)})"


def _remedy(settings: TrainSettings, saving: MemorySaving, first: str | None) -> str:
    advice = [] if first is None else [first]
    advice.append(
        f"halve the batch ({saving.batch}) and double train.accumulation (now "
        f"{settings.accumulation}), which leaves the update as it is"
    )
    now = settings.gradient_checkpointing
    more = saving.checkpointing
    if now in more:
        more = more[more.index(now) + 1 :]
    if more and now != "both":
        advice.append(f"set train.gradient_checkpointing={more[0]} (now {now})")
    if settings.precision == "fp32":
        advice.append("set train.precision=bf16 (now fp32)")
    if saving.lengths is not None:
        advice.append(f"take {saving.lengths}")
    text = "; or ".join(advice)
    return f"{text[0].upper()}{text[1:]}."


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for item in items:
        yield from _tensors(item)
