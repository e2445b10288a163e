"""``rxlm eval``: measure a model: recall, perplexity, a language model's table, the whole suite."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console

if TYPE_CHECKING:
    from rxlm.configuration import ConfigType
    from rxlm.evaluation.progress import Progress
    from rxlm.rxt.models import RxTAlpha

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often work in a pipe says where it is."""

ModelDir = Annotated[
    str, typer.Argument(help="A pipeline's folder, a run, a checkpoint or a model folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the test, such as dialogues=20."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all results as JSON."),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a page with tables and figures."),
]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads; small models are fastest on one.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]


def register(app: typer.Typer) -> None:
    """Add ``eval`` to the command line."""
    family = typer.Typer(help="Measure a model.", no_args_is_help=True)
    family.command("recall")(recall)
    family.command("perplexity")(perplexity)
    family.command("lm")(language_model)
    family.command("suite")(suite)
    family.command("compare")(compare)
    app.add_typer(family, name="eval")


def recall(
    model_dir: ModelDir,
    overrides: Overrides = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sets of test dialogues: seeds 0 to N - 1."),
    ] = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Ask for facts a number of turns after they were told, with and without the memory.

    Example: rxlm eval recall runs/nano --json recall.json
    """
    from rxlm.evaluation.recall import evaluate_recall
    from rxlm.evaluation.recall_plan import RecallSettings
    from rxlm.evaluation.report import build_report
    from rxlm.storage.hub import local_folder
    from rxlm.training.device import cpu_threads
    from rxlm.training.final_evaluation import recall_settings, recipe_of_model

    check_writable(json_file, html_file)
    recipe = recipe_of_model(local_folder(model_dir))
    base = RecallSettings() if recipe is None else recall_settings(recipe)
    words = list(overrides or [])
    if seeds is not None:
        words.append(f"seeds={list(range(seeds))}")
    settings = with_overrides(base, words)
    with cpu_threads(threads):
        model = load_model(model_dir, device)
        with work_progress("recall") as shown:
            result = evaluate_recall(model, settings, shown)
        report = build_report(model, name=model_dir, recall=result)
    _show(report, json_file, html_file)


def perplexity(
    model_dir: ModelDir,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Conversations, or 'builtin'.  [default: the model's own]"
        ),
    ] = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Measure the perplexity of answers with the memory on, zeroed, and of another conversation.

    Example: rxlm eval perplexity runs/nano --data my.valid.jsonl max_dialogues=50
    """
    from rxlm.data.data_config import BUILTIN, DataConfig
    from rxlm.data.sources import load_conversations
    from rxlm.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
    from rxlm.evaluation.report import build_report
    from rxlm.storage.hub import local_folder
    from rxlm.training.device import cpu_threads
    from rxlm.training.final_evaluation import (
        Measured,
        perplexity_conversations,
        recipe_of_model,
    )

    check_writable(json_file, html_file)
    recipe = recipe_of_model(local_folder(model_dir))
    base = PerplexitySettings() if recipe is None else recipe.evaluation.perplexity
    settings = with_overrides(base, overrides or [])
    if data is not None and data != BUILTIN:
        measured = Measured(load_conversations(data), data)
    else:
        own = recipe is not None and data is None
        measured = perplexity_conversations(recipe.data if own else DataConfig(), settings)  # type: ignore[union-attr]
    with cpu_threads(threads):
        model = load_model(model_dir, device)
        with work_progress("perplexity") as shown:
            result = evaluate_perplexity(
                model, measured.conversations, settings, source=measured.source, progress=shown
            )
        report = build_report(model, name=model_dir, perplexity=[result])
    _show(report, json_file, html_file)


