"""From a recipe to the objects that train: tokenizer, model, data, objective.

Nothing is written and nothing is trained here. Where the inputs of a stage lie is ``stage.py``'s
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rxlm.data.conversation_mixture import MixedConversations
from rxlm.data.conversation_source import ConversationList, ConversationSource, open_conversations
from rxlm.data.data_config import DataConfig
from rxlm.data.records import DataSummary
from rxlm.errors import UserError
from rxlm.nn.int8_linear import require_trainable
from rxlm.rxt.config import CHANGED_BY_STAGES, NOT_ARCHITECTURE, RxTConfig
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.models import ARCHITECTURES, RxTAlpha, RxTBeta
from rxlm.rxt.reactive import tokenizer_config_of
from rxlm.storage.model_folder import architecture_of
from rxlm.tokenization import Tokenizer
from rxlm.training.corpus import RowSettings, check_long_enough, open_rows
from rxlm.training.objectives.joint_lm import JointLMObjective
from rxlm.training.objectives.memory_aware import MemoryAwareObjective
from rxlm.training.objectives.memory_pretraining import MemoryPretrainingObjective
from rxlm.training.objectives.memory_reinforcement import MemoryReinforcementObjective
from rxlm.training.objectives.model_objective import COMPONENTS, ModelObjective
from rxlm.training.objectives.preference import PreferenceObjective
from rxlm.training.objectives.row_windows import RowSource
from rxlm.training.objectives.sft import SFTObjective
from rxlm.training.recipe import diff_mappings
from rxlm.training.recipes import (
    JointLMRecipe,
    MemoryPretrainingRecipe,
    MemoryReinforcementRecipe,
    ModelRecipe,
    ModelSection,
    PreferenceRecipe,
    SFTRecipe,
)
from rxlm.training.rng import derive_seed, isolated_random_state


class StageInputs(NamedTuple):
    """What a stage begins with."""

    model_folder: Path | None
    """A model folder whose weights are taken; ``None``: new weights."""
    tokenizer_folder: Path
    """A folder with the tokenizer; the model folder if there is one."""


def build_model(recipe: ModelRecipe, inputs: StageInputs) -> RxTAlpha:
    """Return the model that a stage begins with.

    New weights depend on ``train.seed`` only.

    Raises:
        UserError: when the recipe's model is not that of the weights, does not fit the tokenizer,
            or needs what is not built, or the weights are int8.
    """
    tokenizer = Tokenizer.load(inputs.tokenizer_folder)
    if inputs.model_folder is None:
        if recipe.model is None:
            raise UserError(
                f"stage '{recipe.stage}' has neither 'model' nor 'init_from': describe the model, "
                "or set init_from to a trained one."
            )
        with isolated_random_state(derive_seed(recipe.train.seed, "model")):
            cls = recipe_class(recipe, None)
            return cls.from_config(model_config(recipe.model, tokenizer), tokenizer)
    source = RxTAlpha.from_pretrained(inputs.model_folder)
    require_trainable(source)
    if recipe.model is None:
        return source
    cls = recipe_class(recipe, inputs.model_folder)
    config = model_config(recipe.model, source.require_tokenizer())
    check_same_architecture(source.config, config, inputs.model_folder)
    # Built anew, since dropout and the like may differ between stages.
    with isolated_random_state(0):
        model = cls.from_config(config, source.tokenizer)
    model.load_state_dict(source.state_dict())
    return model


def recipe_class(recipe: ModelRecipe, model_folder: Path | None) -> type[RxTAlpha]:
    """Return which model a stage trains: the recipe's, or that of the weights it begins with.

    An Alpha may go on as a Beta, which is the same network.

    Raises:
        UserError: for a recipe that makes an Alpha of a Beta.
    """
    is_beta = model_folder is not None and architecture_of(model_folder) == RxTBeta.__name__
    if recipe.model is None:
        return RxTBeta if is_beta else RxTAlpha
    if is_beta and recipe.model.architecture != "beta":
        raise UserError(
            f"model.architecture={recipe.model.architecture!r}, but {model_folder} is an RxTBeta: "
            "set model.architecture: beta (or leave 'model' out)."
        )
    return ARCHITECTURES[recipe.model.architecture]


def model_config(section: ModelSection, tokenizer: Tokenizer) -> RxTConfig:
    """Return the configuration of the model for a tokenizer.

    Raises:
        UserError: when a ``vocab_size`` is given and is not the tokenizer's, or the parts do not
            fit together.
    """
    parts: dict[str, Any] = {"memory_attention": section.memory_attention}
    for name in ("decoder", "encoder"):
        part = getattr(section, name)
        given = part.vocab_size if "vocab_size" in part.model_fields_set else tokenizer.vocab_size
        if given != tokenizer.vocab_size:
            raise UserError(
                f"model.{name}.vocab_size={given}, but the tokenizer has {tokenizer.vocab_size} "
                "ids: leave vocab_size out (it is then taken from the tokenizer), or train a "
                f"tokenizer with tokenizer.vocab_size={given}."
            )
        parts[name] = part.model_copy(update={"vocab_size": given})
    return RxTConfig.parse({**parts, "tokenizer": tokenizer_config_of(tokenizer)}, "model")


def check_same_architecture(given: RxTConfig, wanted: RxTConfig, folder: Path) -> None:
    """Raise ``UserError``, listing the differences, unless weights of one fit the other."""

    free = set(NOT_ARCHITECTURE | CHANGED_BY_STAGES)

    def architecture(config: RxTConfig) -> dict[str, Any]:
        return {
            name: getattr(config, name).model_dump(mode="json", exclude=free) for name in COMPONENTS
        }

    changed = diff_mappings(architecture(given), architecture(wanted))
    if changed:
        raise UserError(
            f"the recipe's model is not that of {folder}:\n  "
            + "\n  ".join(changed)
            + "\nUse the model that the weights were trained with (or leave 'model' out), or "
            "train into another folder."
        )


def build_objective(
    recipe: ModelRecipe, model: RxTAlpha, tokenizer: Tokenizer, model_folder: Path | None = None
) -> ModelObjective:
    """Return the stage around a model, its data opened.

    Args:
        recipe: says which stage, which data, which settings.
        model: trained in place.
        tokenizer: the model's.
        model_folder: where the weights came from; what other stages kept beside the model (an MLM
            head) goes on from there.

    Raises:
        UserError: for data that cannot be used.
    """
    turns = TurnEncoder(tokenizer, turn_limit(model))
    common: dict[str, Any] = {
        "seed": recipe.train.seed,
        "accumulation": recipe.train.accumulation,
    }
    objective: ModelObjective
    summaries = {"train": DataSummary(), "valid": DataSummary()}
    if recipe.data.streaming:
        raise UserError(
            f"data.streaming=true: only stage lm reads a stream, not {recipe.stage}. Leave it out: "
            "large texts are mapped from a token cache (data.token_cache) and take no memory."
        )
    has_text = recipe.data.text is not None or bool(recipe.data.mixture)
    if isinstance(recipe, JointLMRecipe) and has_text:
        train, valid = open_text_rows(recipe.data, tokenizer, turn_limit(model), summaries)
        per_step = recipe.train.accumulation * recipe.objective.dialogues
        check_long_enough(train, recipe.objective.turns, per_step, recipe.train.steps)
        objective = JointLMObjective(model, train, valid, turns, recipe.objective, **common)
    else:
        sources = open_sources(recipe.data, summaries)
        for source in sources:
            mixed = source.sources if isinstance(source, MixedConversations) else (source,)
            for part in mixed:
                if isinstance(part, ConversationList):
                    turns.check_lengths(part.conversations, part.name)
        if isinstance(recipe, JointLMRecipe):
            objective = JointLMObjective(model, *sources, turns, recipe.objective, **common)
        elif isinstance(recipe, SFTRecipe):
            objective = SFTObjective(model, *sources, turns, recipe.objective, **common)
        elif isinstance(recipe, MemoryPretrainingRecipe):
            objective = MemoryPretrainingObjective(
                model, *sources, turns, recipe.objective, **common
            )
        elif isinstance(recipe, MemoryReinforcementRecipe):
            objective = MemoryReinforcementObjective(
                model, *sources, turns, recipe.objective, **common
            )
        elif isinstance(recipe, PreferenceRecipe):
            objective = PreferenceObjective(model, *sources, turns, recipe.objective, **common)
        else:
            objective = MemoryAwareObjective(model, *sources, turns, recipe.objective, **common)
    objective.summaries = {name: item for name, item in summaries.items() if item.num_records}
    if model_folder is not None:
        objective.load_extra_modules(model_folder)
    return objective


def open_sources(
    data: DataConfig, summaries: Mapping[str, DataSummary]
) -> tuple[ConversationSource, ConversationSource]:
    """Return training and validation conversations; ``summaries`` count what is read."""
    return (
        open_conversations(data, summary=summaries["train"]),
        open_conversations(data, "valid", summaries["valid"]),
    )


def open_text_rows(
    data: DataConfig, tokenizer: Tokenizer, length: int, summaries: Mapping[str, DataSummary]
) -> tuple[RowSource, RowSource]:
    """Return training and validation rows of ``data.text`` or ``data.mixture``."""
    settings = RowSettings(tokenizer, length)
    return (
        open_rows(data, "train", settings, summaries["train"]),
        open_rows(data, "valid", settings, summaries["valid"]),
    )


def build_on_meta(config: RxTConfig, cls: type[RxTAlpha] = RxTAlpha) -> RxTAlpha:
    """Return a model without storage, to count what it holds."""
    with torch.device("meta"):
        return cls.from_config(config)
