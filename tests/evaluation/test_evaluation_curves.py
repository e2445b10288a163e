"""Learning curves from metrics lines."""

from __future__ import annotations

import itertools

import pytest

from rxlm.evaluation.curves import MAX_POINTS, accuracy_metric, stage_curves


def test_validation_points_get_a_time() -> None:
    """Catches an accuracy-against-minutes curve whose points are at the wrong minute."""
    lines = [
        {"kind": "validation", "step": 0, "loss": 5.0},
        {"kind": "train", "step": 100, "loss": 4.0, "seconds": 60.0, "lr": 1e-3},
        {"kind": "validation", "step": 150, "loss": 3.5, "accuracy_recall": 0.5},
        {"kind": "train", "step": 200, "loss": 3.0, "seconds": 180.0},
        {"kind": "validation", "step": 200, "loss": 2.9, "accuracy": 0.6, "accuracy_recall": 0.7},
        {"kind": "validation", "step": 250, "loss": None},
    ]
    curves = stage_curves(lines)
    assert curves["train"] == [
        {"step": 100, "minutes": 1.0, "loss": 4.0},
        {"step": 200, "minutes": 3.0, "loss": 3.0},
    ]
    minutes = [point["minutes"] for point in curves["validation"]]
    assert minutes == pytest.approx([0.0, 2.0, 3.0, 3.0])
    assert "loss" not in curves["validation"][-1]
    assert accuracy_metric(curves["validation"]) == "accuracy_recall"
    assert accuracy_metric(curves["train"]) is None


def test_long_runs_are_thinned_with_both_ends() -> None:
    """Catches reports of megabytes, and a curve that stops before the last step."""
    lines = [{"kind": "train", "step": n, "loss": 1.0, "seconds": n * 1.0} for n in range(1, 5000)]
    points = stage_curves(lines)["train"]
    assert len(points) == MAX_POINTS
    assert (points[0]["step"], points[-1]["step"]) == (1, 4999)
    assert all(a["step"] < b["step"] for a, b in itertools.pairwise(points))


def test_a_run_without_lines_has_no_points() -> None:
    """Catches a crash on a stage that was skipped or has logged nothing."""
    assert stage_curves([]) == {"train": [], "validation": []}