def language_model(
    model_dir: Annotated[
        str, typer.Argument(help="A run, a checkpoint or a model folder of a language model.")
    ],
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts, or 'builtin'.  [default: the model's own]"),
    ] = None,
    json_file: JsonFile = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Measure a language model without a memory: perplexity, bytes and tokens per second.

    Example: rxlm eval lm runs/lm/tiny --data my.txt rounds=3
    """
    from rxlm.evaluation.language_model import (
        LMEvaluationSettings,
        evaluate_language_model,
        language_model_table,
    )
    from rxlm.evaluation.report import write_json
    from rxlm.evaluation.tables import rich_table
    from rxlm.lm.language_model import LanguageModel
    from rxlm.storage.hub import local_folder
    from rxlm.training.device import cpu_threads, resolve_device
    from rxlm.training.lm_evaluation import evaluated_text, lm_recipe_of_model

    check_writable(json_file)
    settings = with_overrides(LMEvaluationSettings(), overrides or [])
    folder = local_folder(model_dir)
    with cpu_threads(threads):
        model = LanguageModel.from_pretrained(folder, device=resolve_device(device))
        recipe = lm_recipe_of_model(folder)
        text = evaluated_text(model, data, recipe, settings.max_documents)
        with work_progress("language model") as shown:
            result = evaluate_language_model(model, text, settings, name=model_dir, progress=shown)
    if json_file is not None:
        write_json(result, json_file)
    console.results().print(rich_table(language_model_table(result)))


def suite(
    model_dir: ModelDir,
    overrides: Overrides = None,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
    tests: Annotated[
        str | None,
        typer.Option(
            metavar="T1,T2,...",
            help="Which of facts, babi, dialogues, cost, reward, slots.  [default: all]",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,...", help="Sets of test questions.  [default: 0,1,2]"),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="LM_DIR",
            help="A language model of equal size and the same tokenizer, for the controls F and N.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in under a minute: few questions, one seed.")
    ] = False,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Run the tests of the memory suite, with every control beside every number.

    Real dialogues are read from the folder that RXLM_DATA names; tests that need them are skipped
    without it. Tests that are finished in the JSON file are not run again.

    Example: rxlm eval suite runs/nano --html suite.html --baseline runs/nano-baseline
    """
    from rxlm.evaluation.suite.figures import draw_suite
    from rxlm.evaluation.suite.page import baseline_note, provenance, suite_page, verdict
    from rxlm.evaluation.suite.runner import Subject, run_suite
    from rxlm.evaluation.suite.settings import SuiteSettings
    from rxlm.evaluation.suite.tables import suite_tables
    from rxlm.evaluation.tables import rich_table
    from rxlm.lm.language_model import LanguageModel
    from rxlm.storage.files import write_bytes
    from rxlm.training.device import cpu_threads, resolve_device

    check_writable(json_file, html_file)
    words = list(overrides or [])
    words += [] if tests is None else [f"tests=[{tests}]"]
    words += [] if seeds is None else [f"seeds=[{seeds}]"]
    settings = with_overrides(SuiteSettings.quick() if quick else SuiteSettings(), words)
    data = real_data()
    with cpu_threads(threads):
        model = load_model(model_dir, device)
        other = None
        if baseline is not None:
            other = LanguageModel.from_pretrained(baseline, device=resolve_device(device))
        document = run_suite(
            Subject(model, other, data),
            settings,
            progress=work_progress,
            name=model_dir,
            baseline_name=baseline or "",
            keep=json_file,
        )
    if json_file is not None:
        from rxlm.evaluation.report import write_json

        write_json(document, json_file)
    if html_file is not None:
        write_bytes(html_file, suite_page(document, draw_suite(document)).encode("utf-8"))
    for table in suite_tables(document):
        console.results().print(rich_table(table))
    for line in (verdict(document), baseline_note(document), provenance(document)):
        console.results().print(line, markup=False, highlight=False)


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What rxlm eval suite --json wrote.")
    ],
    names: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Names of the columns.  [default: the models' folders]"
        ),
    ] = None,
) -> None:
    """Set the suite's results of several models side by side.

    They must have been asked the same questions; tests that only some have run stay in the table.

    Example: rxlm eval compare runs/a/suite.json runs/b/suite.json --names kda,gated_deltanet
    """
    from rxlm.errors import UserError
    from rxlm.evaluation.suite.comparison import comparison_tables
    from rxlm.evaluation.suite.runner import read_suite
    from rxlm.evaluation.tables import rich_table

    read = [read_suite(file) for file in files]
    given = [
        document["model"]["name"] or str(file) for document, file in zip(read, files, strict=True)
    ]
    if names is not None:
        given = [name.strip() for name in names.split(",")]
    if len(given) != len(read) or len(set(given)) < len(given):
        raise UserError(
            f"{len(read)} files and the columns {', '.join(given)}: give --names, one for each "
            "file, all different."
        )
    for table in comparison_tables(dict(zip(given, read, strict=True))):
        console.results().print(rich_table(table))


