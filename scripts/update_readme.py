"""Fills the README's transcript and recall table from a pipeline's report.

    make quickstart
    python scripts/update_readme.py runs/nano             # rewrites the two blocks
    python scripts/update_readme.py runs/nano --check     # exit status 1 if they would change

Nothing between the markers is written by hand, so every number there was printed by a command.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import RunError, UserError
from rxlm.evaluation.recall_summary import mean_chance, pool
from rxlm.evaluation.report import read_json
from rxlm.evaluation.result_tables import percent
from rxlm.evaluation.rows import RecallRow, matching
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.storage.files import write_bytes
from rxlm.training.final_evaluation import REPORT_FILE
from rxlm.training.run_folder import read_status

README = Path(__file__).resolve().parents[1] / "README.md"
FIGURES = ("updated", "stale", "declined")
"""Named figures of the recall test that stand below the table."""
NOVELTY = {
    "pairs": "No value asked for was told for its kind of fact in training.",
    "templates": "Facts and questions are worded as never in training.",
    "words": "The values are made-up words.",
    "none": "The dialogues are new, their words and values are not.",
}
"""What the test dialogues hold that training did not, by the ``unseen`` of the main test."""
HARDER = {"words": "made-up words", "templates": "wordings never met in training"}
"""What stands below the table of harder questions for told facts, by their ``unseen``."""
FARTHEST_OF_HARDER = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Update or check the README; return the exit status."""
    parser = argparse.ArgumentParser(description="Fill the README from a pipeline's report.")
    parser.add_argument("run", type=Path, help="folder of a pipeline, such as runs/nano")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument(
        "--beside", default="", help="what else ran on the machine, such as 'another training'"
    )
    parser.add_argument("--readme", type=Path, default=README, help="the file with the blocks")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = fill(before, render_blocks(options.run, options.beside))
        if after != before and not options.check:
            write_bytes(options.readme, after.encode("utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if after == before:
        print(f"{options.readme}: up to date")
        return 0
    if options.check:
        lines = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "README now", "README of the run", lineterm=""
        )
        print("\n".join(lines))
        return 1
    print(f"{options.readme}: updated")
    return 0


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Return ``text`` with the content of each named block replaced.

    Raises:
        UserError: if the markers of a block are not there exactly once.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed) or begin in rest:
            raise UserError(f"expected one block '{begin} ... {end}' in the README.")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def render_blocks(run: Path, beside: str = "") -> dict[str, str]:
    """Return the content of the blocks ``transcript`` and ``recall``.

    ``beside``: what else ran on the machine, for the reader of the minutes.

    Raises:
        UserError: if the run has no report, or the report lacks a part.
    """
    report = read_json(run / REPORT_FILE)
    if report["recall"] is None:
        raise UserError(
            f"{run / REPORT_FILE} holds no recall test; it is made for runs on built-in dialogues: "
            "rxlm pipeline run stages/nano"
        )
    if not report["transcript"]:
        raise UserError(f"{run / REPORT_FILE} holds no conversation: run 'rxlm demo {run}' first.")
    return {
        "transcript": render_transcript(report["transcript"]),
        "recall": render_recall(report, training_minutes(run), beside, training_processes(run)),
    }


def render_transcript(parts: Sequence[Sequence[Sequence[Any]]]) -> str:
    """Return the parts of a conversation, one turn a line, with the restart between them."""
    width = max(len(line[2]) for part in parts for line in part[0::2])
    shown = []
    for part in parts:
        # Query and answer take turns in a report.
        pairs = zip(part[0::2], part[1::2], strict=True)
        lines = [f"{asked[0]:2}  {asked[2]:{width}}  {answered[2]}" for asked, answered in pairs]
        shown.append("\n".join(line.rstrip() for line in lines))
    restart = "\n\n--- saved; the program ends, and a new one loads the conversation ---\n\n"
    return f"```text\n    {'you':{width}}  model\n{restart.join(shown)}\n```"


def harder_rows(rows: Sequence[RecallRow], unseen: str) -> list[RecallRow]:
    """Return what was asked of told facts over the turns of the main test, new in another way."""
    return [
        row
        for row in matching(rows, test="recall", unseen=unseen, condition="memory")
        if row["distance"] <= FARTHEST_OF_HARDER
    ]


