"""The table of training methods: its verdicts, its page, and variants that are what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmark, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("memory_training")


def result(script: ModuleType, variant: str, seed: int, right: int) -> dict[str, Any]:
    """Return a training after which ``right`` of 100 questions were answered, in every row."""
    rows = [
        {
            "test": test, "condition": condition, "distance": distance, "facts": 4,
            "unseen": "none", "seed": 0, "n": 100, "exact": right / 100, "value": right / 100,
            "stale": 0.0, "declined": 0.0, "chance": 0.02, "history": "reference",
        }
        for test, condition, distance in (
            ("recall", "memory", 1), ("recall", "memory", 2), ("recall", "memory", 4),
            ("recall", "zeroed", 1), ("update", "memory", 1),
        )
    ]  # fmt: skip
    rows += [{**row, "unseen": "pairs"} for row in rows]
    return {
        "variant": variant, "title": script.BY_NAME[variant].title, "seed": seed,
        "budget": script.Budget()._asdict(), "updates": 900, "tokens": 2_000_000,
        "train_accuracy": 0.5, "seconds": 1.0, "recall_seconds": 1.0, "machine": "m",
        "torch": "t", "date": "2026-01-01", "rows": rows,
    }  # fmt: skip


def test_verdicts_need_every_seed(script: ModuleType, tmp_path: Path) -> None:
    """Catches a method that is called better for its mean, and a row that the page lacks."""
    results = [
        result(script, name, seed, right)
        for name, shares in (
            ("recipe", (70, 74, 72)),
            ("cut-1", (80, 75, 90)),
            ("no-probes", (71, 95, 95)),
            ("blunt", (10, 20, 69)),
        )
        for seed, right in enumerate(shares)
    ]
    script.write_report(results, tmp_path, "the command")
    page = (tmp_path / "memory_training.md").read_text(encoding="utf-8")
    verdicts = {
        cells[0].strip(): cells[5].strip()
        for cells in (line.strip().strip("|").split("|") for line in page.splitlines())
        if len(cells) == 6 and cells[0].strip() in script.BY_NAME
    }
    assert verdicts == {
        "recipe": "",
        "cut-1": "helps",
        "no-probes": "no difference beyond the spread",
        "blunt": "hurts",
    }
    assert "72.0 (70.0-74.0)" in page
    assert "the command" in page
    assert len(json.loads((tmp_path / "memory_training.json").read_text())["results"]) == 12
    assert (tmp_path / "memory_training.png").stat().st_size > 1000


def test_variants_change_one_thing_at_one_budget(script: ModuleType) -> None:
    """Catches a variant that trains longer than the others, or is the recipe under another name."""
    budget = script.Budget()
    assert len({script.key_of(item, 0, budget) for item in script.VARIANTS}) == len(script.VARIANTS)
    recipe = script.stage_of(script.AWARE, script.BY_NAME["recipe"], 0, budget).recipe
    for variant in script.VARIANTS:
        changed = script.stage_of(script.AWARE, variant, 0, budget).recipe
        extra = 0 if variant.pretrained else budget.pretraining
        assert changed.train.steps == recipe.train.steps + extra, variant.name
        assert changed.train.lr == recipe.train.lr
        shared = script.key_of(variant, 0, budget, shared=True)
        same = shared == script.key_of(script.BY_NAME["recipe"], 0, budget, shared=True)
        assert same == (not variant.network), variant.name


def test_a_committed_page_is_gone_on_from(script: ModuleType, tmp_path: Path) -> None:
    """Catches results that are made again, or taken over from another recipe or budget."""
    out, work = tmp_path / "out", tmp_path / "work"
    name = f"recipe-s0-{script.key_of(script.BY_NAME['recipe'], 0, script.Budget())}"
    own = {**result(script, "recipe", 0, 70), "name": name}
    foreign = {**result(script, "recipe", 1, 70), "name": "recipe-s1-of-another-recipe"}
    short = {**result(script, "recipe", 2, 70), "budget": script.QUICK._asdict(), "name": "x"}
    script.write_report([own, foreign, short], out, "the command")
    words = ["--report", "--out", str(out), "--work", str(work)]
    assert script.main(words) == 0
    assert [path.name for path in (work / "results").iterdir()] == [f"{name}.json"]
    assert len(json.loads((out / "memory_training.json").read_text())["results"]) == 1


def test_a_variant_that_does_not_exist(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of training before a typing mistake is found."""
    words = ["--variants", "nothing", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert script.main(words) == 2
    assert "no variant is called 'nothing'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
