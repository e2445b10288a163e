"""What a recipe would do, found out without training: parameters, tokens a step, bytes.

The model is built without storage; one batch is made for real, so that unusable data is noticed
here and not an hour later. What cannot be counted (peak memory, time) is estimated from a few small
steps if that is asked for. Nothing is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.language_model import LanguageModel, read_lm_config
from rxlm.lm.model import state_bytes
from rxlm.rxt.config import RxTComponentConfig, RxTConfig
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.saving import read_model_config
from rxlm.storage.weights import count_parameters
from rxlm.tokenization import Tokenizer, train_tokenizer
from rxlm.training.build import (
    StageInputs,
    build_objective,
    build_on_meta,
    check_same_architecture,
    model_config,
    recipe_class,
)
from rxlm.training.build_lm import build_lm_objective, build_lm_on_meta, check_same_lm, lm_config
from rxlm.training.device import resolve_device
from rxlm.training.distributed.zero import check_deepspeed
from rxlm.training.loggers import check_loggers
from rxlm.training.muon import layer_matrices
from rxlm.training.objective import Objective
from rxlm.training.objectives.joint_lm import JointBatch
from rxlm.training.objectives.language_modeling import row_length
from rxlm.training.optim import trainable_parameters
from rxlm.training.recipes import PREVIOUS, LMRecipe, ModelRecipe, StageFile, TokenizerRecipe
from rxlm.training.rng import isolated_random_state
from rxlm.training.settings import TrainSettings
from rxlm.training.stage import find_inputs
from rxlm.training.step_estimate import RunEstimate, estimate_run, fits
from rxlm.training.tokenizer_stage import TokenizerStageSettings, tokenizer_texts

_SAMPLE_DIALOGUES = 1000
_SAMPLE_TEXTS = 30_000
_UNKNOWN = (
    "{}: what is 'previous' has not been trained and there is no 'model', so nothing is known "
    "about it. Train the earlier stages first."
)
_BYTES = 4
"""Of a weight, a gradient, or one of the optimizer's moments: all are fp32."""
_ROUNDED_BYTES = 2
"""Of a weight in bfloat16, beside its master."""


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
    """Gradients and the optimizer's moments (and weights rounded from masters)."""
    memory_bytes: int
    """Short-term memory of one conversation; a language model's state after ``state_tokens``."""
    notes: list[str]
    """What these figures rest on, where that is not obvious."""
    state_tokens: int | None = None
    """For a language model: tokens of a row."""
    estimate: RunEstimate | None = None
    """Peak memory and time, from a few small steps; None if none were made."""


def dry_run(stage: StageFile, folder: Path, *, measure: bool = False) -> DryRun:
    """Return what a stage would take.

    Args:
        stage: the recipe.
        folder: where it would run; inputs are looked for beside it.
        measure: make a few small steps with new weights to estimate peak memory and time.

    Raises:
        UserError: for everything that would stop the real run, but for an earlier stage that has
            not been trained yet.
    """
    recipe = stage.recipe
    if isinstance(recipe, TokenizerRecipe):
        texts = tokenizer_texts(recipe.data, recipe.objective)
        num_characters = sum(len(text) for text in texts)
        return DryRun({}, 0, 0, 0, 0, 0, 0, [f"{num_characters:,} characters of training text"])
    check_loggers(recipe.train)
    check_deepspeed(recipe.train)
    notes: list[str] = []
    if isinstance(recipe, LMRecipe):
        return _dry_run_lm(stage, recipe, folder, notes, measure)
    tokenizer, config, cls = _tokenizer_and_config(stage, folder, notes)
    model = build_on_meta(config, cls)
    model.set_tokenizer(tokenizer)
    objective = build_objective(recipe, model, model.require_tokenizer())
    batches = [objective.batch(0, index) for index in range(recipe.train.accumulation)]
    dialogues = [item.dialogues if isinstance(item, JointBatch) else item for item in batches]
    trained = [
        parameter.numel()
        for parameter in objective.trained_modules().parameters()
        if parameter.requires_grad
    ]
    parameters = count_parameters(model)
    memory = config.memory_attention

    def real() -> Objective:
        whole = cls.from_config(config, tokenizer)
        return build_objective(recipe, whole, whole.require_tokenizer())

    report = DryRun(
        parameters=parameters,
        num_trained=sum(trained),
        steps=recipe.train.steps,
        tokens_per_step=sum(batch.num_tokens for batch in dialogues),
        weight_bytes=_BYTES * sum(parameters.values()),
        optimizer_bytes=_optimizer_bytes(recipe.train, objective.trained_modules()),
        memory_bytes=_BYTES * memory.num_layers * memory.stm_size * memory.embed_dim,
        notes=notes,
    )
    return _with_estimate(report, real, recipe.train) if measure else report


def _with_estimate(
    report: DryRun, build: Callable[[], Objective], settings: TrainSettings
) -> DryRun:
    """Add what a few small steps of a real model take, if that can be tried here."""
    device = resolve_device(settings.device)
    if not fits(report.weight_bytes + report.optimizer_bytes, device):
        note = f"peak memory and time: the model is too large to be tried on this {device.type}"
        return report._replace(notes=[*report.notes, note])
    with isolated_random_state(0):
        objective = build()
        return report._replace(estimate=estimate_run(objective, settings, device))


