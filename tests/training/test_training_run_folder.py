"""The run folder, the metrics file, and what a person sees of progress."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rxlm.errors import RunError, UserError
from rxlm.training.metrics import MetricSinks, MetricWindow, read_metrics, truncate_metrics
from rxlm.training.progress import StepClock, format_duration, open_progress
from rxlm.training.recipe import load_mapping
from rxlm.training.run_folder import RunFolder, RunStatus, read_status
from rxlm.training.settings import TrainSettings


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    """Catches a run that mixes its files with somebody's documents, or with another stage."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty \(thesis\.txt"):
        RunFolder.open(tmp_path / "docs", "toy", {})
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder.open(tmp_path / "docs/thesis.txt", "toy", {})
    RunFolder.open(tmp_path / "run", "toy", {})
    RunFolder.open(tmp_path / "run", "toy", {})
    with pytest.raises(UserError, match="stage 'toy', not 'other'"):
        RunFolder.open(tmp_path / "run", "other", {})


def test_a_kill_before_the_first_file_does_not_block_the_folder(tmp_path: Path) -> None:
    """Catches a folder that refuses its own run because of a half-written status."""
    (tmp_path / ".tmp-run.json").write_text("{")
    RunFolder.open(tmp_path, "toy", {})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: is damaged"):
        read_status(tmp_path)


def test_the_resolved_config_can_be_trained_again(tmp_path: Path) -> None:
    """Catches a config.yaml that does not read back as what was run."""
    config: dict[str, Any] = {"training": {"lr": 1e-5, "betas": (0.9, 0.95)}, "name": "no"}
    RunFolder.open(tmp_path, "toy", config).write_config()
    values = load_mapping(tmp_path / "config.yaml")
    assert values == {"training": {"lr": 1e-5, "betas": [0.9, 0.95]}, "name": "no"}


@pytest.mark.parametrize(
    ("status", "step", "patience", "finished"),
    [
        ("complete", 10, None, True),
        ("complete", 9, None, False),
        ("early_stopped", 4, 3, True),
        ("early_stopped", 4, 5, False),
        ("interrupted", 10, None, False),
        ("failed", 10, None, False),
    ],
)
def test_what_counts_as_finished(
    status: Any, step: int, patience: int | None, finished: bool
) -> None:
    """Catches a run that cannot be prolonged, or an interrupted one that is taken for done."""
    settings = TrainSettings(steps=10, validate_every=1, early_stop_patience=3)
    run = RunStatus(stage="toy", status=status, step=step, early_stop_patience=patience)
    assert run.is_finished(settings) is finished


def test_metrics_are_valid_json_and_cut_at_the_checkpoint(tmp_path: Path) -> None:
    """Catches NaN in the file, lines after the checkpoint, and a half-written last line."""
    path = tmp_path / "metrics.jsonl"
    sinks = MetricSinks(path, [], 0)
    for step in (1, 2, 3):
        sinks.write("train", step, {"loss": 1.0 / step, "bad": float("nan")})
    sinks.close()
    with path.open("a") as file:
        file.write('{"kind": "tr')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    truncate_metrics(path, 2)
    text = path.read_text()
    assert "NaN" not in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {"kind": "train", "step": 1, "loss": 1.0, "bad": None},
        {"kind": "train", "step": 2, "loss": 0.5, "bad": None},
    ]
    path.write_text('{"kind": "train", "step": 1}\nbroken\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_window_is_a_weighted_mean_that_can_be_carried_over() -> None:
    """Catches an unweighted mean, and a window that loses its first half in a checkpoint."""
    window = MetricWindow()
    window.add({"loss": 1.0}, 3)
    carried = MetricWindow(json.loads(json.dumps(window.sums)))
    carried.add({"loss": 5.0, "rare": 2.0}, 1)
    assert carried.take_means() == {"loss": 2.0, "rare": 2.0}
    assert carried.take_means() == {}


def test_time_left_ignores_the_first_steps_and_has_no_bias() -> None:
    """Catches an estimate spoilt by compilation, or one that begins near zero."""
    times = iter([0.0, 100.0, 200.0, 202.0, 204.0])
    clock = StepClock(num_ignored=2, clock=lambda: next(times))
    assert clock.seconds_left(10) is None
    clock.tick()
    clock.tick()
    assert clock.seconds_left(10) is None
    clock.tick()
    assert clock.seconds_left(10) == pytest.approx(20.0)
    clock.tick()
    assert clock.seconds_left(5) == pytest.approx(10.0)
    assert [format_duration(value) for value in (None, 62, 3723.4)] == ["-:--", "1:02", "1:02:03"]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Catches control characters in a log file, and a terminal flooded with lines."""
    values = {"loss": 1.2345, "lr": 0.001, "tokens_per_second": 1234.0, "seconds": 9.0}
    with caplog.at_level(logging.INFO, "rxlm"):
        for terminal in (False, True):
            stream = io.StringIO()
            console = Console(file=stream, force_terminal=terminal, width=120)
            view = open_progress("toy", 0, 10, console)
            view.advance(5)
            view.report("train", 5, values)
            view.close()
            assert ("toy" in stream.getvalue()) is terminal
            assert ("\x1b[" in stream.getvalue()) is terminal
    assert [record.message for record in caplog.records] == [
        "toy 5/10 (50%) train: loss 1.234, lr 0.001, 1,234 tokens/s, -:-- left"
    ]
    assert "5/10" in stream.getvalue()
    assert "loss 1.234" in stream.getvalue()
