"""The memory estimate of a dry run against the memory that a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
