"""The recipes of language models: valid, commented, and with the values that the seed gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxlm.training.dry_run import dry_run
from rxlm.training.recipes import LMRecipe, read_recipe

LM = Path(__file__).parents[2] / "stages" / "lm"
RECIPES = sorted(LM.glob("*.yaml"))
SMALL = ("objective.batch_size=2", "objective.dialogues=40", "tokenizer.vocab_size=400")


def test_base_yaml_has_the_seed_values(tmp_path: Path) -> None:
    """Catches a base configuration that drifts from the one that was promised."""
    stage = read_recipe(LM / "base.yaml")
    recipe = stage.recipe
    assert isinstance(recipe, LMRecipe)
    assert recipe.model is not None
    assert (recipe.model.dim, recipe.model.depth) == (512, 6)
    assert (recipe.objective.batch_size, recipe.train.accumulation) == (64, 4)
    assert (recipe.train.lr, recipe.train.weight_decay) == (2e-4, 0.1)
    report = dry_run(read_recipe(LM / "base.yaml", SMALL), tmp_path / "base")
    assert 20e6 < sum(report.parameters.values()) < 40e6
    assert report.state_tokens == 1024
    assert not list(tmp_path.iterdir())


def test_tiny_is_tiny(tmp_path: Path) -> None:
    """Catches a recipe that a laptop no longer trains in minutes."""
    report = dry_run(read_recipe(LM / "tiny.yaml", SMALL[1:2]), tmp_path / "tiny")
    assert sum(report.parameters.values()) < 1_000_000
    assert report.tokens_per_step * report.steps < 2_000_000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_says_what_one_wants_to_know(path: Path) -> None:
    """Catches a recipe without its command, and a command of another recipe."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    whole = path.read_text(encoding="utf-8")
    for label in ("Hardware:", "Time:", "Run:", "Good:"):
        assert label in whole
    assert f"rxlm train stages/lm/{path.name}" in whole
    assert header.startswith("#")
