"""What recipes may say, how overrides find their stage, and what counts as a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxlm.errors import UserError
from rxlm.training.recipes import (
    MemoryAwareRecipe,
    ModelSection,
    TokenizerRecipe,
    read_folder,
    read_recipe,
    recipe_files,
    recipe_values,
    result_values,
    route_override,
)

SIZES = {"num_layers": 1, "embed_dim": 8, "att_heads": 2, "stm_size": 3, "self_att_type": "mha"}
BASE = """
model:
  decoder: {num_layers: 1, embed_dim: 8, att_heads: 2, stm_size: 3, seq_len: 64}
train: {lr: 0.5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recipes with a shared parent, two of them of the same stage."""
    files = {
        "_base.yaml": BASE,
        "10_tokenizer.yaml": "extends: _base.yaml\nstage: tokenizer\n",
        "20_short.yaml": "extends: _base.yaml\nstage: joint_lm\ntrain: {steps: 3}\n",
        "30_long.yaml": "extends: _base.yaml\nstage: joint_lm\ntrain: {steps: 4}\n",
        "notes.yaml": "not: a recipe\n",
        "100_last.yaml": "extends: _base.yaml\nstage: sft\ntrain: {steps: 5}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_recipes_are_ordered_by_number_and_others_left_out(folder: Path) -> None:
    """Catches 100 before 20, and the shared parent taken for a stage."""
    names = [path.stem for path in recipe_files(folder)]
    assert names == ["10_tokenizer", "20_short", "30_long", "100_last"]


def test_overrides_reach_the_stages_they_name(folder: Path) -> None:
    """Catches an override of one stage that changes others, or of all that misses one."""
    words = ["train.seed=7", "20_short.train.lr=0.1", "joint_lm.data.seed=9", "sft.train.steps=1"]
    stages = {stage.name: stage.recipe for stage in read_folder(folder, words)}
    assert {recipe.train.seed for recipe in stages.values()} == {7}
    assert stages["20_short"].train.lr == 0.1
    assert stages["30_long"].train.lr == 0.5
    seeds = {name: recipe.data.seed for name, recipe in stages.items()}
    assert seeds == {"10_tokenizer": 0, "20_short": 9, "30_long": 9, "100_last": 0}
    assert stages["100_last"].train.steps == 1


@pytest.mark.parametrize(
    ("override", "stage", "rest"),
    [
        ("tokenizer.vocab_size=500", None, "tokenizer.vocab_size=500"),
        ("tokenizer.tokenizer.vocab_size=500", "tokenizer", "tokenizer.vocab_size=500"),
        ("tokenizer.data.seed=1", "tokenizer", "data.seed=1"),
        ("init_from=a.b/c=d", None, "init_from=a.b/c=d"),
        ("sft.data.text=a=b", "sft", "data.text=a=b"),
    ],
)
def test_the_tokenizer_section_is_not_the_tokenizer_stage(
    override: str, stage: str | None, rest: str
) -> None:
    """Catches tokenizer.vocab_size=... reaching nothing, or reaching one stage of all."""
    assert route_override(override, {"tokenizer", "10_tokenizer", "sft"}) == (stage, rest)


def test_override_of_no_stage_is_refused(folder: Path) -> None:
    """Catches a misspelled stage whose override changes nothing."""
    with pytest.raises(UserError, match=r"called '20_shor'.*did you mean '20_short'"):
        read_folder(folder, ["20_shor.train.steps=2"])


def test_encoder_and_memory_take_the_decoders_sizes() -> None:
    """Catches a model whose width has to be written, and changed, in three places."""
    model = ModelSection.parse({"decoder": {**SIZES, "seq_len": 99}, "encoder": {"num_layers": 1},
                                "memory_attention": {"att_heads": 1}})  # fmt: skip
    assert model.encoder == model.decoder
    memory = model.memory_attention
    assert (memory.embed_dim, memory.stm_size, memory.seq_len, memory.att_heads) == (8, 3, 99, 1)
    other = ModelSection.parse({"decoder": SIZES, "encoder": {"ff_dim": 5}})
    assert other.encoder.ff_dim == 5
    assert other.decoder.ff_dim != 5


def test_tokenizer_stage_takes_a_shared_train_section(folder: Path) -> None:
    """Catches a shared `train` without steps that makes the tokenizer's recipe invalid."""
    recipe = read_recipe(folder / "10_tokenizer.yaml").recipe
    assert isinstance(recipe, TokenizerRecipe)
    assert recipe.train.lr == 0.5


def test_other_stages_need_steps(tmp_path: Path) -> None:
    """Catches a default number of steps, which would always be wrong."""
    (tmp_path / "a.yaml").write_text("stage: sft\ntrain: {lr: 0.1}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.yaml:2: train.steps: Field required"):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3}\n", "there is no 'stage'; expected one of tokenizer, joint_lm"),
        ("stage: sfd\n", r"a\.yaml:1: stage: 'sfd' is unknown.*Did you mean 'sft'"),
        ("stage: sft\ntrain: {steps: 3}\nmodle: {}\n", r"a\.yaml:3: modle: .*mean 'model'"),
        (
            "stage: sft\ntrain: {steps: 3}\nmodel:\n  decoder:\n    emded_dim: 8\n",
            r"a\.yaml:5: model.decoder.emded_dim: .*did you mean 'embed_dim'",
        ),
        (
            "stage: memory_aware\ntrain: {steps: 3}\nobjective:\n  turns: 3\n",
            r"a\.yaml:4: objective.turns",
        ),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    """Catches a recipe that is read although it says something else than its author thinks."""
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "a.yaml")


def test_vocabulary_left_to_the_tokenizer_stays_so() -> None:
    """Catches a resolved recipe that fixes the config's default as the vocabulary."""
    open_recipe = MemoryAwareRecipe(
        stage="memory_aware", train={"steps": 1}, model={"decoder": SIZES}
    )
    fixed = MemoryAwareRecipe(
        stage="memory_aware", train={"steps": 1}, model={"decoder": {**SIZES, "vocab_size": 300}}
    )
    assert "vocab_size" not in recipe_values(open_recipe)["model"]["decoder"]
    assert recipe_values(fixed)["model"]["encoder"]["vocab_size"] == 300
    again = MemoryAwareRecipe(**recipe_values(open_recipe))
    assert recipe_values(again) == recipe_values(open_recipe)


def test_only_what_decides_the_result_counts_as_a_change(folder: Path) -> None:
    """Catches training again for another log interval, and not for another learning rate."""
    path = folder / "20_short.yaml"

    def values(*overrides: str) -> object:
        return result_values(read_recipe(path, overrides).recipe)

    same = ("train.log_every=3", "train.threads=2", "train.device=cpu", "tokenizer.vocab_size=300",
            "evaluation.recall.dialogues=7")  # fmt: skip
    assert values(*same) == values()
    also = ("data.token_cache=auto", "train.prefetch=4", "train.prefetch_workers=4",
            "train.keep_best=0", "train.watch.mfu=false")  # fmt: skip
    assert values(*also) == values()
    for override in ("train.lr=0.1", "data.seed=3", "objective.turns=2", "model.decoder.ff_dim=9"):
        assert values(override) != values()
