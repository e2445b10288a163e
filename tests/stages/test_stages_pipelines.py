"""The recipes of whole models: valid, complete, commented, and what their headers promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rxlm.evaluation.suite.baseline import non_embedding_parameters
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.model import RxTNetwork
from rxlm.training.build_lm import build_lm_on_meta
from rxlm.training.dry_run import dry_run
from rxlm.training.recipes import (
    STAGES,
    LMRecipe,
    MemoryAwareRecipe,
    read_folder,
    read_recipe,
    recipe_files,
)

ROOT = Path(__file__).parents[2]
FOLDERS = tuple(ROOT / "stages" / name for name in ("nano", "nano-linear", "micro", "mini"))
BASELINE = ROOT / "stages" / "nano-baseline"
RECIPES = [path for folder in (*FOLDERS, BASELINE) for path in recipe_files(folder)]
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@folders
def test_all_stages_in_order(folder: Path) -> None:
    """Catches a stage that is missing, repeated, or numbered such that it runs too early."""
    kinds = [stage for stage in STAGES if stage not in ("lm", "memory_reinforcement", "preference")]
    if folder.name == "micro":
        kinds += ["memory_aware"] * 2  # stories, and gates that close
    assert [stage.recipe.stage for stage in read_folder(folder)] == kinds


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.parent.name.startswith("nano")],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
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
    number = re.search(rf"Stage (\d) of {len(recipe_files(path.parent))}", header)
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
    models = [
        stage.recipe.model.model_dump(mode="json")  # type: ignore[union-attr]
        for stage in read_folder(folder)
    ]
    if folder.name == "micro":
        # The encoder takes what is not said of it from the decoder.
        for part, field in (
            ("decoder", "linear_attn_write_stretch"),
            ("encoder", "linear_attn_write_stretch"),
            ("decoder", "linear_attn_decay_shrinkage"),
            ("encoder", "linear_attn_decay_shrinkage"),
            ("memory_attention", "residual_gate_stretch"),
        ):
            assert models[-1][part][field] > models[0][part][field] == 0.0
            models[-1][part][field] = 0.0
    assert all(model == models[0] for model in models)


def test_the_baseline_is_of_equal_size_and_reads_the_same() -> None:
    """Catches a twin of another size, on other dialogues, or trained on fewer of them."""
    model = read_folder(FOLDERS[0])[-1].recipe
    tokenizer, twin = (stage.recipe for stage in read_folder(BASELINE))
    assert isinstance(model, MemoryAwareRecipe) and isinstance(twin, LMRecipe)
    assert tokenizer.tokenizer == model.tokenizer and tokenizer.data == twin.data == model.data
    config = RxTConfig(
        decoder=model.model.decoder,
        encoder=model.model.encoder,
        memory_attention=model.model.memory_attention,
    )
    wanted = non_embedding_parameters(RxTNetwork(config))
    found = non_embedding_parameters(build_lm_on_meta(twin.model))
    assert found == pytest.approx(wanted, rel=0.03)
    assert twin.objective.interactions
    phase = model.objective.phases[-1]
    assert (twin.objective.turns, twin.objective.batch_size) == (phase.turns, phase.dialogues)
    assert twin.train.steps == model.train.steps
