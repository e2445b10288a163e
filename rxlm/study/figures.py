"""The figures of a study, drawn from its rows: PNG and PDF. No torch, no display."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from rxlm.evaluation.figures import GREY, png
from rxlm.study.claims import best_rows, shares_of
from rxlm.study.mechanisms import title
from rxlm.study.results import OK, ResultStore, Row
from rxlm.study.settings import StudySettings

COLOURS = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8860B",
    "#7A4FBF", "#777777",
)  # fmt: skip
CAPTIONS = {
    "ratio_comparison": "Cost over that of the baseline at the longest length, with 95 % intervals",
    "training_curves": "Validation loss while training",
    "perplexity": "Perplexity by seed",
    "associative_recall": "Right answers by number of pairs, with 95 % intervals",
    "copy_task": "Right tokens by length of what is to be copied, with 95 % intervals",
    "efficiency": "Training step by length, with 95 % intervals of the median",
    "latency": "Prefill and decoding by context",
    "complexity": "The operator alone, forward and backward, log-log",
    "memory": "Memory of the operator, forward and backward",
    "scaling": "Training step by size of the model",
    "profiler_summary": "Self time of a training step",
}
"""Name -> what a page says under it, in reading order."""


def draw_study(
    store: ResultStore, settings: StudySettings, history: Mapping[str, Any]
) -> dict[str, Figure]:
    """Return figures by name: those that there are rows for."""
    draw = _Drawing(store, settings)
    makers: dict[str, Callable[[], Figure | None]] = {
        "ratio_comparison": draw.ratios,
        "training_curves": lambda: draw.curves(history),
        "perplexity": draw.perplexity,
        "associative_recall": lambda: draw.task("mqar", "pairs"),
        "copy_task": lambda: draw.task("copy", "symbols"),
        "efficiency": lambda: draw.lines([("efficiency", "step", "ms a training step")]),
        "latency": lambda: draw.lines(
            [("prefill", "prefill", "ms to the first token"), ("decode", "decode", "ms a token")]
        ),
        "complexity": lambda: draw.lines([("op", "forward+backward", "ms")]),
        "memory": draw.memory,
        "scaling": draw.scaling,
        "profiler_summary": draw.profile,
    }
    figures = {name: make() for name, make in makers.items()}
    for task in dict.fromkeys(row["task"] for row in store.rows("task") if row.get("task")):
        if task not in ("mqar", "copy"):
            figures[f"task_{task}"] = draw.task(task, "size")
    return {name: figure for name, figure in figures.items() if figure is not None}


def caption_of(name: str) -> str:
    """Return what a page says under a figure."""
    return CAPTIONS.get(name, f"Right tokens by size, {name.removeprefix('task_')}")


def pdf(figure: Figure) -> bytes:
    """Return ``figure`` as a PDF file, the same for the same data."""
    buffer = io.BytesIO()
    FigureCanvasPdf(figure)
    figure.savefig(buffer, format="pdf", facecolor="white", metadata={"CreationDate": None})
    return buffer.getvalue()


__all__ = ["CAPTIONS", "caption_of", "draw_study", "pdf", "png"]


class _Drawing:
    def __init__(self, store: ResultStore, settings: StudySettings) -> None:
        self.store, self.settings = store, settings

    def colour(self, name: str) -> str:
        return COLOURS[self.settings.attention.index(name) % len(COLOURS)]

    def _panels(self, count: int) -> tuple[Figure, list[Axes]]:
        figure = Figure(figsize=(max(5.5, 4.6 * count), 3.7))
        panels = [figure.add_subplot(1, count, number + 1) for number in range(count)]
        figure.subplots_adjust(
            left=0.13 / count + 0.01, right=0.98 - 0.26 / (count + 0.3), bottom=0.16, top=0.95,
            wspace=0.28,
        )  # fmt: skip
        for axes in panels:
            axes.grid(True, color="#dddddd", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        return figure, panels

    def _legend(self, axes: Axes) -> None:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize="small")

    def lines(self, parts: Sequence[tuple[str, str, str]]) -> Figure | None:
        rows = [self._timed(kind, phase) for kind, phase, _ in parts]
        if not any(rows):
            return None
        figure, panels = self._panels(len(parts))
        for axes, found, (_, _, label) in zip(panels, rows, parts, strict=True):
            for name in self.settings.attention:
                own = _by_length(found, name)
                if own:
                    _line(axes, own, self.colour(name), title(name))
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            _ticks(axes, found)
        self._legend(panels[-1])
        return figure

    def _timed(self, kind: str, phase: str) -> list[Row]:
        return [row for row in self.store.rows(kind, phase=phase) if row.get("step_time_ms")]

    def memory(self) -> Figure | None:
        rows = [row for row in self.store.rows("memory") if row["outcome"] == OK]
        parts = [("counted_total_mb", "MB, counted"), ("total_mb", "MB, resident")]
        if not rows:
            return None
        figure, panels = self._panels(2)
        for axes, (column, label) in zip(panels, parts, strict=True):
            for name in self.settings.attention:
                # Less than the process already held shows as nothing: no place on a log axis.
                own = [row for row in _by_length(rows, name) if (row.get(column) or 0.0) > 0]
                axes.plot(
                    [row["seq_len"] for row in own], [row[column] for row in own], marker="o",
                    markersize=3, color=self.colour(name), label=title(name),
                )  # fmt: skip
            axes.set(xlabel="tokens", ylabel=label)
            if _scale(axes):
                _ticks(axes, rows)
        self._legend(panels[-1])
        return figure

    def task(self, task: str, what: str) -> Figure | None:
        rows = best_rows(self.store, task)
        if not rows:
            return None
        figure, (axes,) = self._panels(1)
        sizes = sorted({row["size"] for row in rows})
        for name in self.settings.attention:
            shares = [shares_of(rows, size).get(name) for size in sizes]
            points = [(s, x) for s, x in zip(sizes, shares, strict=True) if x is not None]
            if points:
                axes.errorbar(
                    [size for size, _ in points], [share.value for _, share in points],
                    yerr=[
                        [share.value - share.low for _, share in points],
                        [share.high - share.value for _, share in points],
                    ],
                    marker="o", markersize=3, color=self.colour(name), label=title(name),
                    linewidth=1.3, capsize=2,
                )  # fmt: skip
        chance = {row["size"]: row["chance"] for row in rows}
        axes.plot(sizes, [chance[size] for size in sizes], ":", color=GREY, label="chance")
        axes.set(xlabel=what, ylabel="% right", ylim=(0, 103))
        self._legend(axes)
        return figure

    def perplexity(self) -> Figure | None:
        rows = [row for row in self.store.rows("ppl") if row["outcome"] == OK]
        names = [n for n in self.settings.attention if any(r["attention"] == n for r in rows)]
        if not names:
            return None
        figure, (axes,) = self._panels(1)
        for place, name in enumerate(names):
            values = [row["final_ppl"] for row in rows if row["attention"] == name]
            axes.plot(values, [place] * len(values), "o", color=self.colour(name))
            axes.plot(sum(values) / len(values), place, "|", markersize=16, color=self.colour(name))
        axes.set_yticks(range(len(names)), [title(name) for name in names])
        axes.set(xlabel="validation perplexity (less is better)")
        axes.invert_yaxis()
        figure.subplots_adjust(left=0.22, right=0.97)
        return figure

    def curves(self, history: Mapping[str, Any]) -> Figure | None:
        shown = {key: part for key, part in history.items() if part.get("val_loss")}
        if not shown:
            return None
        figure, (axes,) = self._panels(1)
        named: set[str] = set()
        for part in shown.values():
            name = part["attention"]
            if name not in self.settings.attention:
                continue
            axes.plot(
                part["val_step"], part["val_loss"], color=self.colour(name), linewidth=1.2,
                marker="o", markersize=2, label="" if name in named else title(name),
            )  # fmt: skip
            named.add(name)
        axes.set(xlabel="updates", ylabel="validation loss (nats a token)")
        self._legend(axes)
        return figure

    def ratios(self) -> Figure | None:
        kinds = [("efficiency", "step", "training step"), ("prefill", "prefill", "prefill"),
                 ("decode", "decode", "decoding")]  # fmt: skip
        found = []
        for kind, phase, label in kinds:
            rows = [row for row in self._timed(kind, phase) if row.get("ratio") is not None]
            longest = max((row["seq_len"] for row in rows), default=0)
            found.append((f"{label}, {longest:,} tokens",
                          [row for row in rows if row["seq_len"] == longest]))  # fmt: skip
        names = [n for n in self.settings.attention if n != self.settings.baseline]
        if not any(rows for _, rows in found) or not names:
            return None
        figure, panels = self._panels(len(found))
        for axes, (label, rows) in zip(panels, found, strict=True):
            for row in rows:
                place = names.index(row["attention"])
                axes.errorbar(
                    row["ratio"], place,
                    xerr=[[max(0.0, row["ratio"] - row["ratio_low"])],
                          [max(0.0, row["ratio_high"] - row["ratio"])]],
                    fmt="o", color=self.colour(row["attention"]), capsize=3,
                )  # fmt: skip
            axes.axvline(1.0, color=GREY, linewidth=1)
            axes.set_yticks(range(len(names)), [title(name) for name in names])
            axes.set(xlabel=f"x {title(self.settings.baseline)}: {label}", xscale="log")
            axes.set_ylim(len(names) - 0.5, -0.5)
            if axes is not panels[0]:
                axes.set_yticklabels([])
        figure.subplots_adjust(left=0.1, right=0.98, wspace=0.12)
        return figure

    def scaling(self) -> Figure | None:
        rows = [row for row in self.store.rows("scaling") if row.get("step_time_ms")]
        if not rows:
            return None
        figure, panels = self._panels(2)
        parts = [("step_time_ms", "ms a training step"), ("memory_mb", "MB of a training step")]
        for axes, (column, label) in zip(panels, parts, strict=True):
            for name in self.settings.attention:
                own = sorted(
                    (
                        row
                        for row in rows
                        if row["attention"] == name and (row.get(column) or 0.0) > 0
                    ),
                    key=lambda row: int(row["non_embedding"]),
                )
                axes.plot(
                    [row["non_embedding"] for row in own], [row[column] for row in own],
                    marker="o", markersize=3, color=self.colour(name), label=title(name),
                )  # fmt: skip
            axes.set(xlabel="parameters", ylabel=label)
            _scale(axes)
        self._legend(panels[-1])
        return figure

    def profile(self) -> Figure | None:
        rows = [row for row in self.store.rows("profile") if row["outcome"] == OK]
        rows = [row for row in rows if row["attention"] in self.settings.attention]
        if not rows:
            return None
        figure, (axes,) = self._panels(1)
        for place, row in enumerate(rows):
            inside = row["cuda_time_ms"] or row["cpu_time_ms"] - row["outside_operators_ms"]
            axes.barh(place, inside, color=self.colour(row["attention"]))
            if row["cuda_time_ms"] is None:
                axes.barh(place, row["outside_operators_ms"], left=inside, color="#cccccc")
        axes.set_yticks(range(len(rows)), [title(row["attention"]) for row in rows])
        axes.set(xlabel=f"ms, {rows[0]['time_of']} (grey: between operators)")
        axes.invert_yaxis()
        figure.subplots_adjust(left=0.22, right=0.97)
        return figure


def _by_length(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted(
        (row for row in rows if row["attention"] == name), key=lambda row: int(row["seq_len"])
    )


def _line(axes: Axes, rows: Sequence[Row], colour: str, label: str) -> None:
    lengths = [row["seq_len"] for row in rows]
    axes.plot(
        lengths, [row["step_time_ms"] for row in rows], marker="o", markersize=3, color=colour,
        label=label,
    )  # fmt: skip
    axes.fill_between(
        lengths, [row["ci_low_ms"] for row in rows], [row["ci_high_ms"] for row in rows],
        color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip


def _scale(axes: Axes) -> bool:
    """Scale both axes by logarithms; where nothing was drawn, say so, for an empty logarithmic axis
    cannot be drawn. Returns whether there is anything."""
    if any(len(line.get_path()) for line in axes.get_lines()):
        axes.set(xscale="log", yscale="log")
        return True
    axes.text(0.5, 0.5, "too little to be seen", transform=axes.transAxes, ha="center", color=GREY)
    return False


def _ticks(axes: Axes, rows: Sequence[Row]) -> None:
    lengths = sorted({row["seq_len"] for row in rows})
    if lengths:
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
