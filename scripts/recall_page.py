"""Writes docs/benchmarks/nano_recall.md from the reports of finished pipelines.

    rxlm pipeline run stages/nano-linear --out runs/nano-linear
    python scripts/recall_page.py runs/nano-linear [runs/nano ...]

The first run is held against what was asked of stages/nano-linear. No number on the page is written
by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from update_readme import recall_table, training_minutes, training_processes, workers

from rxlm.errors import RunError, UserError
from rxlm.evaluation.recall_summary import pool
from rxlm.evaluation.report import read_json
from rxlm.evaluation.result_tables import percent
from rxlm.evaluation.rows import matching
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.storage.files import write_bytes
from rxlm.training.final_evaluation import REPORT_FILE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "nano_recall.md"
MAXIMUM_MINUTES = 15
NAMES = {"updated": "changed facts", "stale": "old value", "declined": "never told, declined"}


class Bar(NamedTuple):
    """One thing that was asked: rows of the recall test, and the least mean of each."""

    text: str
    wanted: dict[str, Any]
    least: float
    distances: tuple[int, ...]


BARS = (
    Bar("4 facts, each distance of 1 to 8", {"test": "recall", "facts": 4}, 0.98, (1, 2, 4, 8)),
    Bar("changed facts", {"test": "update"}, 0.97, ()),
    Bar("4 facts, asked 24 turns later", {"test": "recall", "facts": 4}, 0.95, (24,)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the recall page of the nano models.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pipelines")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write")
    options = parser.parse_args(arguments)
    try:
        text = page(options.runs)
        write_bytes(options.page, text.encode("utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def page(runs: Sequence[Path]) -> str:
    """Return the page as Markdown."""
    names = " ".join(f"runs/{run.name}" for run in runs)
    parts = [
        "# Recall of the nano models",
        f"Written by `python scripts/recall_page.py {names}` from the reports of `rxlm pipeline "
        "run stages/NAME --out runs/NAME`. Percent of facts recalled word for word, by "
        "the turns since they were told and the number of facts held; no value asked for was told "
        "for its kind of fact in training. Zeroed and swapped are controls: the memory (slots and "
        "carried state) is emptied, or is that of another conversation.",
        "## What was asked of `stages/nano-linear`, and what came out",
        markdown_table(bars(runs[0])).rstrip(),
    ]
    for run in runs:
        parts += section(run)
    return "\n\n".join(parts) + "\n"


def recall_of(run: Path) -> dict[str, Any]:
    """Return the report of a run.

    Raises:
        UserError: if it holds no recall test.
    """
    report: dict[str, Any] = read_json(run / REPORT_FILE)
    if report.get("recall") is None:
        raise UserError(f"{run / REPORT_FILE} holds no recall test: run the pipeline to its end.")
    return report


def bars(run: Path) -> Table:
    """Return what was asked, what was measured, and whether it was met."""
    recall = recall_of(run)["recall"]
    main_test = recall["settings"]["unseen"][0]
    body = []
    for bar in BARS:
        rows = matching(
            recall["rows"],
            unseen=main_test,
            history="reference",
            condition="memory",
            **bar.wanted,
        )
        distances = bar.distances or tuple(sorted({row["distance"] for row in rows}))
        means = {
            distance: pool(found).mean
            for distance in distances
            if (found := matching(rows, distance=distance))
        }
        shown = ", ".join(f"{distance}: {percent(mean)}" for distance, mean in means.items())
        complete = bool(means) and len(means) == len(distances)
        enough = complete and min(means.values()) >= bar.least
        body.append((f"{bar.text} >= {bar.least:.0%}", f"{shown} %", "yes" if enough else "NO"))
    minutes = training_minutes(run)
    met = "yes" if minutes <= MAXIMUM_MINUTES else "NO"
    body.append((f"trained in {MAXIMUM_MINUTES} minutes", f"{minutes:.1f} minutes", met))
    return Table("", ("asked", "measured", "met"), body)


def section(run: Path) -> list[str]:
    """Return the table of one run, and how it was made."""
    report = recall_of(run)
    recall, model, environment = report["recall"], report["model"], report["environment"]
    figures = "; ".join(
        f"{NAMES[item['name']]} {percent(item['value'])} %"
        for item in recall["summary"]
        if item["name"] in NAMES
    )
    return [
        f"## `stages/{run.name}`",
        markdown_table(recall_table(recall["rows"], recall["settings"]["unseen"][0])).rstrip(),
        f"{figures[:1].upper()}{figures[1:]}. {model['num_parameters']:,} parameters, "
        f"{training_minutes(run):.1f} minutes of training steps, "
        f"{workers(environment, training_processes(run))} on a machine with "
        f"{environment['num_cpus']} CPU cores, torch {environment['torch']}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
