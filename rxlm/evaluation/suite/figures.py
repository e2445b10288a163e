"""The figures of the suite as SVG files, drawn from its document. No torch, no display.

Their ground is clear and their ink a middle grey, so that they are read on light and dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rxlm.evaluation.figures import FACT_COLOURS
from rxlm.evaluation.suite import babi, facts
from rxlm.evaluation.suite.contestant import CONTROL_NAMES, CONTROLS
from rxlm.evaluation.suite.slots import deleted_share

INK = "#8a8a8a"
COLOURS = {"M": "#3f8fd2", "Z": "#d55e00", "X": "#cc79a7", "F": "#2ea27f", "N": "#b59a00"}
CAPTIONS = {
    "accuracy": "Right answers by turns since the fact was told, with 95 % intervals: the memory "
    "for each number of facts, and the controls",
    "capacity": "Capacity: facts told against right answers, and against facts held",
    "babi": "bAbI over turns: right answers by task, beside the controls and the task's most "
    "frequent answer",
    "perplexity": "Answer perplexity by turn",
    "cost": "Cost of a turn: time to the first token and bytes of state",
    "reward": "Reward by step",
    "deleted": "Right answers with slots deleted",
    "writes": "How much each slot is written at each turn (mean of built-in dialogues)",
}


def draw_suite(document: Mapping[str, Any]) -> dict[str, bytes]:
    """Return SVG files by name: those that the document has data for."""
    tests = {
        name: result for name, result in document["tests"].items() if result["status"] == "done"
    }
    drawn: dict[str, Figure | None] = {}
    if "facts" in tests:
        drawn["accuracy"] = _accuracy(tests["facts"])
        drawn["capacity"] = _capacity(tests["facts"])
    if "babi" in tests:
        drawn["babi"] = _babi(tests["babi"])
    if "dialogues" in tests:
        drawn["perplexity"] = _perplexity(tests["dialogues"])
    if "cost" in tests:
        drawn["cost"] = _cost(tests["cost"])
    if "reward" in tests:
        drawn["reward"] = _reward(tests["reward"])
    if "slots" in tests:
        drawn["deleted"] = _deleted(tests["slots"])
        drawn["writes"] = _writes(tests["slots"])
    return {name: svg(figure) for name, figure in drawn.items() if figure is not None}


def svg(figure: Figure) -> bytes:
    """Return ``figure`` as an SVG file without a ground."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _panels(count: int, width: float = 4.4, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.grid(True, color=INK, alpha=0.25, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.tick_params(colors=INK, labelsize=8)
    return figure, panels


def _labels(axes: Axes, x: str, y: str = "", title: str = "") -> None:
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.set_title(title, color=INK, fontsize=10)


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(
        lines,
        names,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )


def _shares(axes: Axes, points: Sequence[tuple[float, Any]], label: str, **style: Any) -> None:
    """Draw estimates with their 95 % intervals."""
    if not points:
        return
    means = [100 * share.mean for _, share in points]
    below = [100 * (share.mean - share.low) for _, share in points]
    above = [100 * (share.high - share.mean) for _, share in points]
    axes.errorbar(
        [x for x, _ in points],
        means,
        (below, above),
        label=label,
        capsize=2,
        **{"marker": "o", "markersize": 4, "linewidth": 1.4, **style},
    )


