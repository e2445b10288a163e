"""The nano recipes: valid, complete, commented, and what their headers promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rxlm.training.dry_run import dry_run
from rxlm.training.recipes import STAGES, read_folder, read_recipe, recipe_files

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "stages" / "nano", ROOT / "stages" / "nano-linear")
RECIPES = [path for folder in FOLDERS for path in recipe_files(folder)]
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@folders
def test_all_stages_in_order(folder: Path) -> None:
    """Catches a stage that is missing, or numbered such that it runs too early."""
    assert [stage.recipe.stage for stage in read_folder(folder)] == [
        stage for stage in STAGES if stage not in ("lm", "memory_reinforcement", "preference")
    ]


@names
def test_recipe_dry_runs(path: Path, tmp_path: Path) -> None:
    """Catches a recipe that validates but cannot be built or has no data."""
    overrides = [] if "tokenizer" not in path.stem else ["objective.dialogues=100"]
    stage = read_recipe(path, overrides)
    report = dry_run(stage, tmp_path / stage.name)
    assert not list(tmp_path.iterdir())
    if stage.recipe.stage != "tokenizer":
        assert sum(report.parameters.values()) < 1_000_000, "nano means small"
        assert 0 < report.num_trained
        assert report.tokens_per_step > 100


@names
def test_header_says_what_one_wants_to_know(path: Path) -> None:
    """Catches a recipe without its command, and a command of another recipe (a copied header)."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    for label in ("Hardware:", "Time:", "Run:", "Good:"):
        assert label in header
    assert f"rxlm train stages/{path.parent.name}/{path.name}" in header
    number = re.search(r"Stage (\d) of 5", header)
    assert number is not None
    assert int(number[1]) == recipe_files(path.parent).index(path) + 1


@names
def test_every_section_is_explained(path: Path) -> None:
    """Catches a recipe that only its author can read."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) >= 7


@folders
def test_all_stages_describe_one_model(folder: Path) -> None:
    """Catches a stage with sizes of its own, which the weights of the stage before do not fit."""
    stages = read_folder(folder)
    models = {stage.recipe.model.model_dump_json() for stage in stages}  # type: ignore[union-attr]
    assert len(models) == 1
