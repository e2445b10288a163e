"""Writes docs/benchmarks/micro.md and the README's table of Micro from documents of the suite.

    for type in mha gated_deltanet kda md_gdn; do
        rxlm pipeline run stages/micro --out runs/micro-$type model.decoder.self_att_type=$type
        rxlm eval suite runs/micro-$type --json runs/micro-$type/suite.json
    done
    python scripts/suite_page.py runs/micro-mha runs/micro-gated_deltanet ...

One column a run, one row a finding with a goal. No number on the page is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from update_readme import README, fill, training_minutes

from rxlm.errors import RunError, UserError
from rxlm.evaluation.suite.comparison import (
    CHECK,
    check_same_questions,
    compared_goals,
    compared_recall,
)
from rxlm.evaluation.suite.runner import read_suite
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.storage.files import write_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "micro.md"
SUITE_FILE = "suite.json"
SHOWN = ("one_fact_near", "four_facts", "eight_facts_at_8", "updated", "after_24", "after_64",
         "unseen_words", "false_recall", "Z_minus_chance", "X_minus_chance")  # fmt: skip
"""Findings of the README's table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write page and README; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the page of Micro from suite documents.")
    parser.add_argument("runs", type=Path, nargs="+", help="pipelines that hold a suite.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the block")
    parser.add_argument("--beside", default="", help="what else ran on the machine")
    options = parser.parse_args(arguments)
    try:
        documents = {name_of(run): read_suite(run / SUITE_FILE) for run in options.runs}
        minutes = {name_of(run): training_minutes(run) for run in options.runs}
        check_same_questions(documents)
        text = page(documents, minutes, [run.name for run in options.runs], options.beside)
        readme = options.readme.read_text(encoding="utf-8")
        filled = fill(readme, {"micro": block(documents, minutes)})
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


def page(
    documents: Mapping[str, Any], minutes: Mapping[str, float], runs: Sequence[str], beside: str
) -> str:
    """Return the page as Markdown."""
    first = next(iter(documents.values()))
    environment = first["environment"]
    names = " ".join(f"runs/{run}" for run in runs)
    option = f" --beside '{beside}'" if beside else ""
    parts = [
        "# Micro: what its memory holds",
        f"Written by `python scripts/suite_page.py {names}{option}` from the documents of `rxlm "
        "eval suite`. The runs differ in the decoder's self-attention only (and in the width of "
        "its feed-forward layers, which makes up for the parameters); each is one training, seed "
        f"0, tested with {len(first['settings']['seeds'])} sets of questions. What is asked, and "
        "the controls, are explained in [Evaluation](../evaluation.md).",
        markdown_table(models(documents, minutes)).rstrip(),
        f"Training with one thread on a machine with {environment['num_cpus']} CPU cores"
        f"{f', {beside} beside it' if beside else ''}, torch {environment['torch']}.",
        "## What was asked, and what came out",
        f"{CHECK}: met. Shares in percent.",
        markdown_table(plain(compared_goals(documents))).rstrip(),
        "## Facts by distance",
        "Percent right word for word, memory on; no value asked for was told for its kind of fact "
        "in training.",
        markdown_table(plain(compared_recall(documents))).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def block(documents: Mapping[str, Any], minutes: Mapping[str, float]) -> str:
    """Return the README's block: the facts, in short."""
    table = plain(compared_goals(documents, SHOWN))
    trained = f"{min(minutes.values()):.0f} to {max(minutes.values()):.0f}"
    sizes = [document["model"]["num_parameters"] for document in documents.values()]
    count = f"{min(sizes) / 1e6:.2f}" + (
        f" to {max(sizes) / 1e6:.2f}" if max(sizes) - min(sizes) > 5e3 else ""
    )
    return "\n".join(
        [
            f"**A larger one.** `stages/micro`: {count} million parameters, trained on built-in "
            f"dialogues, bAbI and conversations that people had, in {trained} minutes of training "
            f"steps on one CPU core; by the self-attention of its decoder. {CHECK}: as was asked.",
            "",
            markdown_table(table).rstrip(),
            "",
            "More, also of what is not met, in [Micro](docs/benchmarks/micro.md).",
        ]
    )


def plain(table: Table) -> Table:
    """Return a table without its note, which the text around it says."""
    return table._replace(note="")


def models(documents: Mapping[str, Any], minutes: Mapping[str, float]) -> Table:
    """Return sizes and times."""
    sizes = [f"{document['model']['num_parameters']:,}" for document in documents.values()]
    times = [f"{minutes[name]:.1f}" for name in documents]
    return Table(
        "",
        ("", *documents),
        [("parameters", *sizes), ("minutes of training steps", *times)],
    )


if __name__ == "__main__":
    sys.exit(main())
