"""A run that is killed, or whose disk is full, loses nothing that was complete."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from rxlm.errors import RunError
from rxlm.training.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[2]


def test_kills_change_nothing(tmp_path: Path) -> None:
    """Catches whatever a kill of a real run leaves behind or loses, and a fault script that does
    not run (its long form: ``--kills 25``)."""
    command = [sys.executable, str(ROOT / "scripts/fault_test.py"), "--kills", "3", "--steps", "16"]
    result = subprocess.run(
        [*command, "--work", str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED: after 3 kills" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.startswith("| ")]) == 5


def test_a_file_that_is_refused_halfway(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a save that the system itself stops in the middle of a file (no monkeypatch) and
    that leaves half a checkpoint, costs the one before, or passes in silence."""
    settings = {"save_every": 2, "validate_every": None, "log_every": 2}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    objective = toy.ToyObjective(width=8000)

    def limit(step: int) -> None:
        if step == 2:  # smaller than the weights, larger than every other file
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))

    objective.on_step = limit
    try:
        with pytest.raises(RunError, match=r"step-000004.*step-000002 is intact"):
            toy.train(objective, tmp_path / "run", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-000002"]
    toy.train(toy.ToyObjective(width=8000), tmp_path / "run", **settings)
    toy.train(toy.ToyObjective(width=8000), tmp_path / "whole", **settings)
    for name in ("model.safetensors", "train/optimizer.safetensors"):
        one, two = (
            load_file(list_checkpoints(tmp_path / run)[-1].path / name) for run in ("run", "whole")
        )
        assert all(torch.equal(one[key], two[key]) for key in one), name
