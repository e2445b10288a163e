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
    doing: str, batches: Sequence[Any], settings: TrainSettings, checkpoint: Path | None
) -> Iterator[None]:
    """Turn running out of memory inside the block into one message.

    Args:
        doing: such as ``step 12``.
        batches: the micro-batches that were being computed; empty: not known.
        settings: of the run.
        checkpoint: the newest one; nothing inside the block may touch it.

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
        raise RunError(
            f"{doing}{what}: out of memory. {_remedy(settings)} Then start the same command again: "
            f"it will resume from {where_to_resume(checkpoint)}. (The allocator said: {said})"
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


def _remedy(settings: TrainSettings) -> str:
    advice = [
        "halve the batch (objective.dialogues, objective.batch_size, or dialogues of the phase) "
        f"and double train.accumulation (now {settings.accumulation}), which leaves the update "
        "as it is"
    ]
    if settings.gradient_checkpointing in ("none", "turns"):
        better = "layers" if settings.gradient_checkpointing == "none" else "both"
        advice.append(
            f"set train.gradient_checkpointing={better} (now {settings.gradient_checkpointing})"
        )
    if settings.precision == "fp32":
        advice.append("set train.precision=bf16 (now fp32)")
    advice.append("take fewer turns or a shorter seq_len")
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
