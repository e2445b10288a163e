"""Random generators: seeds derived from names, and the global generators saved and put back.

The global generators serve dropout. Data never uses them: batches are pure functions of a seed
and a position.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """State of all global generators: Python, NumPy, torch on the CPU and on every CUDA device."""

    tensors: dict[str, Tensor]
    """``torch_cpu`` and ``torch_cuda_<i>``, uint8."""
    values: dict[str, Any]
    """``python`` and ``numpy``, JSON values."""


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for a purpose, e.g. ``derive_seed(seed, "noise", step, micro_step)``.

    Different parts give independent seeds; the same parts give the same seed on every machine.
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive_generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def process_seed(seed: int, rank: int, *parts: int | str) -> int:
    """Return the seed of a process's own global generators; process 0 uses the run's seed."""
    return derive_seed(seed, "process", rank, *parts) if rank or parts else seed


def seed_everything(seed: int) -> None:
    """Seed all global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_random_state() -> RandomState:
    """Return the state of all global generators."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"torch_cuda_{index}"] = state
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return RandomState(
        tensors,
        {
            "python": [version, list(words), gauss],
            "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        },
    )


def restore_random_state(state: RandomState) -> None:
    """Put all global generators into ``state``; devices that are gone are left alone."""
    version, words, gauss = state.values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state.values["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state.tensors["torch_cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        saved = state.tensors.get(f"torch_cuda_{index}")
        if saved is not None:
            torch.cuda.set_rng_state(saved, index)


@contextlib.contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Run a block whose random draws leave no trace.

    Args:
        seed: seed of all global generators inside the block; ``None`` keeps their state.
    """
    before = capture_random_state()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        restore_random_state(before)
