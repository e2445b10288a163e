"""The page of Micro is written from documents of the suite. Not here: their comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rxlm.errors import UserError
from rxlm.evaluation.suite.findings import finding
from rxlm.training.recipes import read_recipe, recipe_values
from rxlm.training.run_folder import RunStatus

NANO = Path(__file__).resolve().parents[2] / "stages" / "nano"


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The module scripts/suite_page.py."""
    return load_script("suite_page")


def document(share: float, extra: bool) -> dict[str, Any]:
    row = {
        "group": "main", "kind": "recall", "unseen": "pairs", "distance": 4, "facts": 4,
        "together": 1, "control": "M", "seed": 0, "n": 1000, "exact": share, "value": share,
        "stale": 0.0, "declined": 0.0, "chance": 0.02,
    }  # fmt: skip
    found = [
        finding("facts", "four_facts", "4 facts", share, goal=0.99),
        finding("facts", "stale", "old value", 0.005, comparison="<=", goal=0.01),
        finding("facts", "no_goal", "never shown", 0.5),
    ]
    babi = {"findings": [finding("babi", "qa1", "qa1", 0.5, goal=0.95)], "rows": []}
    facts = {"findings": found, "rows": [row, {**row, "control": "Z", "exact": 0.0}]}
    return {
        "schema": "rxlm-suite/1",
        "model": {"num_parameters": 1_400_000},
        "environment": {"num_cpus": 2, "torch": "2"},
        "settings": {"seeds": [0, 1, 2], "max_answer_tokens": 24, "facts": {}, "babi": {}},
        "tests": {"facts": facts} | ({"babi": babi} if extra else {}),
    }


def run_folder(path: Path, steps: dict[str, int]) -> None:
    """Write the folder of a pipeline of nano, whose stages ended at these steps."""
    for name, step in steps.items():
        stage = path / name
        stage.mkdir(parents=True)
        recipe = recipe_values(read_recipe(NANO / f"{name}.yaml").recipe)
        (stage / "config.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        status = RunStatus(stage=recipe["stage"], status="complete", step=step, seconds=600.0)
        (stage / "run.json").write_text(status.model_dump_json(), encoding="utf-8")
    text = json.dumps(document(0.5, extra=True))
    (path / "suite.json").write_text(text, encoding="utf-8")


def test_files(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """Catches a page or block that is not written, and a run without a document that is no clear
    error."""
    steps = {"10_tokenizer": 1, "40_memory_pretraining": 300, "50_memory_aware": 2500}
    for name in ("micro-mha", "micro-kda"):
        run_folder(tmp_path / name, steps)
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- micro:begin -->\nold\n<!-- micro:end -->\n", encoding="utf-8")
    runs = [str(tmp_path / name) for name in ("micro-mha", "micro-kda")]
    files = ["--page", str(tmp_path / "micro.md"), "--readme", str(readme), "--paused", "kda=5"]
    assert script.main([*runs, *files]) == 0
    page = (tmp_path / "micro.md").read_text("utf-8")
    assert "| parameters | 1,400,000 | 1,400,000 |" in page
    assert "50\\_memory\\_aware: updates, learning rate | 2,500 of 6,500, 0.0015 |" in page
    assert "| minutes of training steps | 30 | 25 |" in page
    assert "kda was stopped after 2,500 of 6,500 updates of 50_memory_aware" in readme.read_text(
        "utf-8"
    )
    assert "1.40 million" in readme.read_text("utf-8") and "old\n" not in readme.read_text("utf-8")
    assert "kda was suspended for 5 minutes" in page and "mha was suspended" not in page
    assert script.main([*runs, "--paused", "gla=5"]) == 2
    assert "expected NAME=MINUTES" in capsys.readouterr().err
    (tmp_path / "micro-kda" / "suite.json").unlink()
    assert script.main([*runs, *files]) == 2
    assert "micro-kda" in capsys.readouterr().err


def test_a_run_without_a_model(script: ModuleType, tmp_path: Path) -> None:
    """Catches a traceback where only a tokenizer was trained."""
    run_folder(tmp_path, {"10_tokenizer": 1})
    with pytest.raises(UserError, match="holds no stages of a model"):
        script.training_of(tmp_path, 0.0)
