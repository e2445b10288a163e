"""What linear_attention.py writes: a CSV file, a figure, a page; and what was asked of the speed.

Every figure on the page comes from the measurements given here. Nothing is measured here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from linear_attention_contenders import BASELINE, TITLES, Contender

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import Quartiles, log_log_slope, quartiles, ratio

SLOPE_LENGTHS = (2048, 32768)
TASKS = ("forward", "forward+backward", "step")
HUES = ("green", "orange", "blue", "red", "purple", "brown")
COLOR_NAMES = ("black", *(f"tab:{hue}" for hue in HUES))
COLORS = dict(zip(TITLES, COLOR_NAMES, strict=True))
STYLES = {"fla naive": ":", "transformers": "--", "fla kernel": "-."}


class Key(NamedTuple):
    """What a sample belongs to; ``tokens`` is the length, for steps the position."""

    task: str
    tokens: int
    contender: str


@dataclass
class Results:
    """All that was measured.

    Attributes:
        contenders: by name.
        seconds: per call, one value per round.
        memory: bytes on top of the arguments, at the highest point; None if the process died or
            the operating system does not tell.
        read_bytes: state or cache that a step reads.
        facts: about machine and settings, by label.
        remarks: who was left out, and why; oddities.
    """

    contenders: dict[str, Contender]
    seconds: dict[Key, list[float]] = field(default_factory=dict)
    memory: dict[Key, int | None] = field(default_factory=dict)
    read_bytes: dict[Key, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def lengths(self, task: str) -> list[int]:
        return sorted({key.tokens for key in self.seconds if key.task == task})

    def names(self, task: str) -> list[str]:
        """Contenders of a task, in their order."""
        measured = {key.contender for key in self.seconds if key.task == task}
        return [name for name in self.contenders if name in measured]

    def times_faster(self, task: str, tokens: int, name: str, than: str) -> Quartiles | None:
        """How many times less time ``name`` takes, or None if one of the two was not measured."""
        ours = self.seconds.get(Key(task, tokens, name))
        theirs = self.seconds.get(Key(task, tokens, than))
        return None if ours is None or theirs is None else ratio(theirs, ours)

    def slope(self, task: str, name: str) -> float | None:
        """Exponent of the growth of the median time, or None with fewer than three lengths."""
        shortest, longest = SLOPE_LENGTHS
        keys = [Key(task, tokens, name) for tokens in self.lengths(task)]
        keys = [k for k in keys if k in self.seconds and shortest <= k.tokens <= longest]
        if len(keys) < 3:
            return None
        return log_log_slope(
            [key.tokens for key in keys], [quartiles(self.seconds[key]).median for key in keys]
        )


def write_csv(results: Results, path: Path) -> None:
    """Write one row per task, length and contender."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                *("task", "tokens", "mechanism", "source", "backend", "rounds"),
                *("milliseconds_lower_quartile", "milliseconds_median"),
                *("milliseconds_upper_quartile", "times_faster_than_sdpa_lower_quartile"),
                *("times_faster_than_sdpa_median", "times_faster_than_sdpa_upper_quartile"),
                *("extra_memory_bytes", "state_or_cache_bytes"),
            ]
        )
        for key, samples in sorted(results.seconds.items(), key=lambda item: item[0]):
            who = results.contenders[key.contender]
            faster = results.times_faster(key.task, key.tokens, key.contender, BASELINE)
            assert faster is not None  # the baseline always takes part
            writer.writerow(
                [
                    *(key.task, key.tokens, who.mechanism, who.source, who.backend, len(samples)),
                    *(f"{1000 * value:.5g}" for value in quartiles(samples)),
                    *(f"{value:.4g}" for value in faster),
                    results.memory.get(key),
                    results.read_bytes.get(key),
                ]
            )