def real_data() -> Path | None:
    """Return the folder of real dialogues that ``RXLM_DATA`` names; None without it.

    Raises:
        UserError: if it names no folder.
    """
    import os

    from rxlm.errors import UserError

    value = os.environ.get("RXLM_DATA")
    if not value:
        return None
    if not Path(value).is_dir():
        raise UserError(f"RXLM_DATA={value} is not a folder: it should hold dialogues/ and text/.")
    return Path(value)


def with_overrides(settings: ConfigType, overrides: list[str]) -> ConfigType:
    """Return settings with ``key=value`` applied.

    Raises:
        UserError: for a key that is not there or a value that is not valid.
    """
    from rxlm.training.recipe import apply_overrides

    values = apply_overrides(settings.model_dump(mode="json"), overrides)
    return type(settings).parse(values, "settings")


def print_tables(report: Mapping[str, Any]) -> None:
    """Print the tables of a report."""
    from rxlm.evaluation.report import console_tables

    for table in console_tables(report):
        console.results().print(table)


@contextlib.contextmanager
def work_progress(title: str) -> Iterator[Progress]:
    """Show the progress of a piece of work: a bar on a terminal, now and then a line in a pipe."""
    if not console.messages().is_terminal:
        yield _PlainProgress(title)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}", markup=False),
    )
    with Progress(*columns, console=console.messages()) as bar:
        task = bar.add_task(title, total=None, doing="")

        def show(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, doing=doing)

        yield show


class _PlainProgress:
    """A log line at the end, and every few seconds before."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = self._last = time.monotonic()

    def __call__(self, done: int, total: int, doing: str) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            seconds = now - self._begin
            logger.info("%s %d/%d (%.0f s): %s", self._title, done, total, seconds, doing)


def load_model(model_dir: str, device: str) -> RxTAlpha:
    """Return the model that a folder means, on a device."""
    from rxlm.rxt.models import RxTAlpha
    from rxlm.training.device import resolve_device

    return RxTAlpha.from_pretrained(model_dir, device=resolve_device(device))


def _show(report: Mapping[str, Any], json_file: Path | None, html_file: Path | None) -> None:
    """Print the tables and write the files that were asked for."""
    from rxlm.evaluation.figures import draw_figures
    from rxlm.evaluation.pages import html_page
    from rxlm.evaluation.report import write_json
    from rxlm.storage.files import write_bytes

    if json_file is not None:
        write_json(report, json_file)
    if html_file is not None:
        write_bytes(html_file, html_page(report, draw_figures(report)).encode("utf-8"))
    print_tables(report)


def check_writable(*files: Path | None) -> None:
    """Raise ``UserError`` now, not after minutes of work, when a result file cannot be written."""
    from rxlm.errors import UserError

    for file in files:
        if file is not None and file.is_dir():
            raise UserError(f"{file} is a folder: give the name of a file.")
        if file is not None and not file.absolute().parent.is_dir():
            raise UserError(f"{file}: the folder {file.absolute().parent} does not exist.")
