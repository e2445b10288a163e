"""The memory estimate of a dry run against the memory that a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rxlm.training.distributed.strategy import Strategy, put_on_device
from rxlm.training.held_bytes import HeldBytes, peak_of
from rxlm.training.objective import Objective
from rxlm.training.objectives.curriculum import Curriculum, Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.settings import TrainSettings
from rxlm.training.step_estimate import estimate_step
from rxlm.training.update import run_update

SCRIPT = Path(__file__).with_name("step_memory.py")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux: peak resident memory"
)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("mha", "none", "1"), marks=pytest.mark.slow),
        ("gated_deltanet", "none", "1"),
        ("mha", "layers", "2"),
    ],
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_a_measured_peak_is_that_of_an_update(toy: ModuleType, precision: str) -> None:
    """Catches masters that are forgotten, and a pass that is not the one that trains: a whole
    micro-batch gives the bytes of an update exactly."""
    settings, device = TrainSettings(steps=2, precision=precision), torch.device("cpu")
    estimate = estimate_step(toy.ToyObjective(width=64), settings, device)
    assert estimate.share == 1
    objective = toy.ToyObjective(width=64)
    optimizer, masters = put_on_device(objective, settings, device)
    strategy = Strategy(objective, optimizer, settings, device, masters=masters)
    batch = objective.batch(0, 0)
    run_update(strategy, [batch], 0, device)
    kept = [*objective.model.parameters()]
    kept += [part for values in optimizer.state.values() for part in values.values()]
    # Weights in bfloat16 have masters of four bytes a number.
    static = sum(item.numel() * item.element_size() for item in kept)
    static += sum(4 * item.numel() for item in kept if item.dtype == torch.bfloat16)
    strategy.begin_update([])

    def compute() -> None:
        strategy.compute(batch, 0, is_last=True)

    passes = peak_of(compute, device)
    step = peak_of(strategy.step, device)
    gradients = sum(4 * item.numel() for item in strategy.gradients().values())
    assert estimate.peak_bytes == static + max(passes, gradients + step)


def test_phases_are_entered_one_after_the_other() -> None:
    """Catches a curriculum that is estimated in its first phase only, and steps that do not add up
    to those of the run."""
    phases = (
        Phase(turns=1, dialogues=2, steps=3),
        Phase(turns=2, dialogues=2, steps=4),
        Phase(turns=3, dialogues=2),
    )
    objective = MemoryAwareObjective.__new__(MemoryAwareObjective)
    objective.settings = MemoryAwareSettings(phases=phases)
    objective.curriculum = Curriculum(phases)
    found = [(steps, objective.curriculum.phase(0)[1].turns) for steps in objective.each_phase(10)]
    assert found == [(3, 1), (4, 2), (3, 3)]
    assert [*objective.each_phase(2)] == [2]
    assert [*Objective.each_phase(objective, 7)] == [7]