def draw(results: Results, path: Path) -> None:
    """Draw time over length, and the ratio to softmax attention with its quartiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, task in ((left, "forward"), (middle, "forward+backward")):
        for name in results.names(task):
            who = results.contenders[name]
            keys = [Key(task, tokens, name) for tokens in results.lengths(task)]
            keys = [key for key in keys if key in results.seconds]
            times = [1000 * quartiles(results.seconds[key]).median for key in keys]
            style = STYLES.get(who.source.partition(" (")[0], "-")
            width = 2.0 if who.source in ("rxlm", "SDPA") else 1.0
            x, color = [key.tokens for key in keys], COLORS[who.mechanism]
            axes.plot(x, times, style, color=color, linewidth=width, label=name)
        axes.set(title=f"{task}: milliseconds", yscale="log")
    for name in results.names("forward"):
        who = results.contenders[name]
        if who.source != "rxlm":
            continue
        lengths = results.lengths("forward")
        ratios = [results.times_faster("forward", tokens, name, BASELINE) for tokens in lengths]
        lower, median, upper = zip(*(r for r in ratios if r is not None), strict=True)
        right.plot(lengths, median, "-", color=COLORS[who.mechanism], linewidth=2.0, label=name)
        right.fill_between(lengths, lower, upper, color=COLORS[who.mechanism], alpha=0.2)
    right.axhline(1.0, color="black", linewidth=2.0, label=BASELINE)
    right.set(title="forward: times faster than SDPA (band: quartiles)", yscale="log")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel("tokens")
        axes.grid(True, which="major", alpha=0.3)
    left.legend(fontsize=6, loc="upper left")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


# --- what was asked -------------------------------------------------------------------------------


class Bar(NamedTuple):
    """Something that was asked of the speed, and what came out."""

    asked: str
    measured: str
    met: bool


def bars(results: Results) -> list[Bar]:
    """Compare with what the project asked of itself, as far as it was measured.

    Asked of a CPU with 2 threads, B = 1, H = 8, K = V = 64 and float32.
    """
    gated, channels = "Gated DeltaNet, rxlm", "KDA, rxlm"
    ours = [name for name, who in results.contenders.items() if who.source == "rxlm"]
    found = [
        _faster_from(results, gated, 2048),
        _faster_from(results, channels, 4096),
        _times_faster(results, 16384, gated, BASELINE, 6.0),
        _times_faster(results, 16384, channels, BASELINE, 4.0),
        _times_faster(results, 2048, channels, "KDA, transformers", 10.0),
        _times_faster(results, 2048, gated, "Gated DeltaNet, transformers", 1.0),
        *(_linear(results, name) for name in ours),
        *(_faster_than_others(results, name) for name in ours),
        *(_flat_steps(results, name) for name in ours),
    ]
    return [bar for bar in found if bar is not None]


def _faster_from(results: Results, name: str, shortest: int) -> Bar | None:
    lengths = [tokens for tokens in results.lengths("forward") if tokens >= shortest]
    ratios = {t: results.times_faster("forward", t, name, BASELINE) for t in lengths}
    found = {tokens: value.median for tokens, value in ratios.items() if value is not None}
    if not found:
        return None
    text = "; ".join(f"{tokens:,}: {value:.1f}x" for tokens, value in found.items())
    asked = f"{name}: forward faster than SDPA from T = {shortest:,} on"
    return Bar(asked, text, min(found.values()) > 1)


def _times_faster(results: Results, tokens: int, name: str, than: str, least: float) -> Bar | None:
    found = results.times_faster("forward", tokens, name, than)
    if found is None:
        return None
    factor = "faster" if least == 1 else f"at least {least:g}x faster"
    asked = f"{name}: forward at T = {tokens:,} {factor} than {than}"
    return Bar(asked, f"{_times(found)}x", found.median >= least)


def _linear(results: Results, name: str) -> Bar | None:
    slope = results.slope("forward", name)
    if slope is None:
        return None
    asked = f"{name}: forward grows at most as T^1.1 over 2,048-32,768"
    return Bar(asked, f"T^{slope:.2f}", slope <= 1.1)


def _faster_than_others(results: Results, name: str) -> Bar | None:
    mechanism = results.contenders[name].mechanism
    found = []
    for other, who in results.contenders.items():
        if who.mechanism == mechanism and who.backend == "torch" and other != name:
            for tokens in results.lengths("forward"):
                value = results.times_faster("forward", tokens, name, other)
                if value is not None:
                    found.append((value, f"{who.source}, T = {tokens:,}"))
    if not found:
        return None
    least, place = min(found, key=lambda item: item[0].median)
    asked = f"{name}: forward faster than all other PyTorch code of it, at every length"
    return Bar(asked, f"least: {_times(least)}x ({place})", least.median > 1)


def _flat_steps(results: Results, name: str) -> Bar | None:
    first, last = Key("step", 64, name), Key("step", 32768, name)
    if first not in results.seconds or last not in results.seconds:
        return None
    change = ratio(results.seconds[last], results.seconds[first])
    sizes = sorted({size for key, size in results.read_bytes.items() if key.contender == name})
    text = f"{_percent(change.median)} ({_percent(change.lower)} to {_percent(change.upper)})"
    held = " or ".join(f"{size:,}" for size in sizes)
    asked = f"{name}: step at position 32,768 within 10 % of 64, same state bytes"
    is_flat = abs(change.median - 1) <= 0.1 and len(sizes) == 1
    return Bar(asked, f"{text}, {held} bytes", is_flat)


# --- the page -----------------------------------------------------------------------------------


def page(results: Results, command: str, stem: str) -> str:
    """Return the Markdown page.

    Args:
        results: all that was measured.
        command: what was typed.
        stem: name of the CSV file and the figure, without their endings.
    """
    facts = [tuple(item) for item in results.facts.items()]
    parts = [
        "# Speed of linear attention",
        f"Written by `{command}`; every figure below comes from that run. All values are in "
        f"[{stem}.csv]({stem}.csv). What is measured is the operator alone, without projections, "
        "convolutions and norms.",
        markdown_table(Table("", ("", "this run"), facts, prose=True)),
        "## What was asked, and what came out",
        "Asked of a CPU with 2 threads, B = 1, H = 8, K = V = 64, float32.",
        markdown_table(_bars_table(bars(results))),
        f"![Time and ratio to softmax attention over length]({stem}.png)",
    ]
    for task in TASKS[:2]:
        if results.names(task):
            parts += [
                f"## {task.capitalize()}",
                *map(markdown_table, sequence_tables(results, task)),
            ]
    if results.memory:
        parts += ["## Memory", *map(markdown_table, memory_tables(results))]
    if results.names("step"):
        parts += ["## One decoding step", *map(markdown_table, step_tables(results))]
    if results.remarks:
        remarks = "\n".join(f"* {remark}" for remark in results.remarks)
        parts += ["## Left out, and remarks", remarks]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def sequence_tables(results: Results, task: str) -> list[Table]:
    """Return times and growth, the ratio to softmax attention, and that to other people's code."""
    lengths, names = results.lengths(task), results.names(task)
    header = tuple(f"{tokens:,}" for tokens in lengths)
    rows, against_softmax, against_others = [], [], []
    for name in names:
        who = results.contenders[name]
        keys = [Key(task, tokens, name) for tokens in lengths]
        slope = results.slope(task, name)
        times = [_milliseconds(results.seconds.get(key)) for key in keys]
        rows.append((name, who.backend, *times, "" if slope is None else f"{slope:.2f}"))
        ratios = [results.times_faster(task, tokens, name, BASELINE) for tokens in lengths]
        if who.source == "rxlm":
            against_softmax.append((name, *map(_times, ratios)))
        elif name != BASELINE:
            ours = f"{TITLES[who.mechanism]}, rxlm"
            ratios = [results.times_faster(task, tokens, ours, name) for tokens in lengths]
            against_others.append((f"{ours} over {who.source}", *map(_times, ratios)))
    shortest, longest = SLOPE_LENGTHS
    tables = [
        Table(
            "",
            ("milliseconds at T =", "backend", *header, "growth"),
            rows,
            f"Medians. Growth: the exponent p of T^p fitted over {shortest:,} to {longest:,}, "
            "where at least three lengths were measured.",
        ),
        Table("", ("times faster than SDPA", *header), against_softmax, RATIO_NOTE),
    ]
    if against_others:
        tables.append(Table("", ("times faster than other code", *header), against_others))
    return tables


