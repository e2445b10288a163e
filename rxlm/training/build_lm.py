"""From a recipe of stage ``lm`` to the objects that train: tokenizer, model, rows, objective.

Not here: stages of the Reactive Transformer (``build.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rxlm.data.conversation_source import DataConfig
from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.language_model import LanguageModel
from rxlm.tokenization import Tokenizer
from rxlm.training.objectives.language_modeling import (
    LMObjective,
    LMSettings,
    lm_architecture,
    row_length,
)
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.recipe import diff_mappings
from rxlm.training.recipes import LMRecipe
from rxlm.training.rng import derive_seed, isolated_random_state
from rxlm.training.texts import open_documents


class Corpus(NamedTuple):
    """Training and validation rows."""

    train: TextRows
    valid: TextRows


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
    length = row_length(model, recipe.objective)
    corpus = open_corpus(recipe.data, recipe.objective, model.require_tokenizer(), length)
    return LMObjective(model, *corpus, recipe.objective, accumulation=recipe.train.accumulation)


def open_corpus(
    data: DataConfig, settings: LMSettings, tokenizer: Tokenizer, length: int
) -> Corpus:
    """Return training and validation rows of at most ``length`` tokens."""
    name = data.text or data.dialogues
    count = max(1, round(settings.dialogues * data.valid_fraction))
    train = open_documents(data, "train", settings.dialogues, settings.turns)
    valid = open_documents(data, "valid", count, settings.turns)
    return Corpus(
        TextRows(train, tokenizer, length, data.seed, f"{name} (train)"),
        TextRows(valid, tokenizer, length, data.seed, f"{name} (valid)"),
    )


def build_lm_on_meta(config: LMConfig) -> LanguageModel:
    """Return a model without storage, to count what it holds."""
    with torch.device("meta"):
        return LanguageModel(config)
