"""Comparing runs: what is read, what counts as a difference, and what is said of fairness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rxlm.errors import UserError
from rxlm.training.comparison.compare import compare
from rxlm.training.comparison.curves import better, curves_of
from rxlm.training.comparison.effect import effect, student_quantile
from rxlm.training.comparison.page import html_page
from rxlm.training.comparison.plots import draw_metrics, figure_names, series_of, write_figures
from rxlm.training.comparison.runs import by_stage, read_target, read_targets
from rxlm.training.comparison.tables import section_tables


def make_run(
    folder: Path,
    kind: str = "kda",
    seed: int = 0,
    losses: tuple[float, ...] = (3.0, 2.0),
    **changes: Any,
) -> Path:
    """Write a run folder as the Trainer does."""
    folder.mkdir(parents=True)
    status = {"stage": "lm", "status": "complete", "step": 10 * len(losses)}
    (folder / "run.json").write_text(json.dumps({**status, **changes.pop("status", {})}))
    config = {"stage": "lm", "model": {"mixer": kind}, "train": {"seed": seed, "steps": 20}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes.pop("config", {})}))
    environment = {"device": "cpu", "num_threads": 1, "rxlm": "1", **changes}
    (folder / "env.json").write_text(json.dumps(environment))
    lines = []
    for number, loss in enumerate(losses, start=1):
        speed = {"seconds": 60.0 * number, "tokens_per_second": 5.0 + number}
        step = {"step": 10 * number, "loss": loss + 0.5, "num_tokens": 300 * number}
        lines.append({"kind": "train", **step, **speed})
        lines.append({"kind": "validation", "step": 10 * number, "loss": loss, "loss_turn_1": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_same_seed_same_run_is_no_difference(tmp_path: Path) -> None:
    """Catches timing that counts as a difference between two runs of one recipe."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    text = (b / "metrics.jsonl").read_text().replace('"seconds": 60.0', '"seconds": 61.5')
    (b / "metrics.jsonl").write_text(text)
    section = compare([a, b])["stages"][""]
    assert section["identical"]
    assert section["config"] == []
    assert "no difference found" in section["verdict"][0]
    assert all(row["effects"][0]["difference"] == 0 for row in section["metrics"])


def test_one_changed_value_is_found(tmp_path: Path) -> None:
    """Catches a comparison of last lines only, and a verdict from a single seed."""
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", kind="gated_deltanet", losses=(3.5, 2.0))
    section = compare([a, b])["stages"][""]
    assert not section["identical"]
    values = {"setting": "model.mixer", "values": ["kda", "gated_deltanet"]}
    assert section["config"] == [values]
    assert "a single seed" in section["verdict"][0]
    assert any("single seed" in note for note in section["notes"])


def test_seeds_of_a_recipe_make_a_column(tmp_path: Path) -> None:
    """Catches seeds that count as settings, repeated runs that count twice, and a wrong effect."""
    folders = [
        make_run(tmp_path / f"{kind}-{seed}", kind, seed, (3.0, last))
        for kind, lasts in (("kda", (2.0, 2.1, 2.2)), ("gated_deltanet", (1.0, 1.2, 1.1)))
        for seed, last in enumerate(lasts)
    ]
    folders.append(make_run(tmp_path / "again", "kda", 0, (3.0, 2.0)))
    section = compare(folders)["stages"][""]
    assert [len(column["runs"]) for column in section["columns"]] == [4, 3]
    row = next(item for item in section["metrics"] if item["metric"] == "loss")
    assert row["kind"] == "validation"
    assert row["columns"][0]["final"] == [2.0, 2.1, 2.2]
    assert row["columns"][1]["best"] == {"value": 1.0, "step": 20}
    found = row["effects"][0]
    assert found["difference"] == pytest.approx(-1.0)
    # Equal spreads of 0.1: d = -10, corrected by 1 - 3 / 15.
    assert found["hedges_g"] == pytest.approx(-8.0)
    assert found["verdict"] == "differs"
    assert "loss is better" in section["verdict"][0]
    assert any("count once" in note for note in section["notes"])