RATIO_NOTE = "Median of the ratios within a round, quartiles in brackets; below 1 is slower."


def memory_tables(results: Results) -> list[Table]:
    """Return the peak memory of the passes, one table each."""
    tables = []
    for task in TASKS[:2]:
        lengths = sorted({key.tokens for key in results.memory if key.task == task})
        rows = []
        for name, who in results.contenders.items():
            keys = [Key(task, tokens, name) for tokens in lengths]
            if any(key in results.memory for key in keys):
                cells = [_mebibytes(results.memory[k]) if k in results.memory else "" for k in keys]
                rows.append((name, who.backend, *cells))
        if rows:
            header = (f"{task}: MiB at T =", "backend", *(f"{tokens:,}" for tokens in lengths))
            tables.append(Table("", header, rows))
    note = (
        "Highest memory of a fresh process on top of what it held, arguments included, when the "
        "pass began: outputs, gradients, intermediate results, and what libraries set up at first "
        "use."
    )
    return [*tables[:-1], tables[-1]._replace(note=note)]


def step_tables(results: Results) -> list[Table]:
    """Return time per step and what a step reads."""
    positions = results.lengths("step")
    rows = []
    for name in results.names("step"):
        keys = [Key("step", position, name) for position in positions]
        times = [f"{1e6 * quartiles(results.seconds[key]).median:,.0f}" for key in keys]
        sizes = [f"{results.read_bytes[key] / 1024:,.0f}" for key in keys]
        rows.append((name, results.contenders[name].backend, *times, *sizes))
    header = [f"us at {position:,}" for position in positions]
    header += [f"KiB at {position:,}" for position in positions]
    note = (
        "Median time of one step after so many tokens, and the state (softmax: the cache of keys "
        "and values) that it reads."
    )
    faster = [
        (name, *(_times(results.times_faster("step", p, name, BASELINE)) for p in positions))
        for name in results.names("step")
        if results.contenders[name].source == "rxlm"
    ]
    ratio_header = ("times faster than SDPA at", *(f"{position:,}" for position in positions))
    return [
        Table("", ("step", "backend", *header), rows, note),
        Table("", ratio_header, faster, RATIO_NOTE),
    ]


def _bars_table(found: Sequence[Bar]) -> Table:
    rows = [(bar.asked, bar.measured, "yes" if bar.met else "NO") for bar in found]
    return Table("", ("asked", "measured", "met"), rows, prose=True)


def _milliseconds(samples: list[float] | None) -> str:
    if samples is None:
        return ""
    value = 1000 * quartiles(samples).median
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: Quartiles | None) -> str:
    if value is None:
        return ""
    lower, median, upper = (f"{x:.0f}" if x >= 100 else f"{x:.2g}" for x in value)
    return f"{median} ({lower}-{upper})"


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f} %"


def _mebibytes(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 2**20:,.0f}"
