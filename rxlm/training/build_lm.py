"""From a recipe of stage ``lm`` to the objects that train: tokenizer, model, rows, objective.

Not here: stages of the Reactive Transformer (``build.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rxlm.data.conversation_source import open_conversations
from rxlm.data.records import DataSummary
from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.language_model import LanguageModel
from rxlm.tokenization import Tokenizer
from rxlm.training.corpus import RowSettings, check_long_enough, open_rows, open_stream
from rxlm.training.objectives.dialogue_rows import DialogueRows
from rxlm.training.objectives.language_modeling import (
    LMObjective,
    lm_architecture,
    row_length,
)
from rxlm.training.objectives.row_windows import RowSource
from rxlm.training.objectives.stream_rows import StreamRows
from rxlm.training.recipe import diff_mappings
from rxlm.training.recipes import LMRecipe
from rxlm.training.rng import derive_seed, isolated_random_state


class Corpus(NamedTuple):
    """Training and validation rows, and what was read for them."""

    train: RowSource | StreamRows
    valid: RowSource
    summaries: dict[str, DataSummary]


def build_language_model(
    recipe: LMRecipe, model_folder: Path | None, tokenizer_folder: Path
) -> LanguageModel:
    """Return the model that a stage begins with; new weights depend on ``train.seed`` only.

    Raises:
        UserError: when the recipe's model is not that of the weights, or not of the tokenizer.
    """
    if model_folder is None:
        if recipe.model is None:
            raise UserError(
                "stage 'lm' has neither 'model' nor 'init_from': describe the model, or set "
                "init_from to a trained one."
            )
        tokenizer = Tokenizer.load(tokenizer_folder)
        with isolated_random_state(derive_seed(recipe.train.seed, "model")):
            return LanguageModel(lm_config(recipe.model, tokenizer), tokenizer)
    source = LanguageModel.from_pretrained(model_folder)
    if recipe.model is None:
        return source
    config = lm_config(recipe.model, source.require_tokenizer())
    check_same_lm(source.config, config, model_folder)
    # Built anew, since dropout and the like may differ between stages.
    with isolated_random_state(0):
        model = LanguageModel(config, source.tokenizer)
    model.load_state_dict(source.state_dict())
    return model


def lm_config(section: LMConfig, tokenizer: Tokenizer) -> LMConfig:
    """Return the configuration of the model for a tokenizer.

    Raises:
        UserError: when a ``vocab_size`` is given and is not the tokenizer's.
    """
    size = tokenizer.vocab_size
    if "vocab_size" in section.model_fields_set and section.vocab_size != size:
        raise UserError(
            f"model.vocab_size={section.vocab_size}, but the tokenizer has {size} ids: leave "
            "vocab_size out (it is then taken from the tokenizer), or train a tokenizer with "
            f"tokenizer.vocab_size={section.vocab_size}."
        )
    return section.model_copy(update={"vocab_size": size})


def check_same_lm(given: LMConfig, wanted: LMConfig, folder: Path) -> None:
    """Raise ``UserError``, listing the differences, unless weights of one fit the other."""
    changed = diff_mappings(lm_architecture(given), lm_architecture(wanted))
    if changed:
        raise UserError(
            f"the recipe's model is not that of {folder}:\n  "
            + "\n  ".join(changed)
            + "\nUse the model that the weights were trained with (or leave 'model' out), or "
            "train into another folder."
        )


def build_lm_objective(recipe: LMRecipe, model: LanguageModel) -> LMObjective:
    """Return the stage around a model, its data opened.

    Raises:
        UserError: for data that cannot be used.
    """
    tokenizer = model.require_tokenizer()
    corpus = open_corpus(recipe, tokenizer, row_length(model, recipe.objective))
    accumulation = recipe.train.accumulation
    if not isinstance(corpus.train, StreamRows):
        per_step = accumulation * recipe.objective.batch_size
        check_long_enough(corpus.train, 1, per_step, recipe.train.steps)
    objective = LMObjective(
        model, corpus.train, corpus.valid, recipe.objective, accumulation=accumulation
    )
    objective.summaries = corpus.summaries
    return objective


def open_corpus(recipe: LMRecipe, tokenizer: Tokenizer, length: int) -> Corpus:
    """Return training and validation rows of at most ``length`` tokens."""
    data, settings = recipe.data, recipe.objective
    if settings.interactions:
        return dialogue_corpus(recipe, tokenizer, length)
    rows = RowSettings(tokenizer, length, settings.packing, settings.dialogues, settings.turns)
    summaries: dict[str, DataSummary] = {"train": DataSummary(), "valid": DataSummary()}
    if data.streaming:
        lanes = recipe.train.accumulation
        stream, validation = open_stream(data, rows, lanes, settings.validation_rows)
        return Corpus(stream, validation, {})
    train = open_rows(data, "train", rows, summaries["train"])
    count = max(1, round(settings.dialogues * data.valid_fraction))
    valid = open_rows(data, "valid", rows._replace(dialogues=count), summaries["valid"])
    read = {split: item for split, item in summaries.items() if item.num_records}
    return Corpus(train, valid, read)


def dialogue_corpus(recipe: LMRecipe, tokenizer: Tokenizer, length: int) -> Corpus:
    """Return training and validation conversations, each a row of at most ``length`` tokens.

    Raises:
        UserError: for data that are texts.
    """
    data, settings = recipe.data, recipe.objective
    for name in ("text", "mixture", "streaming"):
        if getattr(data, name):
            raise UserError(
                f"objective.interactions=true reads data.dialogues, not data.{name}: leave one out."
            )
    summaries: dict[str, DataSummary] = {"train": DataSummary(), "valid": DataSummary()}
    counts = {"train": settings.dialogues, "valid": settings.validation_rows}
    rows = {
        split: DialogueRows(
            open_conversations(data, split, summaries[split]),
            tokenizer,
            length,
            settings.turns,
            count,
        )
        for split, count in counts.items()
    }
    read = {split: item for split, item in summaries.items() if item.num_records}
    return Corpus(rows["train"], rows["valid"], read)


def build_lm_on_meta(config: LMConfig) -> LanguageModel:
    """Return a model without storage, to count what it holds."""
    with torch.device("meta"):
        return LanguageModel(config)
