"""Figures of runs: every metric by step, tokens and minutes, all runs in one picture. No torch."""

from __future__ import annotations

import io
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rxlm.errors import RunError
from rxlm.evaluation.figures import FACT_COLOURS, png
from rxlm.storage.files import write_bytes
from rxlm.training.comparison.compare import NAMES, columns_of
from rxlm.training.comparison.curves import AXES, Curves, curves_of, metric_names, turn_of
from rxlm.training.comparison.runs import Run

COLOURS = (*FACT_COLOURS[:4], "#D55E00", "#CC79A7", "#777777")
BY_TURN = "loss_by_turn"
"""The figure that shows the last loss of each turn."""
_LABELS = {"step": "steps", "tokens": "tokens", "minutes": "minutes of training"}
_LIMIT = 2000


class Series(NamedTuple):
    """The curves of one run, and how they are drawn: runs of a recipe share name and colour."""

    name: str
    colour: str
    curves: Curves


def series_of(runs: Sequence[Run], *, by_recipe: bool) -> list[Series]:
    """Return what is drawn of each run.

    Args:
        runs: of one stage.
        by_recipe: name and colour recipes (A, B, ...), and not runs.
    """
    columns = columns_of(runs) if by_recipe else [[run] for run in runs]
    return [
        Series(
            f"{NAMES[index]}: {group[0].label}" if by_recipe else run.label,
            COLOURS[index % len(COLOURS)],
            curves_of(run.records),
        )
        for index, group in enumerate(columns)
        for run in group
    ]


def draw_metrics(series: Sequence[Series], only: Container[str] | None = None) -> dict[str, Figure]:
    """Return a figure for each metric, and one of the loss by turn if there is such a loss.

    Args:
        series: what to draw.
        only: leave out all other figures.
    """
    figures: dict[str, Figure] = {}
    for metric in metric_names([item.curves for item in series]):
        if turn_of(metric) is None and (only is None or metric in only):
            figures[metric] = _metric_figure(metric, series)
    by_turn = _turn_figure(series) if only is None or BY_TURN in only else None
    return figures if by_turn is None else {**figures, BY_TURN: by_turn}


def figure_names(series: Sequence[Series]) -> list[str]:
    """Return the names of all figures that there are."""
    names = metric_names([item.curves for item in series])
    whole = [name for name in names if turn_of(name) is None]
    return [*whole, BY_TURN] if len(whole) < len(names) else whole


def write_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and as SVG; return the files.

    Raises:
        RunError: if the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"could not make {folder}: {error.strerror or error}.") from error
    written = []
    for name, figure in figures.items():
        for suffix, content in (("png", png(figure)), ("svg", svg(figure))):
            path = folder / f"{name}.{suffix}"
            write_bytes(path, content)
            written.append(path)
    return written


def svg(figure: Figure) -> bytes:
    """Return ``figure`` as an SVG file, the same for the same data."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def _metric_figure(metric: str, series: Sequence[Series]) -> Figure:
    # Laid out by hand: matplotlib's solver takes longer than the drawing.
    figure = Figure(figsize=(11, 3.4))
    panels = figure.subplots(1, len(AXES), sharey=True)
    figure.subplots_adjust(left=0.08, right=0.99, top=0.96, wspace=0.06)
    for axes, axis in zip(panels, AXES, strict=True):
        named: set[str] = set()
        for item in series:
            for kind in ("train", "validation"):
                points = item.curves.get((kind, metric), [])
                if not points:
                    continue
                points = points[:: max(1, len(points) // _LIMIT)]
                name = f"{item.name}, {kind}"
                axes.plot(
                    [getattr(point, axis) for point in points],
                    [point.value for point in points],
                    color=item.colour,
                    linewidth=0.9 if kind == "train" else 1.6,
                    alpha=0.55 if kind == "train" else 1.0,
                    marker="o" if kind == "validation" or len(points) == 1 else "",
                    markersize=3,
                    label="" if name in named else name,
                )
                named.add(name)
        _tidy(axes)
        axes.set_xlabel(_LABELS[axis])
    panels[0].set_ylabel(metric.replace("_", " "))
    _legend(figure, panels[0])
    return figure


def _turn_figure(series: Sequence[Series]) -> Figure | None:
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.13, right=0.98, top=0.96)
    named: set[str] = set()
    for item in series:
        last = {
            turn: points[-1].value
            for (kind, name), points in item.curves.items()
            if kind == "validation" and (turn := turn_of(name)) is not None
        }
        if last:
            turns = sorted(last)
            axes.plot(
                turns,
                [last[turn] for turn in turns],
                color=item.colour,
                marker="o",
                label="" if item.name in named else item.name,
            )
            named.add(item.name)
    if not named:
        return None
    _tidy(axes)
    axes.set_xlabel("turn of the conversation")
    axes.set_ylabel("loss at the last validation")
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    lines, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 50 else 2
        rows = -(-len(labels) // columns)
        figure.legend(lines, labels, loc="lower center", ncols=columns, frameon=False)
        figure.set_figheight(3.0 + 0.24 * rows)
        figure.subplots_adjust(bottom=(0.55 + 0.24 * rows) / (3.0 + 0.24 * rows))


def _tidy(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
