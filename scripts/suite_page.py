"""Writes docs/benchmarks/micro.md and the README's table of Micro from documents of the suite.

    rxlm pipeline run stages/micro --out runs/micro-mha --no-eval
    rxlm pipeline run stages/micro --out runs/micro-md_gdn --no-eval \\
        model.decoder.self_att_type=md_gdn model.decoder.ff_dim=232 \\
        50_memory_aware.train.lr=1.5e-3 55_stories.train.lr=1e-3
    for run in runs/micro-*; do
        rxlm eval suite $run --json $run/suite.json --tests facts,babi,dialogues \\
            facts.dialogues=34 babi.questions=40 dialogues.conversations=20
    done
    python scripts/suite_page.py runs/micro-mha runs/micro-md_gdn

One column a run, one row a finding with a goal. No number on the page is written by hand. A
run that was stopped before its end is shown as such.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from update_readme import README, fill

from rxlm.errors import RunError, UserError
from rxlm.evaluation.result_tables import NO_VALUE
from rxlm.evaluation.suite.comparison import (
    CHECK,
    check_same_questions,
    compared_goals,
    compared_recall,
)
from rxlm.evaluation.suite.runner import read_suite
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.storage.files import write_bytes
from rxlm.training.recipes import LMRecipe, TokenizerRecipe, read_recipe
from rxlm.training.run_folder import read_status

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "micro.md"
SUITE_FILE = "suite.json"
SHOWN = ("one_fact_near", "four_facts", "eight_facts_at_8", "updated", "after_24", "after_64",
         "unseen_words", "false_recall", "Z_minus_chance", "X_minus_chance")  # fmt: skip
"""Findings of the README's table."""


class Stage(NamedTuple):
    """How a stage was trained, ``updates`` of ``planned``."""

    name: str
    updates: int
    planned: int
    learning_rate: float


