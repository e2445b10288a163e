"""``rxlm plot`` and ``rxlm compare`` on real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rxlm.cli.main import main


def test_two_copies_of_a_pipeline_do_not_differ(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a difference found where there is none, costs that are not those of the model, and
    output that is not JSON."""
    copy = tmp_path / "copy"
    shutil.copytree(micro_pipeline, copy)
    page = tmp_path / "page.html"
    names = ("50_memory_aware", "20_joint_lm")
    for name in names:
        words = [str(micro_pipeline / name), str(copy / name)]
        assert main(["compare", *words, "--json"]) == 0
        section = json.loads(capsys.readouterr().out)["stages"][""]
        assert section["identical"]
        costs = section["columns"][0]["costs"]
        assert 0 < costs["non_embedding"] < costs["parameters"]
        assert section["columns"][0]["mfu"] > 0
    assert main(["compare", str(micro_pipeline), str(copy)]) == 0
    out = capsys.readouterr().out
    assert "== 50_memory_aware" in out
    assert out.count("no difference found") == 4
    words = [str(folder / "40_memory_pretraining") for folder in (micro_pipeline, copy)]
    assert main(["compare", *words, "--html", str(page)]) == 0
    assert "data:image/png" in page.read_text(encoding="utf-8")


def test_plot_writes_figures(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a metric that no run measures, and a file of one kind only."""
    run = str(micro_pipeline / "50_memory_aware")
    words = ["plot", run, "--out", str(tmp_path)]
    assert main([*words, "--metric", "memory_gain", "--metric", "loss_by_turn"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    stems = ("memory_gain", "loss_by_turn")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert main([*words, "--metric", "los"]) == 2
    have = capsys.readouterr().err
    for metric in ("loss", "accuracy", "read_entropy", "slot_cosine", "clip_rate", "mfu"):
        assert metric in have


def test_the_report_of_a_pipeline_shows_samples(micro_pipeline: Path) -> None:
    """Catches sample conversations that nobody gets to see."""
    report = json.loads((micro_pipeline / "report.json").read_text(encoding="utf-8"))
    (first, *_) = report["samples"]
    assert first["step"] == 2
    page = (micro_pipeline / "report.html").read_text(encoding="utf-8")
    assert "A conversation at the validation after 2 steps" in page


def test_plot_of_no_run_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a folder that holds something else."""
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err
