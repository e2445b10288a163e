"""``rxlm train RECIPE.yaml``: one stage, resumed when there is something to resume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console

if TYPE_CHECKING:
    from rxlm.training.dry_run import DryRun
    from rxlm.training.stage import StageResult
    from rxlm.training.step_estimate import RunEstimate


def register(app: typer.Typer) -> None:
    """Add ``train`` to the command line."""
    app.command("train")(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe of one stage (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what it takes; no training.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder.  [default: runs/<recipe's folder>/<recipe>]"),
    ] = None,
) -> None:
    """Train one stage; a run that is there is resumed.

    Example: rxlm train stages/nano/50_memory_aware.yaml train.steps=500
    """
    from rxlm.training.recipes import read_recipe
    from rxlm.training.stage import default_run_folder, run_stage

    stage = read_recipe(recipe, overrides or [])
    folder = out or default_run_folder(stage)
    if dry_run:
        from rxlm.training.dry_run import dry_run as find_out

        report = find_out(stage, folder, measure=True)
        print_recipe(stage.recipe)
        _print_dry_run(report, folder)
        return
    result = run_stage(stage, folder, console.messages())
    if os.environ.get("RANK", "0") != "0":
        return  # process 0 of a run of several tells what there is to tell
    if result.signal is not None:
        again = " ".join(["rxlm train", str(recipe), *(overrides or [])])
        again += f" --out {out}" if out else ""
        stop(result.signal, f"stopped, saved in {folder}. To go on: {again}")
    _print_result(result)


def print_recipe(recipe: object) -> None:
    """Print a resolved recipe as YAML."""
    import yaml

    from rxlm.training.recipes import Recipe, recipe_values

    assert isinstance(recipe, Recipe)
    text = yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)
    console.results().out(text.rstrip("\n"), highlight=False)


def stop(signal_number: int, message: str) -> None:
    """Say how to go on, and end with the status of a command that a signal stopped."""
    console.messages().out(message, highlight=False)
    raise typer.Exit(128 + signal_number)


def _print_result(result: StageResult) -> None:
    from rxlm.training.progress import format_duration

    out = console.results()
    out.out(f"{result.folder}: {result.status}, {format_duration(result.seconds)}", highlight=False)
    for name, value in result.metrics.items():
        if name.startswith("validation/") or name == "train/loss":
            shown = "not finite" if value is None else f"{value:.4g}"
            out.out(f"  {name:32} {shown}", highlight=False)


def _print_dry_run(report: DryRun, folder: Path) -> None:
    lines = [f"run folder          {folder}"]
    if report.parameters:
        total = sum(report.parameters.values())
        lines += [f"parameters          {total:,}, of which {report.num_trained:,} train"]
        lines += [f"  {part:18}{count:,}" for part, count in report.parameters.items()]
        lines += [
            f"steps               {report.steps:,}",
            f"tokens a step       about {report.tokens_per_step:,}",
            f"tokens in all       about {report.tokens_per_step * report.steps:,}",
            f"weights             {_size(report.weight_bytes)}",
            f"while training      {_size(report.weight_bytes + report.optimizer_bytes)} with "
            "gradients and optimizer (activations come on top)",
            f"memory              {_size(report.memory_bytes)} {_of_what(report)}",
        ]
    if report.estimate is not None:
        lines += _estimate_lines(report.estimate, report.steps)
    lines += [f"note                {note}" for note in report.notes]
    console.results().out("\n" + "\n".join(lines), highlight=False)


def _estimate_lines(estimate: RunEstimate, steps: int) -> list[str]:
    from rxlm.training.progress import format_duration

    how = "measured" if estimate.share == 1 else f"from {estimate.share:.0%} of a micro-batch"
    return [
        f"peak memory         about {_size(estimate.peak_bytes)} of tensors ({how})",
        f"time                about {format_duration(estimate.seconds)}, "
        f"{estimate.seconds / steps:.3g} s a step on this machine now ({how}); validations and "
        "checkpoints come on top",
    ]


def _of_what(report: DryRun) -> str:
    if report.state_tokens is None:
        return "a conversation, whatever its length"
    return f"a sequence of {report.state_tokens:,} tokens while it is continued"


def _size(num_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} GB"
