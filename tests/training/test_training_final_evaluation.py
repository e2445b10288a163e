"""Which dialogues the evaluation of a run asks about. Not here: the tests themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rxlm.training.final_evaluation import recall_settings
from rxlm.training.recipes import read_folder, read_recipe, recipe_values

DATA = "data: {generator: {max_facts: 3}}\n"
OTHERS = "evaluation: {recall: {generator: {max_facts: 5}}}\n"


@pytest.mark.parametrize(("text", "facts"), [(DATA, 3), (DATA + OTHERS, 5)])
def test_recall_is_asked_of_the_dialogues_of_training(
    tmp_path: Path, text: str, facts: int
) -> None:
    """Catches a recall test on other dialogues than those that were trained on, unless the recipe
    says so; and one that depends on whether the recipe is the user's, or the one that a run keeps
    with every default written out."""
    (tmp_path / "10_tokenizer.yaml").write_text(f"stage: tokenizer\n{text}", encoding="utf-8")
    (stage,) = read_folder(tmp_path, [])
    kept = tmp_path / "config.yaml"
    kept.write_text(yaml.safe_dump(recipe_values(stage.recipe)), encoding="utf-8")
    for recipe in (stage.recipe, read_recipe(kept).recipe):
        assert recall_settings(recipe).generator.max_facts == facts
