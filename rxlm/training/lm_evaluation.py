"""Which text a language model is measured on: a file, or the validation part of its own data.

How it is measured is in :mod:`rxlm.evaluation.language_model`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from rxlm.data.data_config import BUILTIN, DataConfig
from rxlm.data.dataset_texts import is_dataset, load_dataset_texts
from rxlm.data.records import DataSummary
from rxlm.data.sources import load_texts
from rxlm.errors import UserError
from rxlm.evaluation.language_model import EvaluatedText
from rxlm.lm.language_model import LanguageModel
from rxlm.training.corpus import stream_validation_texts
from rxlm.training.objectives.language_modeling import LMSettings, row_length
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.recipes import LMRecipe, read_recipe
from rxlm.training.stage import CONFIG_FILE
from rxlm.training.texts import iter_texts, open_documents


def lm_recipe_of_model(model_folder: Path) -> LMRecipe | None:
    """Return the recipe that a checkpoint was trained with; ``None`` for other model folders."""
    path = model_folder.resolve().parent.parent / CONFIG_FILE
    if model_folder.resolve().parent.name != "checkpoints" or not path.is_file():
        return None
    recipe = read_recipe(path).recipe
    return recipe if isinstance(recipe, LMRecipe) else None


def evaluated_text(
    model: LanguageModel, data: str | None, recipe: LMRecipe | None, max_documents: int
) -> EvaluatedText:
    """Return what a model is measured on, in rows as it was trained on.

    Args:
        model: with its tokenizer.
        data: a file, folder, glob or data set of texts, or ``builtin``; None: the validation
            documents of ``recipe`` (without one: the built-in dialogues).
        recipe: that the model was trained with.
        max_documents: at most so many documents, the first ones.

    Raises:
        UserError: for data that cannot be used.
    """
    settings = LMSettings() if recipe is None else recipe.objective
    own = DataConfig() if recipe is None else recipe.data
    if data is None and settings.interactions:
        raise UserError(
            "this model was trained on interactions (objective.interactions=true), whose answers "
            "`rxlm eval suite MODEL --baseline` measures; give --data for a text."
        )
    if data is None or data == BUILTIN:
        chosen = own if data is None else DataConfig(generator=own.generator)
        documents = _validation_documents(chosen, max_documents, settings.turns)
        source = f"{chosen.text or chosen.dialogues} (valid)"
    elif is_dataset(data):
        documents = load_dataset_texts(
            data, split=own.text_split, field=own.text_field, limit=max_documents
        )
        source = data
    else:
        documents, source = load_texts(data), data
    return text_in_rows(model, documents[:max_documents], source, row_length(model, settings))


def _validation_documents(data: DataConfig, limit: int, turns: int) -> list[str]:
    if data.streaming:
        return stream_validation_texts(data, limit)
    if data.text is not None or data.mixture:
        return list(itertools.islice(iter_texts(data, "valid", DataSummary()), limit))
    return open_documents(data, "valid", limit, turns)


def text_in_rows(
    model: LanguageModel, documents: Sequence[str], source: str, length: int
) -> EvaluatedText:
    """Return documents as rows of at most ``length`` tokens, with their size and hash."""
    digest = hashlib.sha256()
    for document in documents:
        # The length first, so that where documents begin is part of the hash.
        digest.update(f"{len(document)}\0{document}".encode())
    rows = TextRows(documents, model.require_tokenizer(), length, name=source)
    return EvaluatedText(
        rows=list(rows.rows()),
        num_documents=len(documents),
        num_bytes=sum(len(document.encode()) for document in documents),
        source=source,
        sha256=digest.hexdigest(),
    )