class Training(NamedTuple):
    """How a run was trained: its stages after the tokenizer, minutes in all."""

    stages: tuple[Stage, ...]
    minutes: float
    ff_dim: int | None
    seed: int
    threads: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write page and README; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the page of Micro from suite documents.")
    parser.add_argument("runs", type=Path, nargs="+", help="pipelines that hold a suite.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the block")
    parser.add_argument("--beside", default="", help="what else ran on the machine")
    parser.add_argument(
        "--paused",
        nargs="*",
        default=[],
        metavar="NAME=MINUTES",
        help="trainings suspended so long",
    )
    parser.add_argument("--note", default="", help="what else a reader has to know")
    options = parser.parse_args(arguments)
    try:
        documents = {name_of(run): read_suite(run / SUITE_FILE) for run in options.runs}
        paused = minutes_of(options.paused, documents)
        trained = {name_of(run): training_of(run, paused[name_of(run)]) for run in options.runs}
        check_same_questions(documents)
        names = " ".join(f"runs/{run.name}" for run in options.runs)
        names += f" --beside '{options.beside}'" * bool(options.beside)
        names += f" --paused {' '.join(options.paused)}" * bool(options.paused)
        names += f" --note {shlex.quote(options.note)}" * bool(options.note)
        text = page(documents, trained, names, options.beside, paused, options.note)
        readme = options.readme.read_text(encoding="utf-8")
        filled = fill(readme, {"micro": block(documents, trained)})
        write_bytes(options.page, text.encode("utf-8"))
        write_bytes(options.readme, filled.encode("utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def name_of(run: Path) -> str:
    """Return what a column is called: runs/micro-kda is kda."""
    return run.name.partition("-")[2] or run.name


def minutes_of(words: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """Return the minutes of each name, 0 where no ``name=minutes`` is among the words.

    Raises:
        UserError: for another form, or a name that is not there.
    """
    minutes = dict.fromkeys(names, 0.0)
    for word in words:
        name, _, value = word.partition("=")
        if name not in minutes or re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) is None:
            raise UserError(
                f"--paused {word!r}: expected NAME=MINUTES, with a name of {', '.join(minutes)}."
            )
        minutes[name] = float(value)
    return minutes


def training_of(run: Path, paused: float) -> Training:
    """Return how the pipeline in ``run`` was trained; ``paused`` minutes are no training.

    Raises:
        UserError: if it has no stage that trained a model.
    """
    stages, seconds, recipe = [], 0.0, None
    for folder in sorted(path for path in run.glob("[0-9]*_*") if path.is_dir()):
        status = read_status(folder)
        if status is None:
            continue
        seconds += status.seconds
        found = read_recipe(folder / "config.yaml").recipe
        if not isinstance(found, TokenizerRecipe | LMRecipe):
            recipe, train = found, found.train
            stages.append(Stage(folder.name, status.step, train.steps, train.lr))
    if recipe is None:
        raise UserError(f"{run} holds no stages of a model: run 'rxlm pipeline run' first.")
    ff_dim = None if recipe.model is None else recipe.model.decoder.ff_dim
    minutes = seconds / 60 - paused
    return Training(tuple(stages), minutes, ff_dim, recipe.train.seed, recipe.train.threads)


def page(
    documents: Mapping[str, Any],
    trained: Mapping[str, Training],
    command: str,
    beside: str,
    paused: Mapping[str, float],
    note: str,
) -> str:
    """Return the page as Markdown."""
    first = next(iter(documents.values()))
    environment = first["environment"]
    parts = [
        "# Micro: what its memory holds",
        f"Written by `python scripts/suite_page.py {command}` from the documents of `rxlm eval "
        "suite`. The runs differ in the decoder's self-attention, in the width of its "
        "feed-forward layers, which makes up for the parameters, and in the learning rate; each is "
        f"one training, tested with {len(first['settings']['seeds'])} set(s) of questions. "
        "What is asked, and the controls, are explained in [Evaluation](../evaluation.md).",
        markdown_table(models(documents, trained)).rstrip(),
        f"Trained on a machine with {environment['num_cpus']} CPU cores"
        f"{f', {beside} beside it' if beside else ''}, torch {environment['torch']}."
        + "".join(
            f" {name} was suspended for {minutes:g} minutes, which are left out."
            for name, minutes in paused.items()
            if minutes
        ),
        *([note] if note else []),
        "## What was asked, and what came out",
        f"{CHECK}: met. Shares in percent.",
        markdown_table(plain(compared_goals(documents))).rstrip(),
        "## Facts by distance",
        "Percent right word for word, memory on; no value asked for was told for its kind of fact "
        "in training.",
        markdown_table(plain(compared_recall(documents))).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def block(documents: Mapping[str, Any], trained: Mapping[str, Training]) -> str:
    """Return the README's block: the facts, in short."""
    table = plain(compared_goals(documents, SHOWN))
    minutes = [item.minutes for item in trained.values()]
    unfinished = [
        f"{name} was stopped after {stage.updates:,} of {stage.planned:,} updates of {stage.name}. "
        for name, item in trained.items()
        for stage in item.stages
        if stage.updates < stage.planned
    ]
    sizes = [document["model"]["num_parameters"] for document in documents.values()]
    count = f"{min(sizes) / 1e6:.2f}" + (
        f" to {max(sizes) / 1e6:.2f}" if max(sizes) - min(sizes) > 5e3 else ""
    )
    return "\n".join(
        [
            f"**A larger one.** `stages/micro`: {count} million parameters, trained on built-in "
            f"dialogues, bAbI and conversations that people had, in {min(minutes):.0f} to "
            f"{max(minutes):.0f} minutes of training steps on one CPU core; by the self-attention "
            f"of its decoder. {CHECK}: as was asked.",
            "",
            markdown_table(table).rstrip(),
            "",
            "".join(unfinished)
            + "More, also of what is not met, in [Micro](docs/benchmarks/micro.md).",
        ]
    )


def plain(table: Table) -> Table:
    """Return a table without its note, which the text around it says."""
    return table._replace(note="")


def models(documents: Mapping[str, Any], trained: Mapping[str, Training]) -> Table:
    """Return sizes and times."""
    rows = {
        "parameters": [document["model"]["num_parameters"] for document in documents.values()],
        "width of the decoder's feed-forward layers": [
            NO_VALUE if item.ff_dim is None else str(item.ff_dim) for item in trained.values()
        ],
        "seed": [str(item.seed) for item in trained.values()],
        "threads": [NO_VALUE if i.threads is None else str(i.threads) for i in trained.values()],
    }
    # Their numbers say in which order they are trained.
    names = sorted({stage.name for item in trained.values() for stage in item.stages})
    for name in names:
        of_run = [{stage.name: stage for stage in item.stages} for item in trained.values()]
        rows[f"{name}: updates, learning rate"] = [
            _updates(stages[name]) if name in stages else NO_VALUE for stages in of_run
        ]
    rows["minutes of training steps"] = [f"{item.minutes:.0f}" for item in trained.values()]
    body = [
        (name, *(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells))
        for name, cells in rows.items()
    ]
    return Table("", ("", *documents), body)


def _updates(stage: Stage) -> str:
    unfinished = f" of {stage.planned:,}" * (stage.updates < stage.planned)
    return f"{stage.updates:,}{unfinished}, {stage.learning_rate:g}"


if __name__ == "__main__":
    sys.exit(main())