def _dry_run_lm(
    stage: StageFile, recipe: LMRecipe, folder: Path, notes: list[str], measure: bool
) -> DryRun:
    inputs = _available_inputs(stage, folder, notes)
    if inputs is None:
        if recipe.model is None:
            raise UserError(_UNKNOWN.format(stage.path))
        tokenizer = _stand_in_tokenizer(recipe)
        config = lm_config(recipe.model, tokenizer)
    else:
        tokenizer = Tokenizer.load(inputs.tokenizer_folder)
        stored = None if inputs.model_folder is None else read_lm_config(inputs.model_folder)
        if recipe.model is None:
            if stored is None:
                raise UserError(f"{stage.path}: init_from is null, so 'model' must be described.")
            config = stored
        else:
            config = lm_config(recipe.model, tokenizer)
            if stored is not None:
                check_same_lm(stored, config, inputs.model_folder or folder)
    model = build_lm_on_meta(config)
    model.set_tokenizer(tokenizer)
    objective = build_lm_objective(recipe, model)
    batches = [objective.batch(0, index) for index in range(recipe.train.accumulation)]
    length = row_length(model, recipe.objective)
    parameters = count_parameters(model)
    total = sum(parameters.values())

    def real() -> Objective:
        return build_lm_objective(recipe, LanguageModel(config, tokenizer))

    report = DryRun(
        parameters=parameters,
        num_trained=total,
        steps=recipe.train.steps,
        tokens_per_step=sum(int(rows.mask.sum()) for batch in batches for rows in batch),
        weight_bytes=_BYTES * total,
        optimizer_bytes=_optimizer_bytes(recipe.train, objective.trained_modules()),
        memory_bytes=state_bytes(config, length),
        notes=notes,
        state_tokens=length,
    )
    return _with_estimate(report, real, recipe.train) if measure else report


def _optimizer_bytes(settings: TrainSettings, trained: nn.Module) -> int:
    """Return the bytes of gradients and moments; Muon keeps one of a matrix in place of two."""
    parameters = trainable_parameters(trained).values()
    matrices = layer_matrices(trained) if settings.optimizer == "muon" else set()
    rounded = _ROUNDED_BYTES if settings.precision == "bf16_pure" else 0
    return sum(
        ((2 if id(item) in matrices else 3) * _BYTES + rounded) * item.numel()
        for item in parameters
    )


def _tokenizer_and_config(
    stage: StageFile, folder: Path, notes: list[str]
) -> tuple[Tokenizer, RxTConfig, type[RxTAlpha]]:
    """Return tokenizer, configuration and class of the model, or stand-ins for what is missing."""
    recipe = stage.recipe
    assert not isinstance(recipe, TokenizerRecipe | LMRecipe)
    inputs = _available_inputs(stage, folder, notes)
    if inputs is None:
        if recipe.model is None:
            raise UserError(_UNKNOWN.format(stage.path))
        tokenizer = _stand_in_tokenizer(recipe)
        return tokenizer, model_config(recipe.model, tokenizer), recipe_class(recipe, None)
    tokenizer = Tokenizer.load(inputs.tokenizer_folder)
    cls = recipe_class(recipe, inputs.model_folder)
    if inputs.model_folder is None:
        assert recipe.model is not None, "checked when the recipe was read"
        return tokenizer, model_config(recipe.model, tokenizer), cls
    stored = read_model_config(inputs.model_folder).config
    if recipe.model is None:
        return tokenizer, stored, cls
    config = model_config(recipe.model, tokenizer)
    check_same_architecture(stored, config, inputs.model_folder)
    notes.append(f"weights of {inputs.model_folder}")
    return tokenizer, config, cls


def _available_inputs(stage: StageFile, folder: Path, notes: list[str]) -> StageInputs | None:
    """Return the stage's inputs; ``None``, and a note, when 'previous' is not trained yet."""
    recipe = stage.recipe
    try:
        return find_inputs(stage, folder)
    except UserError as error:
        own = recipe.tokenizer_from.endswith((".yaml", ".yml"))
        if not own and PREVIOUS not in (recipe.init_from, recipe.tokenizer_from):
            raise
        notes.append(f"not ready to run: {error}")
        notes.append("figures rest on a tokenizer trained for them on a sample of the data")
        return None


def _stand_in_tokenizer(recipe: ModelRecipe | LMRecipe) -> Tokenizer:
    settings = TokenizerStageSettings(dialogues=_SAMPLE_DIALOGUES)
    texts = itertools.islice(tokenizer_texts(recipe.data, settings), _SAMPLE_TEXTS)
    training = recipe.tokenizer
    if isinstance(recipe, LMRecipe):
        section: LMConfig | RxTComponentConfig | None = recipe.model
    else:
        section = None if recipe.model is None else recipe.model.decoder
    if section is not None and "vocab_size" in section.model_fields_set:
        training = training.model_copy(update={"vocab_size": section.vocab_size})
    return train_tokenizer(texts, training)
