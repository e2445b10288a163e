"""What a recipe may say, stage by stage: the schema behind every file in ``stages/``.

A recipe is one YAML file; ``stage`` says which of the classes below it is. How YAML, ``extends``
and overrides become a mapping is in ``recipe.py``; what is built from a recipe in ``build.py``.
The settings of a stage live beside its objective, so this module loads torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rxlm.configuration import Config
from rxlm.data.data_config import DataConfig
from rxlm.errors import UserError
from rxlm.evaluation.perplexity import PerplexitySettings
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.lm.config import LMConfig
from rxlm.rxt.beta import DEFAULT_VARIANT
from rxlm.rxt.config import MemoryAttentionConfig, RxTComponentConfig
from rxlm.tokenization import TokenizerTraining
from rxlm.training.objectives.joint_lm import JointLMSettings
from rxlm.training.objectives.language_modeling import LMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import MemoryPretrainingSettings
from rxlm.training.objectives.memory_reinforcement import MemoryReinforcementSettings
from rxlm.training.objectives.preference import PreferenceSettings
from rxlm.training.objectives.sft import SFTSettings
from rxlm.training.recipe import load_recipe, parse_recipe
from rxlm.training.settings import TrainSettings, deciding_values
from rxlm.training.tokenizer_stage import TokenizerStageSettings

PREVIOUS = "previous"
"""In ``init_from`` and ``tokenizer_from``: what the recipes before this one made."""

_NUMBERED = re.compile(r"\d+_.+\.ya?ml\Z")
_SIZES_OF_MEMORY = ("num_layers", "embed_dim", "att_heads", "stm_size", "seq_len")


class ModelSection(Config):
    """The three networks. What ``encoder`` leaves out is the decoder's, as are the sizes that
    ``memory_attention`` leaves out; ``vocab_size`` left out is the tokenizer's."""

    decoder: RxTComponentConfig
    """The component that answers, reading the memory."""
    encoder: RxTComponentConfig
    """The component that reads the finished interaction."""
    memory_attention: MemoryAttentionConfig
    """The part that writes what was read into the memory."""
    architecture: Literal["alpha", "beta"] = "alpha"
    """``alpha``: answers queries (RxTAlpha); ``beta``: also thinks and calls tools (RxTBeta), and
    its ``memory_attention.variant`` is ``self-interlayer`` if it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _take_from_decoder(cls, values: Any) -> Any:
        decoder = values.get("decoder") if isinstance(values, Mapping) else None
        if not isinstance(decoder, Mapping):
            return values
        encoder, memory = values.get("encoder", {}), values.get("memory_attention", {})
        filled = dict(values)
        if isinstance(encoder, Mapping):
            filled["encoder"] = {**decoder, **encoder}
        if isinstance(memory, Mapping):
            sizes = {name: decoder[name] for name in _SIZES_OF_MEMORY if name in decoder}
            if values.get("architecture") == "beta":
                sizes["variant"] = DEFAULT_VARIANT
            filled["memory_attention"] = {**sizes, **memory}
        return filled


class EvaluationSection(Config):
    """What ``pipeline run`` measures at its end."""

    recall: RecallSettings = RecallSettings()
    """Facts asked for after a number of turns; measured on the built-in dialogues only."""
    perplexity: PerplexitySettings = PerplexitySettings()
    """Validation dialogues with the memory on, zeroed, and of another conversation."""


class Recipe(Config):
    """What the recipes of all stages have in common. A section that a stage does not read may
    stand in its recipe, so that recipes can share a parent."""

    stage: str
    """Which stage this is."""
    data: DataConfig = DataConfig()
    """Conversations and texts."""
    tokenizer: TokenizerTraining = TokenizerTraining()
    """How the tokenizer is trained (stage ``tokenizer``)."""
    init_from: str | None = PREVIOUS
    """Where the weights come from: ``previous`` (the recipe before this one), a run or model
    folder, or ``null`` for new weights."""
    tokenizer_from: str = PREVIOUS
    """Where the tokenizer comes from when there is no ``init_from``: ``previous`` (the nearest
    recipe before this one that has one), the name of a recipe beside this one (``x.yaml``: its
    run beside this run), or a folder with a tokenizer in it."""
    evaluation: EvaluationSection = EvaluationSection()
    """What is measured when a pipeline has run."""


def _which_model(section: Any) -> str:
    reactive = isinstance(section, ModelSection) or (
        isinstance(section, Mapping) and "decoder" in section
    )
    return "reactive" if reactive else "language"


class TokenizerRecipe(Recipe):
    """Stage 1: the vocabulary."""

    stage: Literal["tokenizer"]
    """Which stage this is."""
    model: (
        Annotated[
            Annotated[ModelSection, Tag("reactive")] | Annotated[LMConfig, Tag("language")],
            Discriminator(_which_model),
        ]
        | None
    ) = None
    """Not used by this stage; of either kind, so that recipes can share a parent."""
    train: TrainSettings = TrainSettings(steps=1)
    """Not used by this stage."""
    objective: TokenizerStageSettings = TokenizerStageSettings()
    """On how much text."""

    @field_validator("train", mode="before")
    @classmethod
    def _steps_are_not_needed(cls, value: Any) -> Any:
        return {"steps": 1, **value} if isinstance(value, Mapping) else value


class TrainedRecipe(Recipe):
    """A stage that trains a model with the Trainer."""

    train: TrainSettings
    """Steps, optimizer, schedule, cadence."""


class ReactiveRecipe(TrainedRecipe):
    """A stage that trains a Reactive Transformer."""

    model: ModelSection | None = None
    """The networks; ``null``: those of ``init_from``."""


class LMRecipe(TrainedRecipe):
    """A language model without a memory, from new weights or fine-tuned (``init_from``)."""

    stage: Literal["lm"]
    """Which stage this is."""
    model: LMConfig | None = None
    """The network; ``null``: that of ``init_from``."""
    init_from: str | None = None
    """A run or model folder whose weights are fine-tuned, ``previous``, or ``null`` for new
    weights."""
    objective: LMSettings = LMSettings()
    """Batch, rows."""


class JointLMRecipe(ReactiveRecipe):
    """Stage 2: encoder and decoder learn a common language."""

    stage: Literal["joint_lm"]
    """Which stage this is."""
    init_from: str | None = None
    """As in other stages, but new weights by default."""
    objective: JointLMSettings = JointLMSettings()
    """Masking, noise, batch."""


class SFTRecipe(ReactiveRecipe):
    """Stage 3: interactions."""

    stage: Literal["sft"]
    """Which stage this is."""
    objective: SFTSettings = SFTSettings()
    """Masking, noise, batch."""


class MemoryPretrainingRecipe(ReactiveRecipe):
    """Stage 4: memory attention learns to write."""

    stage: Literal["memory_pretraining"]
    """Which stage this is."""
    objective: MemoryPretrainingSettings = MemoryPretrainingSettings()
    """Targets, batch."""


class MemoryAwareRecipe(ReactiveRecipe):
    """Stage 5: answering from memory."""

    stage: Literal["memory_aware"]
    """Which stage this is."""
    objective: MemoryAwareSettings = MemoryAwareSettings()
    """Curriculum, probes, batch."""


class MemoryReinforcementRecipe(ReactiveRecipe):
    """Stage 6a: better answers over whole dialogues, by reward."""

    stage: Literal["memory_reinforcement"]
    """Which stage this is."""
    objective: MemoryReinforcementSettings = MemoryReinforcementSettings()
    """Reward, episodes, curriculum."""


class PreferenceRecipe(ReactiveRecipe):
    """Stage 6b: better answers, by pairs."""

    stage: Literal["preference"]
    """Which stage this is."""
    objective: PreferenceSettings = PreferenceSettings()
    """Loss, batch."""


ModelRecipe = (
    JointLMRecipe
    | SFTRecipe
    | MemoryPretrainingRecipe
    | MemoryAwareRecipe
    | MemoryReinforcementRecipe
    | PreferenceRecipe
)
"""A recipe that trains a Reactive Transformer."""
AnyRecipe = Annotated[TokenizerRecipe | ModelRecipe | LMRecipe, Field(discriminator="stage")]
"""A recipe: a tagged union over ``stage``."""

STAGES: dict[str, type[Recipe]] = {
    "tokenizer": TokenizerRecipe,
    "joint_lm": JointLMRecipe,
    "sft": SFTRecipe,
    "memory_pretraining": MemoryPretrainingRecipe,
    "memory_aware": MemoryAwareRecipe,
    "memory_reinforcement": MemoryReinforcementRecipe,
    "preference": PreferenceRecipe,
    "lm": LMRecipe,
}


class StageFile(NamedTuple):
    """A recipe and the file that it came from."""

    path: Path
    recipe: TokenizerRecipe | ModelRecipe | LMRecipe
    overrides: tuple[str, ...] = ()
    """``a.b=c``: what the recipe has in place of the file's settings."""

    @property
    def name(self) -> str:
        """Name of the stage in its folder, such as ``20_joint_lm``."""
        return self.path.stem


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> StageFile:
    """Return the recipe in a file, with its parents and the overrides applied.

    Args:
        path: a YAML file.
        overrides: ``a.b=c``, applied in order.

    Raises:
        UserError: for a file that cannot be read or is no recipe; it names file, line and key.
    """
    loaded = load_recipe(path, overrides)
    stage = loaded.values.get("stage")
    if stage not in STAGES:
        near = difflib.get_close_matches(str(stage), STAGES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        given = "there is no 'stage'" if stage is None else f"stage: {stage!r} is unknown"
        where = loaded.origins.get("stage", str(path))
        raise UserError(f"{where}: {given}; expected one of {', '.join(STAGES)}.{hint}")
    # The class is known, so it is named instead of the union: messages stay free of its tags.
    return StageFile(Path(path), parse_recipe(loaded, STAGES[stage]), tuple(overrides))


def recipe_files(folder: str | Path) -> list[Path]:
    """Return the numbered recipes of a folder (``10_tokenizer.yaml``) in their order.

    Raises:
        UserError: when there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder of recipes like stages/nano.")
    files = [path for path in folder.iterdir() if _NUMBERED.match(path.name)]
    if not files:
        raise UserError(f"{folder}: holds no numbered recipe such as 10_tokenizer.yaml.")
    return sorted(files, key=lambda path: (int(path.name.split("_")[0]), path.name))


def read_folder(folder: str | Path, overrides: Sequence[str] = ()) -> list[StageFile]:
    """Return all numbered recipes of a folder.

    Args:
        folder: holds the recipes.
        overrides: ``a.b=c`` for every stage; ``20_joint_lm.a.b=c`` or ``joint_lm.a.b=c`` for one.

    Raises:
        UserError: see :func:`read_recipe`; also for an override of no stage.
    """
    files = recipe_files(folder)
    stage_of = {path.stem: load_recipe(path).values.get("stage") for path in files}
    known = {*stage_of, *(str(stage) for stage in stage_of.values())}
    routed = [route_override(override, known) for override in overrides]
    stages = []
    for path in files:
        names = {None, path.stem, stage_of[path.stem]}
        stages.append(read_recipe(path, [text for name, text in routed if name in names]))
    return stages


def route_override(override: str, stages: set[str]) -> tuple[str | None, str]:
    """Split ``stage.a.b=c`` into the stage (``None``: every stage) and ``a.b=c``.

    ``tokenizer.vocab_size=500`` is the section of every recipe, ``tokenizer.data.seed=1`` the
    stage of that name: a stage is meant when a section of a recipe follows.

    Raises:
        UserError: when the first key is neither a section nor a stage.
    """
    key, equals, value = override.partition("=")
    first, _, rest = key.strip().partition(".")
    sections = set(MemoryAwareRecipe.model_fields)
    if first in stages and rest.split(".")[0] in sections:
        return first, f"{rest}{equals}{value}"
    if first not in sections:
        names = sorted(sections | stages)
        near = difflib.get_close_matches(first, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}."
        raise UserError(f"override '{override}': no section or stage is called '{first}': {hint}")
    return None, override


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe, every default filled in, as JSON values.

    A ``vocab_size`` that the recipe leaves to the tokenizer is left out.
    """
    values = recipe.model_dump(mode="json")
    model = getattr(recipe, "model", None)
    if isinstance(model, ModelSection):
        for name in ("decoder", "encoder"):
            if "vocab_size" not in getattr(model, name).model_fields_set:
                del values["model"][name]["vocab_size"]
    elif isinstance(model, LMConfig) and "vocab_size" not in model.model_fields_set:
        del values["model"]["vocab_size"]
    return values


def result_values(recipe: Recipe) -> dict[str, Any]:
    """Return the part of :func:`recipe_values` that decides what the stage makes."""
    values = deciding_values(recipe_values(recipe))
    if recipe.stage == "tokenizer":
        return {name: values[name] for name in ("stage", "data", "tokenizer", "objective")}
    for name in ("tokenizer", "evaluation"):
        del values[name]
    return values
