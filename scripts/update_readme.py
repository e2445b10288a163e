"""Fills the README's transcript and recall table from a pipeline's report.

    rxlm pipeline run stages/nano --out runs/nano && rxlm demo runs/nano     (= make quickstart)
    python scripts/update_readme.py runs/nano             # rewrites the two blocks
    python scripts/update_readme.py runs/nano --check     # exit status 1 if they would change

Nothing between the markers is written by hand, so every number there was printed by a command.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import RunError, UserError
from rxlm.evaluation.report import read_json
from rxlm.evaluation.result_tables import percent, recall_table
from rxlm.evaluation.tables import markdown_table
from rxlm.rxt.state_files import write_bytes
from rxlm.training.final_evaluation import REPORT_FILE
from rxlm.training.run_folder import read_status

README = Path(__file__).resolve().parents[1] / "README.md"
FIGURES = ("updated", "stale", "declined")
"""Named figures of the recall test that stand below the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Update or check the README; return the exit status."""
    parser = argparse.ArgumentParser(description="Fill the README from a pipeline's report.")
    parser.add_argument("run", type=Path, help="folder of a pipeline, such as runs/nano")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the blocks")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text(encoding="utf-8")
        after = fill(before, render_blocks(options.run))
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
        block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if text.count(begin) != 1 or len(block.findall(text)) != 1:
            raise UserError(f"expected one block '{begin} ... {end}' in the README.")
        replacement = f"{begin}\n{content}\n{end}"
        text = block.sub(lambda _, replacement=replacement: replacement, text)
    return text


def render_blocks(run: Path) -> dict[str, str]:
    """Return the content of the blocks ``transcript`` and ``recall``.

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
        "recall": render_recall(report, training_minutes(run)),
    }


def render_transcript(parts: Sequence[Sequence[Sequence[Any]]]) -> str:
    """Return the parts of a conversation, one turn a line, with the restart between them."""
    turns = [
        [(asked[0], asked[2], answered[2]) for asked, answered in _pairs(part)] for part in parts
    ]
    width = max(len(query) for part in turns for _, query, _ in part)
    shown = [
        "\n".join(f"{turn:2}  {query:{width}}  {answer}" for turn, query, answer in part)
        for part in turns
    ]
    restart = "\n\n--- saved; the program ends, a new one loads the conversation ---\n\n"
    return f"```text\n{restart.join(shown)}\n```"


def render_recall(report: Mapping[str, Any], minutes: float) -> str:
    """Return the recall table, the figures below it, and how they were made."""
    recall, model, environment = report["recall"], report["model"], report["environment"]
    settings = recall["settings"]
    table = recall_table(recall["rows"], settings["unseen"][0], settings["history"])
    figures = {figure["name"]: figure for figure in recall["summary"]}
    others = "; ".join(
        f"{figures[name]['label']}: {percent(figures[name]['value'])} %"
        for name in FIGURES
        if name in figures
    )
    seeds = len(settings["seeds"])
    memory = f"{model['num_layers']} layers x {model['num_slots']} slots x {model['dim']} numbers"
    return "\n".join(
        [
            f"**{table.title}.** {table.note}",
            "",
            markdown_table(table._replace(note="")).rstrip(),
            "",
            f"{others}. {seeds} seeds, {settings['dialogues']} dialogues for each seed and cell.",
            "",
            f"{model['num_parameters']:,} parameters; the memory is {memory}. Trained in "
            f"{minutes:.1f} minutes on {environment['num_cpus']} CPU cores, torch "
            f"{environment['torch']}. Commands: `make quickstart`; "
            "`python scripts/update_readme.py runs/nano` copied this from its report.",
        ]
    )


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


def _pairs(lines: Sequence[Sequence[Any]]) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    """Return (query, answer) of each turn: they take turns in the report."""
    return list(zip(lines[0::2], lines[1::2], strict=True))


if __name__ == "__main__":
    sys.exit(main())
