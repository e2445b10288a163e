"""The figures of a report as PNG files in memory, drawn from its data. No torch, no display.

``matplotlib``'s figures are used directly: no global state, so nothing has to be closed and a
caller's own plots are left alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rxlm.evaluation.curves import accuracy_metric
from rxlm.evaluation.recall_summary import mean_chance, pool
from rxlm.evaluation.result_tables import CONDITION_NAMES
from rxlm.evaluation.rows import RecallRow, matching

DPI = 130
# Okabe and Ito's colours: told apart by everyone, in print too.
FACT_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#F0E442")
CONDITION_COLOURS = {
    "memory": "#0072B2",
    "zeroed": "#D55E00",
    "reset": "#777777",
    "swapped": "#CC79A7",
}
GREY = "#777777"


def draw_figures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return PNG files by name: those that the report has data for."""
    drawn: dict[str, Figure | None] = {"recall": _recall(report)}
    for number, result in enumerate(report["perplexity"], start=1):
        name = "perplexity" if number == 1 else f"perplexity-{number}"
        drawn[name] = _perplexity(result)
    drawn["accuracy"] = _accuracy(report["training"])
    drawn["loss"] = _losses(report["training"])
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def _recall(report: Mapping[str, Any]) -> Figure | None:
    """Draw right answers by distance: one line per number of facts, and the controls."""
    recall = report["recall"]
    if recall is None:
        return None
    settings = recall["settings"]
    rows: list[RecallRow] = matching(
        recall["rows"], test="recall", unseen=settings["unseen"][0], history=settings["history"]
    )
    figure, axes = _figure("turns since the fact was told", "right answers (%)")
    remembered = matching(rows, condition="memory")
    for number, facts in enumerate(sorted({row["facts"] for row in remembered})):
        label = f"{facts} fact{'s' * (facts > 1)} held"
        colour = FACT_COLOURS[number % len(FACT_COLOURS)]
        _line(axes, matching(remembered, facts=facts), label, color=colour)
    for condition in ("zeroed", "reset", "swapped"):
        style = {"color": CONDITION_COLOURS[condition], "linestyle": "--", "marker": "x"}
        _line(axes, matching(rows, condition=condition), CONDITION_NAMES[condition], **style)
    if rows:
        axes.axhline(100 * mean_chance(rows), color=GREY, linestyle=":", label="chance")
    distances = sorted({row["distance"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [str(distance) for distance in distances])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-2, 102)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _line(axes: Axes, rows: Sequence[RecallRow], label: str, **style: Any) -> None:
    """Draw pooled shares with their 95 % intervals over the distance."""
    if not rows:
        return
    distances = sorted({row["distance"] for row in rows})
    found = [pool(matching(rows, distance=distance)) for distance in distances]
    below = [100 * (item.mean - item.low) for item in found]
    above = [100 * (item.high - item.mean) for item in found]
    means = [100 * item.mean for item in found]
    axes.errorbar(
        distances, means, (below, above), label=label, capsize=3, **{"marker": "o", **style}
    )


def _perplexity(result: Mapping[str, Any]) -> Figure | None:
    """Draw perplexity by turn under each condition: of answers, and of carry-over words."""
    rows = [row for row in result["rows"] if row["turn"]]
    names = {"answer": "all words of the answer", "carry-over": "words carried over"}
    shown = [tokens for tokens in names if any(row["tokens"] == tokens for row in rows)]
    if not shown:
        return None
    figure = Figure(figsize=(4.3 * len(shown), 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, tokens in zip(panels, shown, strict=True):
        for condition in dict.fromkeys(row["condition"] for row in rows):
            points = [
                (row["turn"], row["perplexity"])
                for row in rows
                if (row["tokens"], row["condition"]) == (tokens, condition)
            ]
            style = {"color": CONDITION_COLOURS[condition], "marker": "."}
            axes.plot(*zip(*points, strict=True), label=CONDITION_NAMES[condition], **style)
        _tidy(axes)
        axes.set_title(names[tokens], fontsize=10)
        axes.set_xlabel("turn of the conversation")
    panels[0].set_ylabel("perplexity")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _accuracy(training: Mapping[str, Any]) -> Figure | None:
    """Draw the accuracy in validation against minutes and against steps, a line per stage."""
    curves = {
        stage: (curve["validation"], metric)
        for stage, curve in training.items()
        if (metric := accuracy_metric(curve["validation"])) is not None
    }
    if not curves:
        return None
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("minutes", "step"), strict=True):
        for stage, (points, metric) in curves.items():
            chosen = [point for point in points if metric in point]
            axes.plot(
                [point[key] for point in chosen],
                [100 * point[metric] for point in chosen],
                marker=".",
                label=f"{stage}: {metric.replace('_', ' ')}",
            )
        _tidy(axes)
        axes.set_xlabel(f"{key if key == 'minutes' else 'steps'} of training")
        axes.set_ylim(-2, 102)
    panels[0].set_ylabel("right answers in validation (%)")
    panels[0].legend(frameon=False)
    return figure


def _losses(training: Mapping[str, Any]) -> Figure | None:
    """Draw training and validation loss, a panel per stage."""
    curves = {
        stage: curve
        for stage, curve in training.items()
        if any("loss" in point for kind in curve.values() for point in kind)
    }
    if not curves:
        return None
    columns = min(3, len(curves))
    num_rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, (stage, curve) in zip(panels, curves.items(), strict=False):
        for kind, colour in (("train", GREY), ("validation", FACT_COLOURS[0])):
            points = [point for point in curve[kind] if "loss" in point]
            axes.plot(
                [point["step"] for point in points],
                [point["loss"] for point in points],
                color=colour,
                label=kind,
                marker="." if kind == "validation" else "",
            )
        _tidy(axes)
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step")
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False)
    return figure


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    _tidy(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
