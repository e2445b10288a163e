"""``rxlm compare``: what two recipes make of the same data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console

if TYPE_CHECKING:
    from rxlm.training.comparison.runs import Run

Folders = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Folders of runs, or of pipelines.")
]


def register(app: typer.Typer) -> None:
    """Add ``compare`` to the command line."""
    app.command("compare")(compare)


def compare(
    runs: Folders,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with curves and all metrics.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show training metrics and single turns, too.")
    ] = False,
) -> None:
    """Compare runs: final and best metrics, settings, costs, speed; runs that differ in seeds only
    are taken together.

    Example: rxlm compare runs/kda runs/gated_deltanet --html comparison.html
    """
    from rxlm.training.comparison.compare import compare as find_out
    from rxlm.training.comparison.runs import by_stage, read_targets

    comparison = find_out(runs)
    if html is not None:
        _write_page(html, comparison, by_stage(read_targets(runs)))
    if as_json:
        console.print_json(comparison)
        return
    _print(comparison, every)


def _print(comparison: dict[str, Any], every: bool) -> None:
    from rxlm.evaluation.tables import rich_table
    from rxlm.training.comparison.tables import section_tables

    out = console.results()
    for name, section in comparison["stages"].items():
        if name:
            out.out(f"== {name}", highlight=False)
        for table in section_tables(section, all_metrics=every):
            out.print(rich_table(table))
        for note in section["notes"]:
            out.out(f"note: {note}", highlight=False)
        for sentence in section["verdict"]:
            out.out(sentence, highlight=False)


def _write_page(path: Path, comparison: dict[str, Any], stages: dict[str, list[Run]]) -> None:
    from rxlm.evaluation.figures import png
    from rxlm.storage.files import write_bytes
    from rxlm.training.comparison.page import html_page
    from rxlm.training.comparison.plots import BY_TURN, draw_metrics, series_of
    from rxlm.training.comparison.tables import is_shown

    pictures: dict[str, dict[str, bytes]] = {}
    for name, runs in stages.items():
        series = series_of(runs, by_recipe=True)
        shown = {
            metric for item in series for kind, metric in item.curves if is_shown(kind, metric)
        }
        figures = draw_metrics(series, {*shown, BY_TURN, "tokens_per_second", "mfu"})
        pictures[name] = {metric: png(figure) for metric, figure in figures.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, html_page(comparison, pictures, stages).encode("utf-8"))
    console.messages().out(f"{path}: written", highlight=False)
