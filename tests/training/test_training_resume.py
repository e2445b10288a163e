"""A run that was stopped and resumed equals one that never stopped, bit by bit."""

from __future__ import annotations

import logging
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rxlm.errors import RunError, UserError
from rxlm.training.checkpoint import find_latest, list_checkpoints
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.rng import (
    capture_random_state,
    derive_seed,
    isolated_random_state,
    restore_random_state,
)
from rxlm.training.run_folder import read_status

# Cadences that share no factor with the step of the interruption, accumulation with dropout, and
# validation that draws random numbers: everything that could leave a trace.
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "accumulation": 2,
    "log_every": 2,
    "validate_every": 2,
    "warmup_steps": 2,
}


def make(toy: ModuleType, **values: Any) -> Any:
    return toy.ToyObjective(**{"accumulation": 2, "growing": True, **values})


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics lines without what depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


def assert_same_run(left: Path, right: Path) -> None:
    """Compare weights, optimizer, random generators and metrics of two finished runs."""
    one, two = find_latest(left), find_latest(right)
    assert one is not None
    assert two is not None
    assert one.name == two.name
    for name in ("model", "train/optimizer", "train/rng"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert (one / "train/rng.json").read_text() == (two / "train/rng.json").read_text()
    assert lines(left) == lines(right)


def interrupt_at(step: int, number: signal.Signals = signal.SIGTERM) -> Any:
    return lambda now: signal.raise_signal(number) if now == step else None


def resumed(toy: ModuleType, **values: Any) -> tuple[Any, list[int]]:
    """Return an objective and the list in which its steps will stand: a run that began anew would
    end like the uninterrupted one, too."""
    objective = make(toy, **values)
    steps: list[int] = []
    objective.on_step = steps.append
    return objective, steps


@pytest.mark.parametrize("prefetch", [0, 3])
def test_six_steps_equal_three_and_three(toy: ModuleType, tmp_path: Path, prefetch: int) -> None:
    """Catches anything that resuming forgets: moments, dropout, data, curriculum, log window."""
    settings = {**SETTINGS, "prefetch": prefetch}
    whole = toy.train(make(toy), tmp_path / "whole", **settings)
    stopped = make(toy)
    stopped.on_step = interrupt_at(2)
    first = toy.train(stopped, tmp_path / "parts", **settings)
    assert (first.status, first.step, first.signal) == ("interrupted", 3, signal.SIGTERM)
    status = read_status(tmp_path / "parts")
    assert status is not None
    assert status.status == "interrupted"
    random.random(), np.random.rand(), torch.rand(1)  # another process, another state
    objective, steps = resumed(toy)
    second = toy.train(objective, tmp_path / "parts", **settings)
    assert steps == [3, 4, 5]
    assert (second.status, second.step, second.signal) == ("complete", 6, None)
    assert second.metrics == whole.metrics
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_costs_only_the_steps_since_the_checkpoint(toy: ModuleType, tmp_path: Path) -> None:
    """Catches metrics lines of steps that are run again, and a resume that is not automatic."""
    toy.train(make(toy), tmp_path / "whole", **SETTINGS)

    def crash(step: int) -> None:
        if step == 4:
            raise MemoryError("as good as a kill")

    crashing = make(toy)
    crashing.on_step = crash
    with pytest.raises(MemoryError):
        toy.train(crashing, tmp_path / "parts", save_every=3, keep_best=0, **SETTINGS)
    # A line of step 4 is there, and the kill came in the middle of another.
    assert [record["step"] for record in lines(tmp_path / "parts")] == [2, 2, 4, 4]
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    objective, steps = resumed(toy)
    toy.train(objective, tmp_path / "parts", save_every=3, keep_best=0, **SETTINGS)
    assert steps == [3, 4, 5]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_validation_and_saving_leave_no_trace(toy: ModuleType, tmp_path: Path) -> None:
    """Catches validation or saving that draws from the generators of training."""
    toy.train(make(toy), tmp_path / "often", steps=6, validate_every=1, save_every=1)
    toy.train(make(toy), tmp_path / "never", steps=6)
    often, never = find_latest(tmp_path / "often"), find_latest(tmp_path / "never")
    assert often is not None
    assert never is not None
    first, second = (load_file(folder / "model.safetensors") for folder in (often, never))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_prefetch_does_not_change_the_batches(toy: ModuleType, tmp_path: Path) -> None:
    """Catches batches built ahead of a curriculum that has moved since."""
    for depth in (0, 1, 4):
        toy.train(make(toy), tmp_path / f"ahead{depth}", **SETTINGS, prefetch=depth)
    assert_same_run(tmp_path / "ahead0", tmp_path / "ahead1")
    assert_same_run(tmp_path / "ahead0", tmp_path / "ahead4")


def test_sigterm_in_another_process(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a run that dies of SIGTERM unsaved, and a state that only works in one process."""
    folder = tmp_path / "parts"
    command = [sys.executable, str(toy.__file__), str(folder), "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "step 3\n":
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    status = read_status(folder)
    assert status is not None
    assert status.status == "interrupted"
    assert status.step >= 4
    (newest,) = list_checkpoints(folder)
    assert newest.step == status.step, "saved when it was stopped"
    settings = {"steps": status.step + 3, "schedule": "constant", "log_every": 2}
    objective, steps = toy.ToyObjective(), []
    objective.on_step = steps.append
    toy.train(objective, folder, **settings)
    assert steps == [status.step, status.step + 1, status.step + 2]
    toy.train(toy.ToyObjective(), tmp_path / "whole", **settings)
    assert_same_run(tmp_path / "whole", folder)


def test_a_second_ctrl_c_stops_at_once(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a run that cannot be stopped by a person in a hurry, or keeps its handlers after."""
    before = signal.getsignal(signal.SIGINT)
    objective = make(toy)

    def twice(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    objective.on_step = twice
    with pytest.raises(KeyboardInterrupt):
        toy.train(objective, tmp_path / "run", **SETTINGS)
    assert signal.getsignal(signal.SIGINT) is before
    objective.on_step = interrupt_at(0, signal.SIGINT)
    assert toy.train(objective, tmp_path / "run", **SETTINGS).signal == signal.SIGINT


def test_a_changed_architecture_is_refused_with_a_diff(toy: ModuleType, tmp_path: Path) -> None:
    """Catches weights loaded into another model, and a refusal that spoils the run folder."""
    stopped = make(toy)
    stopped.on_step = interrupt_at(2)
    toy.train(stopped, tmp_path / "run", **SETTINGS)
    config = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(UserError, match=r"model\.width: 8 -> 16"):
        toy.train(make(toy, width=16), tmp_path / "run", **{**SETTINGS, "lr": 0.5})
    assert (tmp_path / "run/config.yaml").read_text() == config
    assert toy.train(make(toy), tmp_path / "run", **SETTINGS).status == "complete"


def test_changed_settings_are_allowed_and_logged(
    toy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a silent change of the learning rate in the middle of a run."""
    stopped = make(toy)
    stopped.on_step = interrupt_at(2)
    toy.train(stopped, tmp_path / "run", **SETTINGS)
    resumed = make(toy)
    resumed.model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, "rxlm"):
        toy.train(resumed, tmp_path / "run", **{**SETTINGS, "lr": 0.005})
    assert "training settings changed: lr: 0.01 -> 0.005" in caplog.text
    assert "changed since this run began: training.lr: 0.01 -> 0.005" in caplog.text
    assert "no longer ['0.bias', '0.weight']" in caplog.text
    assert "lr: 0.005" in (tmp_path / "run/config.yaml").read_text()


def test_frozen_parameters_do_not_move(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a frozen part that decays or learns."""
    objective = make(toy)
    objective.model[0].requires_grad_(False)
    frozen, moving = (objective.model[index].weight.detach().clone() for index in (0, 3))
    toy.train(objective, tmp_path / "run", **SETTINGS)
    assert torch.equal(objective.model[0].weight, frozen)
    assert not torch.equal(objective.model[3].weight, moving)


def test_a_finished_run_is_left_alone(
    toy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a finished stage that trains again, or forgets its result."""
    first = toy.train(make(toy), tmp_path / "run", **SETTINGS)
    objective = make(toy)
    with caplog.at_level(logging.INFO, "rxlm"):
        again = toy.train(objective, tmp_path / "run", **SETTINGS)
    assert again == first
    assert objective.built == []
    assert "already complete at step 6" in caplog.text
    longer = toy.train(make(toy), tmp_path / "run", **{**SETTINGS, "steps": 8})
    assert (longer.status, longer.step) == ("complete", 8)


def test_a_damaged_checkpoint_is_named(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a traceback, or a silent fresh start, when a checkpoint cannot be read."""
    stopped = make(toy)
    stopped.on_step = interrupt_at(2)
    toy.train(stopped, tmp_path / "run", save_every=1, **SETTINGS)
    newest = list_checkpoints(tmp_path / "run")[-1].path
    (newest / "train/optimizer.safetensors").write_bytes(b"cut off")
    with pytest.raises(RunError, match="Delete this folder to resume from the one before"):
        toy.train(make(toy), tmp_path / "run", **SETTINGS)
    shutil.rmtree(newest)
    assert toy.train(make(toy), tmp_path / "run", **SETTINGS).status == "complete"


def test_random_state_round_trip() -> None:
    """Catches a generator that is not saved, or a block that leaves a trace."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.randn(()))

    np.random.normal()  # leaves a cached second value, which is part of the state
    state = capture_random_state()
    expected = draw()
    restore_random_state(state)
    with isolated_random_state(5):
        inside = draw()
    with isolated_random_state(5):
        assert draw() == inside
    assert draw() == expected


def test_derived_seeds_differ_and_are_stable() -> None:
    """Catches parts that run together (1, 11) = (11, 1), and seeds that depend on the process."""
    seeds = {derive_seed(0, "a", 1, 11), derive_seed(0, "a", 11, 1), derive_seed(1, "a", 1, 11)}
    assert len(seeds) == 3
    assert derive_seed(0, "a", 1) == 8342431607888760756