def workers(environment: Mapping[str, Any], processes: int) -> str:
    """Return how many processes and threads a training had, in words."""
    threads = environment["num_threads"]
    each = f"{threads} thread{'s' * (threads > 1)}"
    return each if processes == 1 else f"{processes} processes of {each}"


def training_processes(run: Path) -> int:
    """Return how many processes shared the training of the last stage of a pipeline."""
    last = sorted(path for path in run.glob("[0-9]*_*") if path.is_dir())[-1]
    return int(json.loads((last / "env.json").read_text(encoding="utf-8"))["world_size"])


def render_recall(
    report: Mapping[str, Any], minutes: float, beside: str = "", processes: int = 1
) -> str:
    """Return the recall table, the figures below it, and how they were made."""
    recall, model, environment = report["recall"], report["model"], report["environment"]
    settings = recall["settings"]
    figures = [figure for figure in recall["summary"] if figure["name"] in FIGURES]
    main = settings["unseen"][0]
    others = "; ".join(
        [
            *(f"{item['label']}: {percent(item['value'])} %" for item in figures),
            *(
                f"{label}: {percent(pool(found).mean)} %"
                for unseen, label in HARDER.items()
                if unseen != main and (found := harder_rows(recall["rows"], unseen))
            ),
        ]
    )
    table = recall_table(recall["rows"], main)
    count, seeds = settings["dialogues"], len(settings["seeds"])
    option = f" --beside '{beside}'" if beside else ""
    return "\n".join(
        [
            "**What it remembers.** Percent of facts recalled word for word, by the turns since "
            "they were told and the number of facts held. "
            f"{NOVELTY[main]} Zeroed and swapped are controls: the memory is emptied, or is that "
            "of another conversation.",
            "",
            markdown_table(table).rstrip(),
            "",
            f"{others[:1].upper()}{others[1:]}. Each entry of the table rests on at least "
            f"{count * seeds} questions ({seeds} sets of test dialogues).",
            "",
            f"{model['num_parameters']:,} parameters; a memory of {model['num_layers']} layers x "
            f"{model['num_slots']} slots x {model['dim']} numbers; {minutes:.1f} minutes of "
            f"training steps, {workers(environment, processes)} on a machine with "
            f"{environment['num_cpus']} CPU cores{f', with {beside} beside it' if beside else ''}, "
            f"torch {environment['torch']}. Printed by "
            "`make quickstart`, with 95 % intervals and more in its `runs/nano/report.md`; copied "
            f"from there by `python scripts/update_readme.py runs/nano{option}`.",
        ]
    )


def recall_table(rows: Sequence[RecallRow], main: str) -> Table:
    """Return the main test without its intervals: a first page has no room for them.

    Args:
        rows: of the recall test.
        main: the ``unseen`` of the main test.
    """
    chosen = matching(rows, test="recall", unseen=main, history="reference")
    columns: dict[str, dict[str, Any]] = {
        f"{count} fact{'s' * (count > 1)}": {"facts": count, "condition": "memory"}
        for count in sorted({row["facts"] for row in chosen})
    }
    columns |= {name: {"condition": name} for name in ("zeroed", "swapped")}
    columns = {name: wanted for name, wanted in columns.items() if matching(chosen, **wanted)}
    body = []
    for distance in sorted({row["distance"] for row in chosen}):
        at = matching(chosen, distance=distance)
        cells = [percent(pool(matching(at, **wanted)).mean) for wanted in columns.values()]
        body.append((str(distance), *cells, percent(mean_chance(at))))
    return Table("", ("turns ago", *columns, "chance"), body)


def training_minutes(run: Path) -> float:
    """Return the training time of all stages of a pipeline.

    Raises:
        UserError: if a stage is missing or unfinished.
    """
    folders = sorted(path for path in run.glob("[0-9]*_*") if path.is_dir())
    statuses = {folder: read_status(folder) for folder in folders}
    unfinished = [
        folder.name
        for folder, status in statuses.items()
        if status is None or status.status not in ("complete", "early_stopped")
    ]
    if not folders or unfinished:
        what = f"unfinished stages ({', '.join(unfinished)})" if unfinished else "no stages"
        raise UserError(f"{run} has {what}: finish it with 'rxlm pipeline run'.")
    return sum(status.seconds for status in statuses.values() if status is not None) / 60


if __name__ == "__main__":
    sys.exit(main())
