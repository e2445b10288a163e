"""``rxlm plot``: curves of runs, as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rxlm.cli import console
from rxlm.cli.compare import Folders


def register(app: typer.Typer) -> None:
    """Add ``plot`` to the command line."""
    app.command("plot")(plot)


def plot(
    runs: Folders,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Only this figure (may be repeated).")
    ] = None,
) -> None:
    """Draw every metric of runs by step, tokens and time (PNG and SVG).

    Example: rxlm plot runs/nano/50_memory_aware --out figures
    """
    from rxlm.errors import UserError
    from rxlm.training.comparison.plots import (
        draw_metrics,
        figure_names,
        series_of,
        write_figures,
    )
    from rxlm.training.comparison.runs import by_stage, read_targets

    for name, found in by_stage(read_targets(runs)).items():
        folder = out / name if name else out
        series = series_of(found, by_recipe=False)
        unknown = [item for item in metric or [] if item not in figure_names(series)]
        if unknown:
            raise UserError(
                f"--metric {unknown[0]}: these runs have {', '.join(figure_names(series))}."
            )
        written = write_figures(draw_metrics(series, metric), folder)
        console.results().out(f"{folder}: {len(written)} files", highlight=False)
