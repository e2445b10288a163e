"""``rxlm demo MODEL_DIR``: a conversation that outlives the program, then the recall table.

This process tells the model some facts, saves the conversation and stops talking; a second, new
process loads it and asks. What the model knows then, it knows from the saved memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console
from rxlm.cli.chat import default_sessions_dir
from rxlm.errors import RunError

if TYPE_CHECKING:
    from rxlm.evaluation.transcript import Line
    from rxlm.rxt.models import RxTAlpha

SESSION = "demo"


def register(app: typer.Typer) -> None:
    """Add ``demo`` to the command line."""
    app.command("demo")(demo)


def demo(
    model_dir: Annotated[
        str, typer.Argument(help="A pipeline's folder, a run, a checkpoint or a model folder.")
    ],
    sessions_dir: Annotated[
        Path | None,
        typer.Option(help="Where the conversation is saved.  [default: MODEL_DIR/sessions]"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", hidden=True, help="Be the second process.")
    ] = False,
) -> None:
    """Show that the model remembers a conversation after the program was restarted.

    It is kept as the session 'demo'; one of an earlier demo is replaced.
    """
    from rxlm.evaluation.transcript import ASK, TELL, run_script
    from rxlm.rxt.models import RxTAlpha
    from rxlm.training.device import cpu_threads

    folder = (sessions_dir or default_sessions_dir(model_dir)) / SESSION
    with cpu_threads(1):
        model = RxTAlpha.from_pretrained(model_dir)
        if resume:
            _print_lines(run_script(model, [item.query for item in ASK], folder, resume=True))
            return
        told = run_script(model, TELL, folder, resume=False)
        _print_lines(told)
        _print_restart(folder)
        _start_second_process(model_dir, folder.parent)
        asked = _second_part(model, folder, len(told) // 2)
    _print_verdict(asked)
    report = _add_to_report(model, Path(model_dir), [told, asked])
    _print_table(report, model_dir)


def _print_lines(lines: Sequence[Line]) -> None:
    from rxlm.evaluation.transcript import USER

    for line in lines:
        number = f"{line.turn:3}" if line.speaker == USER else "   "
        console.results().out(f"{number}  {line.speaker:6} {line.text}", highlight=False)


def _print_restart(folder: Path) -> None:
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    text = (
        f"--- saved in {folder} ({num_bytes / 1000:.0f} kB); process {os.getpid()} says no more, "
        "a new one starts ---"
    )
    console.results().out(f"\n{text}\n", highlight=False)


def _start_second_process(model_dir: str, sessions_dir: Path) -> None:
    sys.stdout.flush()
    words = ["demo", model_dir, "--resume", "--sessions-dir", str(sessions_dir)]
    result = subprocess.run([sys.executable, "-m", "rxlm", *words], check=False)
    if result.returncode != 0:
        raise RunError(f"the second process ended with status {result.returncode}; see above.")


def _second_part(model: RxTAlpha, folder: Path, num_told: int) -> list[Line]:
    """Return what the second process said, from the conversation that it saved."""
    from rxlm.evaluation.transcript import MODEL, USER, Line
    from rxlm.rxt.session import Session

    lines = []
    for turn, item in enumerate(Session.load(folder, model).turns, start=1):
        if turn > num_told:
            lines += [Line(turn, USER, item.query), Line(turn, MODEL, item.answer)]
    return lines


def _print_verdict(asked: Sequence[Line]) -> None:
    from rxlm.evaluation.transcript import judge

    verdicts = judge(asked)
    console.results().out(
        f"\n{sum(verdicts)} of {len(verdicts)} questions answered rightly from the saved memory.\n",
        highlight=False,
    )


def _add_to_report(
    model: RxTAlpha, folder: Path, transcript: list[list[Line]]
) -> dict[str, Any] | None:
    """Put the conversation into the pipeline's report, if that is of this model; return it."""
    from rxlm.evaluation.report import read_json, write_report
    from rxlm.training.final_evaluation import REPORT_FILE

    if not (folder / REPORT_FILE).is_file():
        return None
    report = read_json(folder / REPORT_FILE)
    if report["model"]["fingerprint"] != model.fingerprint()._asdict():
        return None
    report["transcript"] = [[list(line) for line in part] for part in transcript]
    write_report(report, folder)
    return report


def _print_table(report: dict[str, Any] | None, model_dir: str) -> None:
    from rxlm.evaluation.result_tables import goals_table, recall_table
    from rxlm.evaluation.tables import rich_table

    out = console.results()
    recall = report["recall"] if report else None
    if recall is None:
        out.out(f"measure it: rxlm eval recall {model_dir}", highlight=False)
    else:
        main, history = recall["settings"]["unseen"][0], recall["settings"]["history"]
        out.print(rich_table(goals_table(recall["summary"])))
        out.print(rich_table(recall_table(recall["rows"], main, history)))
        out.out(f"more:       {Path(model_dir, 'report.html')}", highlight=False)
    out.out(f"talk to it: rxlm chat {model_dir} --session {SESSION}", highlight=False)
