"""The loop: bad steps, early stop, best checkpoints, sinks, errors of data and disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rxlm.errors import RunError, UserError
from rxlm.training.checkpoint import find_best, list_checkpoints
from rxlm.training.metrics import read_metrics
from rxlm.training.run_folder import read_status


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [item for item in read_metrics(folder / "metrics.jsonl") if item["kind"] == kind]


def test_training_learns_and_leaves_a_complete_folder(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a loop that runs without learning, and a run folder that lacks a promised file."""
    objective = toy.ToyObjective(batch_size=32, dropout=0.0)
    result = toy.train(objective, tmp_path, steps=60, lr=0.05, validate_every=30, tensorboard=True)
    train = records(tmp_path, "train")
    assert train[-1]["loss"] < 0.5 * train[0]["loss"]
    assert [item["step"] for item in train] == [10, 20, 30, 40, 50, 60]
    assert train[-1]["num_tokens"] == 60 * 32
    assert {"loss", "error", "grad_norm", "lr", "tokens_per_second", "seconds"} <= set(train[0])
    assert result.metrics["train/loss"] == train[-1]["loss"]
    assert result.metrics["validation/loss"] == records(tmp_path, "validation")[-1]["loss"]
    assert result.tokens_per_second > 0
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000060"
    assert (result.checkpoint / "config.json").is_file()
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_log_lines_are_means_over_targets(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a log line that shows the last step only, or weights steps equally."""
    objective = toy.ToyObjective()
    toy.train(objective, tmp_path / "each", log_every=1)
    toy.train(toy.ToyObjective(), tmp_path / "all", log_every=6)
    counts = [int(objective.batch(step, 0)["is_target"].sum()) for step in range(6)]
    losses = [item["loss"] for item in records(tmp_path / "each", "train")]
    assert len(set(counts)) > 1
    (mean,) = (item["loss"] for item in records(tmp_path / "all", "train"))
    expected = sum(map(float.__mul__, losses, map(float, counts))) / sum(counts)
    assert mean == pytest.approx(expected)


def test_bad_steps_are_skipped_and_counted(
    toy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a NaN that reaches the weights, the means or the curriculum."""
    objective = toy.ToyObjective()
    objective.bad_steps = {1, 2, 4}
    seen: list[int] = []
    objective.on_step = seen.append
    result = toy.train(objective, tmp_path, steps=6, max_bad_steps=2, log_every=3)
    assert result.status == "complete"
    assert seen == [0, 3, 5]
    train = records(tmp_path, "train")
    assert [item["num_skipped"] for item in train] == [2, 3]
    assert all(isinstance(item["loss"], float) for item in train)
    assert "step 2: skipped, the loss is nan" in caplog.text


def test_too_many_bad_steps_end_the_run(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a diverged run that goes on for hours, or an error that does not say what to do."""
    objective = toy.ToyObjective()
    objective.bad_steps = {3, 4, 5}
    with pytest.raises(RunError) as error:
        toy.train(objective, tmp_path, steps=20, save_every=2, max_bad_steps=2)
    for part in ("step 6", "the loss is nan", "max_bad_steps=2", "Lower lr", "step-000004"):
        assert part in str(error.value)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.status, status.step) == ("failed", 6)


def test_early_stop_counts_validations(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a patience that is off by one, and NaN taken for an improvement."""
    objective = toy.ToyObjective()
    objective.scores = [3.0, 2.0, float("nan"), 2.0, 2.5, 1.0]
    result = toy.train(objective, tmp_path, steps=50, validate_every=2, early_stop_patience=3)
    assert (result.status, result.step) == ("early_stopped", 10)
    assert find_best(tmp_path) == tmp_path / "checkpoints" / "step-000004"
    losses = [item["loss"] for item in records(tmp_path, "validation")]
    assert losses == [3.0, 2.0, None, 2.0, 2.5]
    again = toy.train(
        toy.ToyObjective(), tmp_path, steps=50, validate_every=2, early_stop_patience=3
    )
    assert (again.status, again.step) == ("early_stopped", 10)


def test_early_stop_at_a_goal(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a goal that is missed by one validation, and one that counts as another's end."""
    options = {"steps": 50, "validate_every": 2, "early_stop_at": 2.0}
    objective = toy.ToyObjective()
    objective.scores = [3.0, 2.0, 1.0, 0.5]
    result = toy.train(objective, tmp_path, **options)
    assert (result.status, result.step) == ("early_stopped", 4)
    assert toy.train(toy.ToyObjective(), tmp_path, **options).step == 4
    further = toy.ToyObjective()
    further.scores = [1.0, 0.5]
    result = toy.train(further, tmp_path, **{**options, "early_stop_at": 0.5})
    assert (result.status, result.step) == ("early_stopped", 8)


def test_improvements_are_saved_and_kept(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a best result that no checkpoint holds, because it fell between two saves."""
    objective = toy.ToyObjective()
    objective.scores = [0.1, 0.9, 0.5, 0.9, 0.2]
    toy.train(
        objective,
        tmp_path,
        steps=5,
        validate_every=1,
        save_every=4,
        keep_last=1,
        best_mode="max",
    )
    assert [item.step for item in list_checkpoints(tmp_path)] == [2, 5]
    assert find_best(tmp_path) == tmp_path / "checkpoints" / "step-000002"


def test_an_unknown_best_metric_is_a_user_error(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a best_metric that is silently never found."""
    with pytest.raises(UserError, match=r"best_metric='accuracy'.*measures loss"):
        toy.train(toy.ToyObjective(), tmp_path, validate_every=1, best_metric="accuracy")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_data_surface(toy: ModuleType, tmp_path: Path, prefetch: int) -> None:
    """Catches an error in the background thread that hangs the run or is lost."""
    objective = toy.ToyObjective()
    build = objective.batch

    def failing(step: int, micro_step: int) -> Any:
        if step == 3:
            raise UserError("line 7 of the data is damaged")
        return build(step, micro_step)

    objective.batch = failing
    steps: list[int] = []
    objective.on_step = steps.append
    with pytest.raises(UserError, match="line 7"):
        toy.train(objective, tmp_path, prefetch=prefetch)
    assert steps == [0, 1, 2]


def test_nothing_is_built_beyond_the_last_step(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a prefetch past the end, and a batch built twice without need."""
    objective = toy.ToyObjective(accumulation=2)
    toy.train(objective, tmp_path, steps=3, accumulation=2, prefetch=4)
    assert objective.built == [(step, micro) for step in range(3) for micro in range(2)]


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, or a lost older checkpoint, when the disk fills up during a save."""
    real = toy.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(toy, "save_file", full)
    with pytest.raises(RunError, match=r"step-000004.*No space left.*step-000002 is intact"):
        toy.train(toy.ToyObjective(), tmp_path, save_every=2)
    monkeypatch.undo()
    assert toy.train(toy.ToyObjective(), tmp_path, save_every=2).status == "complete"


def test_modes_are_right_in_training_and_validation(toy: ModuleType, tmp_path: Path) -> None:
    """Catches dropout in validation, gradients in validation, and training without dropout."""
    objective = toy.ToyObjective()
    modes: list[tuple[bool, bool]] = []
    objective.model.register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    # Counting operations is one more forward pass, in evaluation mode.
    toy.train(objective, tmp_path, steps=2, validate_every=1, watch={"mfu": False})
    assert modes == [(True, True), (False, False), (True, True), (False, False)]


def test_the_number_of_threads_is_put_back(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a run that changes the threads of everything after it."""
    before = torch.get_num_threads()
    seen: list[int] = []
    objective = toy.ToyObjective()
    objective.on_step = lambda step: seen.append(torch.get_num_threads())
    toy.train(objective, tmp_path, steps=1, threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
