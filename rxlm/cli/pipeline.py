"""``rxlm pipeline run FOLDER``: all stages in order, then the evaluation and a report."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console
from rxlm.cli.evaluate import print_tables, work_progress
from rxlm.cli.train import stop
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.training.pipeline import PlannedStage


class Stopped(BaseException):
    """SIGTERM came while nothing was being trained."""


def register(app: typer.Typer) -> None:
    """Add ``pipeline`` to the command line."""
    family = typer.Typer(help="Run all stages of a recipe folder.", no_args_is_help=True)
    family.command("run")(run)
    app.add_typer(family, name="pipeline")


def run(
    recipes: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of numbered recipes.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.SUB=VALUE]...",
            help="Settings for every stage, or for one: memory_aware.train.steps=500.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs.  [default: runs/<recipe folder>]"),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Leave out what comes after this stage."),
    ] = None,
    redo: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE", help="Delete the runs of this stage and all later ones; train anew."
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Processes of this machine that share each update (one CPU core each)."
        ),
    ] = 1,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Evaluate at the end and write a report.")
    ] = True,
) -> None:
    """Train all stages in order. Finished stages are skipped, an interrupted one resumes.

    Example: rxlm pipeline run stages/nano --out runs/nano
    """
    from rxlm.training.pipeline import plan_pipeline, run_pipeline

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "pipeline run starts its processes itself: rxlm pipeline run FOLDER --processes 2. "
            "Under torchrun, train one stage after the other: torchrun --nproc-per-node 2 "
            "-m rxlm train RECIPE"
        )
    root = out or Path("runs", recipes.resolve().name)
    planned = plan_pipeline(recipes, root, overrides or [], stop_after=stop_after, redo=redo)
    words = ["rxlm", "pipeline", "run", str(recipes), *(overrides or []), "--out", str(root)]
    words += ["--stop-after", stop_after] if stop_after else []
    words += ["--processes", str(processes)] if processes > 1 else []
    again = shlex.join([*words, *([] if evaluate else ["--no-eval"])])
    with _stopping(again):
        result = run_pipeline(
            planned,
            redo=redo,
            processes=processes,
            console=console.messages(),
            announce=_announce_stage,
        )
        if result.interrupted is not None:
            where = f"stopped in {result.last.name}, saved in {result.last.folder}"
            stop(result.interrupted, f"{where}. To go on: {again}")
        if evaluate and stop_after is None:
            _evaluate(planned[-1], root)


@contextlib.contextmanager
def _stopping(again: str) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C between trainings into a message that says how to go on.

    While a stage trains, the Trainer takes these signals itself.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, handle)
    message = f"stopped; finished stages are kept. To go on: {again}"
    try:
        yield
    except Stopped:
        stop(signal.SIGTERM, message)
    except KeyboardInterrupt:
        stop(signal.SIGINT, message)
    finally:
        signal.signal(signal.SIGTERM, before)


def _announce_stage(number: int, count: int, item: PlannedStage) -> None:
    doing = {"skip": "finished before", "resume": "resuming", "run": "running"}[item.action]
    console.messages().print(f"[{number}/{count}] {item.stage.name}: {doing}", style="bold")


def _evaluate(last: PlannedStage, root: Path) -> None:
    from rxlm.storage.model_folder import resolve_model_dir
    from rxlm.training.final_evaluation import evaluate_pipeline
    from rxlm.training.recipes import LMRecipe, TokenizerRecipe

    recipe = last.stage.recipe
    if isinstance(recipe, TokenizerRecipe):
        return
    if isinstance(recipe, LMRecipe):
        verb = f"eval lm {root} --data FILE"
        if recipe.objective.interactions:
            verb = f"eval suite MODEL_DIR --baseline {root}"
        console.results().out(f"measure it: rxlm {verb}", highlight=False)
        return
    model_folder = resolve_model_dir(last.folder)
    report = evaluate_pipeline(recipe, root, model_folder, work_progress)
    print_tables(report)
    out = console.results()
    out.out(f"report: {root / 'report.html'}, {root / 'report.md'}", highlight=False)
    out.out(f"talk to it: rxlm chat {root}", highlight=False)