def _powers(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xticks([], minor=True)


def _accuracy(result: Mapping[str, Any]) -> Figure:
    rows = [row for row in result["rows"] if row["group"] in ("main", "long")]
    figure, (left, right) = _panels(2)
    distances = sorted({row["distance"] for row in rows})

    def points(chosen: Sequence[Any]) -> list[tuple[float, Any]]:
        return [
            (distance, facts.pooled(at))
            for distance in distances
            if (at := facts.select(chosen, distance=distance))
        ]

    memory = facts.select(rows, control="M")
    for number, count in enumerate(sorted({row["facts"] for row in memory})):
        label = f"M, {count} fact{'s' * (count > 1)}"
        colour = FACT_COLOURS[number % len(FACT_COLOURS)]
        _shares(left, points(facts.select(memory, facts=count)), label, color=colour)
    for control in CONTROLS:
        style = {"color": COLOURS[control], "linestyle": "-" if control == "M" else "--"}
        _shares(right, points(facts.select(rows, control=control)), control, **style)
    if rows:
        chance = 100 * facts.mean_chance(rows)
        right.axhline(chance, color=INK, linestyle=":", label="chance")
    for axes, title in ((left, "memory, by facts held"), (right, "all facts, by control")):
        _powers(axes, distances)
        axes.set_ylim(-2, 102)
        _labels(axes, "turns since the fact was told", "right answers (%)", title)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _capacity(result: Mapping[str, Any]) -> Figure | None:
    held = result["capacity"]
    if len(held) < 2:
        return None
    figure, (left, right) = _panels(2)
    counts = [point["facts"] for point in held]
    rows = [
        row
        for row in result["rows"]
        if row["group"] in ("main", "capacity") and row["distance"] == held[0]["distance"]
    ]
    for control in CONTROLS:
        part = facts.select(rows, control=control)
        points = [
            (count, facts.pooled(at)) for count in counts if (at := facts.select(part, facts=count))
        ]
        style = {"color": COLOURS[control], "linestyle": "-" if control == "M" else "--"}
        _shares(left, points, control, **style)
    left.set_ylim(-2, 102)
    _powers(left, counts)
    _labels(left, "facts told", "right answers (%)", f"told {held[0]['distance']} turns ago")
    left.legend(frameon=False, labelcolor=INK, fontsize=8)
    right.plot(counts, counts, color=INK, linestyle=":", label="all of them")
    right.errorbar(
        counts,
        [point["facts_held"] for point in held],
        (
            [point["facts_held"] - point["low"] for point in held],
            [point["high"] - point["facts_held"] for point in held],
        ),
        color=COLOURS["M"],
        marker="o",
        markersize=4,
        capsize=2,
        label="M",
    )
    _labels(right, "facts told", "facts held (estimate)", "capacity of the memory")
    right.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _babi(result: Mapping[str, Any]) -> Figure | None:
    rows = result["rows"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if not tasks:
        return None
    figure, (axes,) = _panels(1, width=8.8)
    controls = [control for control in CONTROLS if any(row["control"] == control for row in rows)]
    width = 0.8 / len(controls)
    for number, control in enumerate(controls):
        shares = [
            babi.pooled([r for r in rows if (r["task"], r["control"]) == (task, control)])
            for task in tasks
        ]
        axes.bar(
            [place + (number - (len(controls) - 1) / 2) * width for place in range(len(tasks))],
            [100 * share.mean for share in shares],
            width,
            yerr=(
                [100 * (share.mean - share.low) for share in shares],
                [100 * (share.high - share.mean) for share in shares],
            ),
            color=COLOURS[control],
            ecolor=INK,
            label=f"{control}: {CONTROL_NAMES[control]}",
        )
    for place, task in enumerate(tasks):
        level = 100 * babi.majority_share([row for row in rows if row["task"] == task])
        label = "most frequent answer" if place == 0 else None
        axes.plot([place - 0.45, place + 0.45], [level, level], color=INK, ls=":", label=label)
        goal = babi.GOALS.get(task)
        if goal is not None:
            label = "goal" if place == 0 else None
            axes.plot([place - 0.45, place + 0.45], [100 * goal] * 2, color=INK, label=label)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 102)
    _labels(axes, "", "right answers (%)")
    _legend(figure, axes, 3)
    return figure


def _perplexity(result: Mapping[str, Any]) -> Figure | None:
    rows = [row for row in result["rows"] if row["turn"] and row["tokens"] == "answer"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    if not sources:
        return None
    figure, panels = _panels(len(sources), width=3.6)
    for axes, source in zip(panels, sources, strict=True):
        for control in CONTROLS:
            points = sorted(
                (row["turn"], row["loss"], row["low"], row["high"])
                for row in rows
                if (row["source"], row["control"]) == (source, control)
            )
            if not points:
                continue
            turns = [point[0] for point in points]
            axes.plot(
                turns,
                [point[1] for point in points],
                color=COLOURS[control],
                marker=".",
                linestyle="-" if control == "M" else "--",
                label=f"{control}: {CONTROL_NAMES[control]}",
            )
            if control == "M" and all(None not in point for point in points):
                axes.fill_between(
                    turns,
                    [point[2] for point in points],
                    [point[3] for point in points],
                    color=COLOURS[control],
                    alpha=0.2,
                    linewidth=0,
                )
        _labels(axes, "turn", "", source)
    panels[0].set_ylabel("nats a token", color=INK, fontsize=9)
    _legend(figure, panels[0], 3)
    return figure


def _cost(result: Mapping[str, Any]) -> Figure:
    rows = result["rows"]
    figure, (left, right) = _panels(2)
    turns = sorted({row["turn"] for row in rows})
    styles = {"M": "-", "F": "--", "F kept": ":"}
    for actor in dict.fromkeys(row["actor"] for row in rows):
        own = sorted((row for row in rows if row["actor"] == actor), key=lambda row: row["turn"])
        style: dict[str, Any] = {"color": COLOURS[actor[0]], "linestyle": styles[actor]}
        at = [row["turn"] for row in own]
        left.errorbar(
            at,
            [row["prompt_ms"] for row in own],
            (
                [row["prompt_ms"] - row["low"] for row in own],
                [row["high"] - row["prompt_ms"] for row in own],
            ),
            label=actor,
            capsize=2,
            markersize=4,
            marker="o",
            **style,
        )
        sizes = [row["state_bytes"] / 1000 for row in own]
        right.plot(at, sizes, label=actor, markersize=4, marker="o", **style)
    for axes, name in ((left, "time to the first token (ms)"), (right, "state (kB)")):
        _powers(axes, turns)
        axes.set_yscale("log")
        _labels(axes, "turn of the conversation", name)
    left.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _reward(result: Mapping[str, Any]) -> Figure | None:
    rows = result["rows"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    if not sources:
        return None
    figure, panels = _panels(len(sources))
    for axes, source in zip(panels, sources, strict=True):
        for actor in dict.fromkeys(row["actor"] for row in rows):
            own = [row for row in rows if (row["source"], row["actor"]) == (source, actor)]
            steps = sorted({row["step"] for row in own})
            means = []
            for step in steps:
                at = [row["reward"] for row in own if row["step"] == step]
                means.append(sum(at) / len(at))
            is_control = actor in COLOURS
            axes.plot(
                steps,
                means,
                label=actor,
                marker=".",
                color=COLOURS[actor] if is_control else INK,
                linestyle="-"
                if is_control
                else {"ceiling": "-", "copy": ":", "other": "--"}[actor],
            )
        axes.set_ylim(0, 10)
        _labels(axes, "step", "reward", source)
    _legend(figure, panels[0], 8)
    return figure


def _deleted(result: Mapping[str, Any]) -> Figure:
    rows = result["deleted"]
    figure, (left, right) = _panels(2)
    singles = [row for row in rows if row["slot"] is not None]
    shares = sorted(
        (
            (slot, deleted_share([row for row in singles if row["slot"] == slot]))
            for slot in dict.fromkeys(row["slot"] for row in singles)
        ),
        key=lambda item: item[1].mean,
    )
    ranked = [(float(rank), share) for rank, (_, share) in enumerate(shares, start=1)]
    _shares(left, ranked, "without one slot", color=COLOURS["M"], linestyle="")
    full = deleted_share([row for row in rows if row["deleted"] == 0])
    left.axhline(100 * full.mean, color=INK, linestyle=":", label="all slots")
    _labels(left, "slots, the most missed first", "right answers (%)", "one slot deleted")
    random = [row for row in rows if row["slot"] is None]
    points = [
        (float(count), deleted_share([row for row in random if row["deleted"] == count]))
        for count in sorted({row["deleted"] for row in random})
    ]
    _shares(right, points, "M", color=COLOURS["M"])
    _labels(right, "random slots deleted", "", "many slots deleted")
    for axes in (left, right):
        axes.set_ylim(-2, 102)
    left.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def _writes(result: Mapping[str, Any]) -> Figure:
    written = result["written"]  # [N][L][S]
    num_layers = len(written[0])
    largest = max(value for turn in written for layer in turn for value in layer)
    figure, panels = _panels(num_layers, width=max(3.0, 9.0 / num_layers), height=3.4)
    for layer, axes in enumerate(panels):
        axes.grid(False)
        values = [[turn[layer][slot] for turn in written] for slot in range(len(written[0][0]))]
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=largest,
            interpolation="nearest",
            extent=(0.5, len(written) + 0.5, len(values) - 0.5, -0.5),
        )
        _labels(axes, "turn", "slot" if layer == 0 else "", f"layer {layer}")
    bar = figure.colorbar(image, ax=panels, shrink=0.9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.set_label("write size (1: altogether)", color=INK, fontsize=9)
    return figure
