"""The model that a recipe describes, before anything is trained: for counting, not for running.

Files that only hold what stages share (``_base.yaml``) are read, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.rxt.config import RxTConfig
from rxlm.tokenization import TokenizerTraining
from rxlm.training.recipe import LoadedRecipe, load_recipe, parse_recipe
from rxlm.training.recipes import ModelSection

BASE = "_base.yaml"
"""What the recipes of a folder share."""


class DescribedModel(Config):
    """The sections of a recipe that say what the model is."""

    tokenizer: TokenizerTraining = TokenizerTraining()
    """Its ``vocab_size`` is the model's where that leaves it out."""
    model: ModelSection
    """The networks."""


def described_model(path: str | Path, overrides: Sequence[str] = ()) -> RxTConfig:
    """Return the configuration of the model in a recipe, or in the ``_base.yaml`` of a folder.

    A vocabulary that is left to the tokenizer has the size that the tokenizer may have at most.

    Args:
        path: a recipe, a file without a stage that recipes extend, or a folder with a base.
        overrides: ``a.b=c``, applied in order.

    Raises:
        UserError: if there is no model, it is invalid, or its parts do not fit together.
    """
    path = Path(path)
    file = path / BASE if path.is_dir() else path
    loaded = load_recipe(file, overrides)
    sections = DescribedModel.model_fields
    values = {name: value for name, value in loaded.values.items() if name in sections}
    if values.get("model") is None:
        raise UserError(
            f"{file}: there is no 'model' in it (the stage takes that of init_from): name the "
            "recipe or the file that describes it."
        )
    described: DescribedModel = parse_recipe(LoadedRecipe(values, loaded.origins), DescribedModel)
    parts = {"memory_attention": described.model.memory_attention}
    components = {}
    for name in ("decoder", "encoder"):
        part = getattr(described.model, name)
        if "vocab_size" not in part.model_fields_set:
            part = part.model_copy(update={"vocab_size": described.tokenizer.vocab_size})
        components[name] = part
    return RxTConfig.parse({**components, **parts}, f"{file}: model")