def test_effect_is_that_of_the_textbook() -> None:
    """Catches a wrong number of degrees of freedom or a wrong quantile (tables of Student's t;
    Welch's example of two samples with 4 and 9 degrees)."""
    for freedom, expected in ((1, 12.706), (2, 4.303), (10, 2.228), (1000, 1.962)):
        assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=6e-4)
    found = effect([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    half = 2.776445 * math.sqrt(2 / 3)
    assert (found.low, found.high) == pytest.approx((1 - half, 1 + half), abs=1e-4)
    assert found.verdict == "no difference found"
    assert effect([1.0], [1.0]).verdict == "same"
    assert effect([1.0], [2.0]).verdict == "unknown"


def test_unfair_conditions_are_said(tmp_path: Path) -> None:
    """Catches a comparison of speeds of two machines, or of unlike lengths, without a word."""
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", losses=(3.0, 2.0, 1.0), num_threads=8, status={"status": "failed"})
    notes = "\n".join(compare([a, b])["stages"][""]["notes"])
    for word in ("tokens seen differ", "steps differ", "num_threads differ", "not finished"):
        assert word in notes


def test_nothing_in_common_is_no_agreement(tmp_path: Path) -> None:
    """Catches "no difference found" where no validation metric could be compared at all."""
    a = make_run(tmp_path / "a", losses=(3.0, 1.0))
    b, c = (make_run(tmp_path / name, losses=(3.0, 9.0)) for name in "bc")
    for run, name in ((b, None), (c, "accuracy")):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [
            {"kind": "validation", "step": item["step"], name: item["loss"]}
            if item["kind"] == "validation"
            else item
            for item in records
            if name or item["kind"] == "train"
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in kept))
    (verdict,) = compare([a, b])["stages"][""]["verdict"]
    assert "no validation metric in common" in verdict
    assert "loss (only A)" in verdict
    assert "no difference found" not in verdict
    section = compare([a, c])["stages"][""]
    assert "accuracy (only B), loss (only A)" in section["verdict"][0]
    assert any("accuracy (only B)" in note for note in section["notes"])


def test_what_changes_no_result_makes_no_column(tmp_path: Path) -> None:
    """Catches a setting that a stage may be resumed with (it decides no result) but that keeps
    runs of one recipe apart here."""
    folders = []
    for seed, (workers, cache) in enumerate(((1, None), (4, "auto"))):
        train = {"seed": seed, "steps": 20, "prefetch_workers": workers, "prefetch": workers}
        config = {"train": train, "data": {"text": "a.txt", "token_cache": cache}}
        folders.append(make_run(tmp_path / str(seed), config=config))
    changed = make_run(tmp_path / "b", config={"train": {"seed": 0, "steps": 20, "lr": 1.0}})
    section = compare([*folders, changed])["stages"][""]
    assert [len(column["runs"]) for column in section["columns"]] == [2, 1]
    settings = [item["setting"] for item in compare(folders)["stages"][""]["config"]]
    assert settings == ["train.seed"]


def test_validation_points_get_tokens_and_time(tmp_path: Path) -> None:
    """Catches validations drawn at time zero, and interpolation in the wrong interval."""
    records = [
        {"kind": "train", "step": 10, "num_tokens": 100, "seconds": 60.0, "loss": 1.0},
        {"kind": "validation", "step": 15, "loss": 2.0, "bad": None},
        {"kind": "train", "step": 20, "num_tokens": 300, "seconds": 180.0, "loss": 1.0},
        {"kind": "validation", "step": 25, "loss": 2.0},
    ]
    points = curves_of(records)["validation", "loss"]
    assert points[0] == (15, 200, 2.0, 2.0)
    assert points[1] == (25, 300, 3.0, 2.0)
    assert ("validation", "bad") not in curves_of(records)
    goals = [better(name) for name in ("loss", "lm_loss", "accuracy_recall", "lr", "loss_zeroed")]
    assert goals == ["min", "min", "max", None, None]


def test_figures_and_page_hold_every_run(tmp_path: Path) -> None:
    """Catches a figure without one of the runs, and a page that needs the network."""
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "gated_deltanet", 0, (3.0, 1.0))]
    stages = by_stage(read_targets(paths))
    series = series_of(stages[""], by_recipe=True)
    assert {"loss", "loss_by_turn", "tokens_per_second"} <= set(figure_names(series))
    figures = draw_metrics(series, ["loss", "loss_by_turn"])
    assert figures.keys() == {"loss", "loss_by_turn"}
    labels = [line.get_label() for line in figures["loss"].axes[0].get_lines()]
    assert len(labels) == 4
    assert labels[0].startswith("A: ") and labels[2].startswith("B: ")
    files = write_figures({"loss": figures["loss"]}, tmp_path / "out")
    assert [path.suffix for path in files] == [".png", ".svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    comparison = compare(paths)
    page = html_page(comparison, {"": {"loss": files[0].read_bytes()}}, stages)
    assert "data:image/png" in page
    assert "http" not in page
    assert "gated_deltanet" in page
    titles = [table.title for table in section_tables(comparison["stages"][""])]
    assert titles == ["Runs", "Model and speed", "What differs in the recipes", "Metrics"]


def test_pipelines_are_compared_stage_by_stage(tmp_path: Path) -> None:
    """Catches a pipeline of which only one stage is seen, and a tokenizer without metrics."""
    for name in ("p", "q"):
        make_run(tmp_path / name / "20_lm")
        make_run(tmp_path / name / "30_lm")
        make_run(tmp_path / name / "10_tokenizer", losses=())
    make_run(tmp_path / "q" / "40_lm")
    stages = compare([tmp_path / "p", tmp_path / "q"])["stages"]
    assert list(stages) == ["20_lm", "30_lm"]


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    """Catches a traceback, or an empty comparison, for input that cannot be used."""
    run = make_run(tmp_path / "run")
    make_run(tmp_path / "pipeline" / "20_lm")
    sft = make_run(tmp_path / "sft", status={"stage": "sft"})
    (tmp_path / "empty").mkdir()
    silent = make_run(tmp_path / "silent", losses=())
    for path, word in (
        (tmp_path / "nothing", "does not exist"),
        (run / "run.json", "is a file"),
        (tmp_path / "empty", "holds no run"),
        (silent, "without metrics"),
    ):
        with pytest.raises(UserError, match=word):
            read_target(path)
    for paths, word in (
        ([run], "two or more"),
        ([run, run], "named twice"),
        ([run, tmp_path / "pipeline"], "is a pipeline"),
        ([run, sft], "different stages"),
    ):
        with pytest.raises(UserError, match=word):
            compare(paths)
