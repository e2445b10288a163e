"""The recipes that go on from a finished nano model: valid, complete, commented, and buildable."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxlm.data import DialogueGenerator, conversation_texts
from rxlm.errors import UserError
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.build import model_config
from rxlm.training.dry_run import dry_run
from rxlm.training.recipes import read_recipe, recipe_files
from rxlm.training.stage import build_stage, find_inputs

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "stages" / "nano-reinforce", ROOT / "stages" / "nano-preference")
RECIPES = [path for folder in FOLDERS for path in recipe_files(folder)]
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with an untrained nano model."""
    recipe = read_recipe(ROOT / "stages" / "nano" / "50_memory_aware.yaml").recipe
    texts = conversation_texts(DialogueGenerator().conversation(n, 8) for n in range(40))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=384))
    folder = tmp_path_factory.mktemp("nano")
    model = RxTAlpha.from_config(model_config(recipe.model, tokenizer), tokenizer)  # type: ignore[union-attr, arg-type]
    model.save_pretrained(folder / "50_memory_aware" / "checkpoints" / "step-000001")
    (folder / "50_memory_aware" / "checkpoints" / "step-000001" / "COMPLETE").write_text(
        '{"step": 1, "score": null}', encoding="utf-8"
    )
    return folder


@names
def test_recipe_builds_on_a_pipelines_folder(path: Path, nano: Path, tmp_path: Path) -> None:
    """Catches a recipe that validates but cannot begin with the model that its header names."""
    stage = read_recipe(path, [f"init_from={nano}", "objective.validation_dialogues=2"])
    report = dry_run(stage, tmp_path / "run")
    assert sum(report.parameters.values()) < 1_000_000
    assert report.tokens_per_step > 100
    objective = build_stage(stage.recipe, find_inputs(stage, tmp_path / "run"))  # type: ignore[arg-type]
    assert set(objective.extra_modules) == {"reference"}  # type: ignore[union-attr]


@names
def test_without_the_model_the_message_says_so(path: Path, tmp_path: Path) -> None:
    """Catches a traceback for somebody who has not trained nano yet."""
    missing = tmp_path / "nothing"
    stage = read_recipe(path, [f"init_from={missing}"])
    with pytest.raises(UserError, match="does not exist: give a model folder"):
        find_inputs(stage, tmp_path / "run")


@names
def test_header_says_what_one_wants_to_know(path: Path) -> None:
    """Catches a recipe without its command, and a command of another recipe (a copied header)."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    for label in ("Hardware:", "Time:", "Run:", "Good:"):
        assert label in header
    assert f"rxlm train stages/{path.parent.name}/{path.name}" in header
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) >= 12
