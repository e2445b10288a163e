"""What a recipe would do, found out without training: parameters, tokens a step, bytes.

The model is built without storage; one batch is made for real, so that unusable data is noticed
here and not an hour later. Nothing is written.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from rxlm.errors import UserError
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.saving import read_model_config
from rxlm.storage.weights import count_parameters
from rxlm.tokenization import Tokenizer, train_tokenizer
from rxlm.training.build import (
    StageInputs,
    build_objective,
    build_on_meta,
    check_same_architecture,
    model_config,
)
from rxlm.training.objectives.joint_lm import JointBatch
from rxlm.training.recipes import PREVIOUS, ModelRecipe, StageFile, TokenizerRecipe
from rxlm.training.stage import find_inputs
from rxlm.training.tokenizer_stage import TokenizerStageSettings, tokenizer_texts

_SAMPLE_DIALOGUES = 1000
_SAMPLE_TEXTS = 30_000
_BYTES = 4
"""Of a weight, a gradient, or one of the optimizer's moments: all are fp32."""


class DryRun(NamedTuple):
    """What training would take."""

    parameters: dict[str, int]
    """By part of the model; empty for the tokenizer stage."""
    num_trained: int
    """Parameters that this stage trains, modules that only training needs included."""
    steps: int
    tokens_per_step: int
    """Of the first step; later phases of a curriculum may differ."""
    weight_bytes: int
    optimizer_bytes: int
    """Gradients and the optimizer's two moments."""
    memory_bytes: int
    """Short-term memory of one conversation."""
    notes: list[str]
    """What these figures rest on, where that is not obvious."""


def dry_run(stage: StageFile, folder: Path) -> DryRun:
    """Return what a stage would take.

    Args:
        stage: the recipe.
        folder: where it would run; inputs are looked for beside it.

    Raises:
        UserError: for everything that would stop the real run, but for an earlier stage that has
            not been trained yet.
    """
    recipe = stage.recipe
    if isinstance(recipe, TokenizerRecipe):
        texts = tokenizer_texts(recipe.data, recipe.objective)
        num_characters = sum(len(text) for text in texts)
        return DryRun({}, 0, 0, 0, 0, 0, 0, [f"{num_characters:,} characters of training text"])
    notes: list[str] = []
    tokenizer, config = _tokenizer_and_config(stage, folder, notes)
    model = build_on_meta(config)
    objective = build_objective(recipe, model, tokenizer)
    batches = [objective.batch(0, index) for index in range(recipe.train.accumulation)]
    dialogues = [item.dialogues if isinstance(item, JointBatch) else item for item in batches]
    trained = [
        parameter.numel()
        for parameter in objective.trained_modules().parameters()
        if parameter.requires_grad
    ]
    parameters = count_parameters(model)
    memory = config.memory_attention
    return DryRun(
        parameters=parameters,
        num_trained=sum(trained),
        steps=recipe.train.steps,
        tokens_per_step=sum(batch.num_tokens for batch in dialogues),
        weight_bytes=_BYTES * sum(parameters.values()),
        optimizer_bytes=3 * _BYTES * sum(trained),
        memory_bytes=_BYTES * memory.num_layers * memory.stm_size * memory.embed_dim,
        notes=notes,
    )


def _tokenizer_and_config(
    stage: StageFile, folder: Path, notes: list[str]
) -> tuple[Tokenizer, RxTConfig]:
    """Return the tokenizer and the model's configuration, or stand-ins for what is not there."""
    recipe = stage.recipe
    assert not isinstance(recipe, TokenizerRecipe)
    inputs = _available_inputs(stage, folder, notes)
    if inputs is None:
        if recipe.model is None:
            raise UserError(
                f"{stage.path}: what is 'previous' has not been trained and there is no 'model', "
                "so nothing is known about it. Train the earlier stages first."
            )
        tokenizer = _stand_in_tokenizer(recipe)
        return tokenizer, model_config(recipe.model, tokenizer)
    tokenizer = Tokenizer.load(inputs.tokenizer_folder)
    if inputs.model_folder is None:
        assert recipe.model is not None, "checked when the recipe was read"
        return tokenizer, model_config(recipe.model, tokenizer)
    stored = read_model_config(inputs.model_folder).config
    if recipe.model is None:
        return tokenizer, stored
    config = model_config(recipe.model, tokenizer)
    check_same_architecture(stored, config, inputs.model_folder)
    notes.append(f"weights of {inputs.model_folder}")
    return tokenizer, config


def _available_inputs(stage: StageFile, folder: Path, notes: list[str]) -> StageInputs | None:
    """Return the stage's inputs; ``None``, and a note, when 'previous' is not trained yet."""
    recipe = stage.recipe
    try:
        return find_inputs(stage, folder)
    except UserError as error:
        if PREVIOUS not in (recipe.init_from, recipe.tokenizer_from):
            raise
        notes.append(f"not ready to run: {error}")
        notes.append("figures rest on a tokenizer trained for them on a sample of the data")
        return None


def _stand_in_tokenizer(recipe: ModelRecipe) -> Tokenizer:
    settings = TokenizerStageSettings(dialogues=_SAMPLE_DIALOGUES)
    texts = itertools.islice(tokenizer_texts(recipe.data, settings), _SAMPLE_TEXTS)
    training = recipe.tokenizer
    if recipe.model is not None and "vocab_size" in recipe.model.decoder.model_fields_set:
        training = training.model_copy(update={"vocab_size": recipe.model.decoder.vocab_size})
    return train_tokenizer(texts, training)
