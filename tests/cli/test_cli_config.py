"""``rxlm config``: recipes shown, checked and described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rxlm.cli.config import recipe_schema
from rxlm.cli.main import main
from rxlm.training.recipes import STAGES, read_recipe, recipe_values

NANO_STAGES = [
    stage for stage in STAGES if stage not in ("lm", "memory_reinforcement", "preference")
]


def test_shown_recipe_is_a_recipe_that_means_the_same(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a resolved recipe that cannot be trained, or differs from what was resolved."""
    path = nano / "50_memory_aware.yaml"
    assert main(["config", "show", str(path), "train.steps=77"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    wanted = read_recipe(path, ["train.steps=77"]).recipe
    assert recipe_values(read_recipe(shown).recipe) == recipe_values(wanted)
    assert read_recipe(shown).recipe.train.steps == 77


def test_show_folder_prints_every_recipe(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches output that is no YAML stream."""
    assert main(["config", "show", str(nano)]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [document["stage"] for document in documents] == NANO_STAGES


def test_validate_names_file_line_and_near_miss(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an unknown key that is accepted, or an error that does not say where it is."""
    recipe = tmp_path / "10_x.yaml"
    recipe.write_text(
        f"extends: {nano / '_base.yaml'}\nstage: sft\ntrain:\n  steps: 3\n  lrr: 0.1\n",
        encoding="utf-8",
    )
    assert main(["config", "validate", str(recipe)]) == 2
    error_text = capsys.readouterr().err
    assert f"{recipe}:5: train.lrr: TrainSettings has no field 'lrr': did you mean 'lr'?" in (
        error_text
    )
    assert main(["config", "validate", str(nano)]) == 0
    assert capsys.readouterr().out.count("valid") == len(NANO_STAGES)


def test_schema_knows_every_stage_and_forbids_unknown_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches an editor that offers nothing, or marks `extends` and inherited keys as errors."""
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == recipe_schema()
    assert len(schema["anyOf"]) == len(STAGES)
    recipe = schema["$defs"]["MemoryAwareRecipe"]
    assert recipe["additionalProperties"] is False
    assert {"extends", "stage", "train", "objective"} <= set(recipe["properties"])
    assert "required" not in recipe
    assert (
        "Peak learning rate." in schema["$defs"]["TrainSettings"]["properties"]["lr"]["description"]
    )


def test_costs_are_those_of_the_model(nano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches figures of another model, overrides that do not reach it, and JSON that is none."""
    recipe = str(nano / "50_memory_aware.yaml")
    totals = []
    for arguments in ([recipe], [str(nano)], [recipe, "model.decoder.ff_dim=64"]):
        assert main(["config", "show", *arguments, "--params", "--json"]) == 0
        costs = json.loads(capsys.readouterr().out)
        totals.append(costs["parameters_in_all"])
        assert sum(sum(parts.values()) for parts in costs["parameters"].values()) == totals[-1]
    # Two layers each of encoder and decoder, three matrices of width 64.
    assert totals[0] == totals[1] == totals[2] + 4 * 3 * 64 * 64
    assert main(["config", "show", recipe, "--params"]) == 0
    text = capsys.readouterr().out
    assert f"{totals[0]:,}" in text and "decode state" in text


def test_costs_need_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches costs of defaults that nobody asked for, and --json that is silently ignored."""
    recipe = tmp_path / "10_x.yaml"
    recipe.write_text("stage: sft\ntrain: {steps: 3}\n", encoding="utf-8")
    assert main(["config", "show", str(recipe), "--params"]) == 2
    assert "there is no 'model'" in capsys.readouterr().err
    assert main(["config", "show", str(recipe), "--json"]) == 2
    assert "--params" in capsys.readouterr().err
