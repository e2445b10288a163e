"""What is measured when a pipeline has run: which settings, on which conversations, and the report.

How it is measured and what the report looks like is in :mod:`rxlm.evaluation`; here is what a
recipe has to do with it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.data.conversation_mixture import MixedConversations
from rxlm.data.conversation_source import ConversationList, open_conversations
from rxlm.data.conversations import Conversation
from rxlm.data.data_config import BUILTIN, DataConfig
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.errors import UserError
from rxlm.evaluation.card import write_results_card
from rxlm.evaluation.perplexity import (
    PerplexitySettings,
    builtin_conversations,
    evaluate_perplexity,
)
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.report import build_report, read_json, write_report
from rxlm.rxt.models import RxTAlpha
from rxlm.training.device import cpu_threads, resolve_device
from rxlm.training.metrics import read_metrics
from rxlm.training.recipes import LMRecipe, ModelRecipe, Recipe, TokenizerRecipe, read_recipe
from rxlm.training.stage import CONFIG_FILE
from rxlm.training.watching.samples import SAMPLES_FILE, read_samples

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
ProgressOf = Callable[[str], contextlib.AbstractContextManager[Progress | None]]
"""Opens a view of the progress of a piece of work with a title."""


class Measured(NamedTuple):
    """Conversations to measure perplexity on, and what a report calls them."""

    conversations: list[Conversation]
    source: str


def recall_settings(recipe: Recipe) -> RecallSettings:
    """Return the recall test of a recipe, on the dialogues that it trains on."""
    settings = recipe.evaluation.recall
    # Not whether it was given: the recipe that a run keeps has the defaults written out.
    if settings.generator != GeneratorConfig():
        return settings
    return settings.model_copy(update={"generator": recipe.data.generator})


def perplexity_conversations(data: DataConfig, settings: PerplexitySettings) -> Measured:
    """Return validation conversations; of the built-in dialogues alone, those of the test split.

    Raises:
        UserError: for files that cannot be used.
    """
    if data.dialogues == BUILTIN and not data.dialogue_mixture:
        found = builtin_conversations(DialogueGenerator(data.generator), settings)
        return Measured(found, "built-in dialogues (test)")
    source = open_conversations(data, "valid")
    if isinstance(source, MixedConversations):
        positions = range(settings.max_dialogues)
        mixed = [source.sample(position, settings.max_turns) for position in positions]
        return Measured(mixed, source.name)
    assert isinstance(source, ConversationList), "files are read as lists"
    return Measured(list(source.conversations), source.name)


def recipe_of_model(model_folder: Path) -> ModelRecipe | None:
    """Return the recipe that a checkpoint was trained with; ``None`` for other model folders."""
    path = model_folder.resolve().parent.parent / CONFIG_FILE
    if model_folder.resolve().parent.name != "checkpoints" or not path.is_file():
        return None
    recipe = read_recipe(path).recipe
    return None if isinstance(recipe, TokenizerRecipe | LMRecipe) else recipe


def evaluate_pipeline(
    recipe: ModelRecipe, folder: Path, model_folder: Path, progress: ProgressOf
) -> dict[str, Any]:
    """Measure the last model of a pipeline and write the report into its folder.

    The card in the model folder gets the results, unless somebody has written or edited it.
    Perplexity always; recall when the model was trained on the built-in dialogues. A report that
    is there is used again when it is of this very model and of these settings.

    Args:
        recipe: of the last stage.
        folder: of the pipeline: its stages' curves are part of the report, which is written there.
        model_folder: what to measure.
        progress: how to show progress.

    Returns:
        the report (see :func:`rxlm.evaluation.report.build_report`).
    """
    measured = perplexity_conversations(recipe.data, recipe.evaluation.perplexity)
    asks = recall_settings(recipe) if recipe.data.reads_builtin else None
    device = resolve_device(recipe.train.device)
    with cpu_threads(recipe.train.threads):
        model = RxTAlpha.from_pretrained(model_folder, device=device)
        report = _report_of(model, folder, recipe, measured.source, asks)
        if report is not None:
            logger.info("%s: the report is of this model already", folder / REPORT_FILE)
            write_results_card(model, model_folder, report)
            return report
        recall = None
        if asks is not None:
            with progress("recall") as shown:
                recall = evaluate_recall(model, asks, shown)
        with progress("perplexity") as shown:
            perplexity = evaluate_perplexity(
                model,
                measured.conversations,
                recipe.evaluation.perplexity,
                source=measured.source,
                progress=shown,
            )
        report = build_report(
            model,
            name=str(folder),
            recall=recall,
            perplexity=[perplexity],
            training=training_curves(folder),
            samples=last_samples(folder),
        )
        write_report(report, folder)
        write_results_card(model, model_folder, report)
    return report


def training_curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics lines of every run in a pipeline's folder, by run, in order."""
    runs = sorted(folder.glob("[0-9]*_*/metrics.jsonl"))
    return {path.parent.name: read_metrics(path) for path in runs}


def last_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the conversations of the last validation of a pipeline's last stage that held any."""
    runs = sorted(path.parent for path in folder.glob(f"[0-9]*_*/{SAMPLES_FILE}"))
    samples = read_samples(runs[-1]) if runs else []
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def _report_of(
    model: RxTAlpha,
    folder: Path,
    recipe: ModelRecipe,
    source: str,
    asks: RecallSettings | None,
) -> dict[str, Any] | None:
    """Return the report in a folder if it is of this model, data and settings."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = read_json(path)
    except UserError as error:
        logger.warning("measuring again: %s", error)
        return None
    wanted = [recipe.evaluation.perplexity.model_dump(mode="json"), source]
    given = [[item["settings"], item["source"]] for item in report["perplexity"]]
    recall = report["recall"]
    same = (
        report["model"]["fingerprint"] == model.fingerprint()._asdict()
        and given == [wanted]
        and (recall and recall["settings"]) == (asks and asks.model_dump(mode="json"))
    )
    return report if same else None
