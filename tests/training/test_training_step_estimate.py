"""The memory estimate of a dry run against the memory that a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rxlm.training.held_bytes import HeldBytes

SCRIPT = Path(__file__).with_name("step_memory.py")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux: peak resident memory"
)
@pytest.mark.parametrize(
    "words", [("mha", "none", "1"), ("gated_deltanet", "none", "1"), ("mha", "layers", "2")]
)
def test_estimated_peak_is_the_real_one(words: tuple[str, ...]) -> None:
    """Catches gradients or optimizer state counted twice or not at all, and activations that are
    drawn out wrongly: from a quarter of a batch, within 15 % of the process's peak."""
    # Freed blocks go back to the system at once, so that resident memory is what is held.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["share"] < 0.5
    assert found["real"] > 50e6, "too small: what libraries take would decide"
    assert abs(found["estimated"] / found["real"] - 1) < 0.15, found


def test_held_bytes_follow_storages() -> None:
    """Catches views counted as new, storages that are never given back, and a backward pass that
    is not seen."""
    weight = torch.ones(100, 100, requires_grad=True)
    with HeldBytes() as counter:
        row = weight[3]  # a view of what was there before
        assert counter.held == 0
        product = weight @ weight
        assert counter.held == 40_000
        twice = product.t().reshape(-1) * 2  # a copy, freed at once, and the product of it
        assert counter.held == 80_000
        assert counter.peak == 120_000
        del twice
        assert counter.held == 40_000
        product.backward(torch.ones_like(product))
        assert weight.grad is not None
        del product, row
    assert counter.held == 40_000, "the gradient"
    assert counter.peak >= 120_000
