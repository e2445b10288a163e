"""What `decode.py` found, as a table of values, a figure and a page."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from decode_contenders import COMPILED, LLAMA, OURS

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import Quartiles, quartiles, ratio

PROMPT = 16  # Tokens before those that are written, in a turn whose speed is measured.
COPY, TRIAD, GEMV = "copy", "triad", "matrix times vector"
REFERENCE = (
    "the reference package is not compared: its licence forbids commercial use, so it is not "
    "installed here (docs/legal.md)"
)


class Key(NamedTuple):
    """What a sample belongs to. ``tokens``: written (task 'turn'), read (task 'first token'), or
    bytes (task 'bandwidth'). ``size``: of the model, a folder of ``stages/``; bandwidth is measured
    in the rounds of each size."""

    task: str
    threads: int
    rows: int
    tokens: int
    contender: str
    size: str = ""


@dataclass
class Results:
    """All that was measured: seconds per call, one a round; facts about the run."""

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    step_bytes: dict[tuple[str, int, int], float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def speed(results: Results, key: Key) -> Quartiles:
    """Return tokens per second, all rows together."""
    lower, median, upper = quartiles(results.seconds[key])
    work = key.rows * (key.tokens - 1)  # The first token is not in it.
    return Quartiles(work / upper, work / median, work / lower)


def bound(results: Results, key: Key) -> tuple[float, float]:
    """Return the tokens per second that memory allows, and the bytes per second that this is from.

    The fastest of copy, triad and matrix times vector, the last over as many bytes as a step reads
    (they may fit into a cache, as the weights then do).
    """
    fastest = max(
        other.tokens / quartiles(seconds).median
        for other, seconds in results.seconds.items()
        if (other.task, other.threads, other.size) == ("bandwidth", key.threads, key.size)
        and other.rows in (0, key.rows)
    )
    return key.rows * fastest / results.step_bytes[key.size, key.rows, key.tokens], fastest


def turns(results: Results) -> list[Key]:
    return [key for key in results.seconds if key.task == "turn"]


def faster(results: Results, key: Key, other: str) -> Quartiles:
    """How many times less time ``key`` takes than ``other``."""
    return ratio(results.seconds[key._replace(contender=other)], results.seconds[key])


def bars(results: Results) -> list[tuple[str, str, bool]]:
    """Return what was asked, what came out, and whether that is enough."""
    mine = [key for key in turns(results) if key.contender in (OURS, COMPILED)]
    shares = {key: speed(results, key).median / bound(results, key)[0] for key in mine}
    best = max(shares, key=lambda key: shares[key])
    found = [
        ("at least 60 % of the bandwidth bound somewhere",
         f"{100 * shares[best]:.0f} % ({described(best)})", shares[best] >= 0.6)
    ]  # fmt: skip
    for name in dict.fromkeys(key.contender for key in mine):
        singles = [key for key in mine if key.rows == 1 and key.contender == name]
        if singles:
            least = min(singles, key=lambda key: faster(results, key, LLAMA).median)
            value = faster(results, least, LLAMA)
            asked = f"{name}: at least twice as fast as {LLAMA} with its cache, one conversation"
            found.append((asked, f"least: {times(value)}x ({described(least)})", value.median >= 2))
    firsts = [k for k in results.seconds if k.task == "first token" and k.contender == OURS]
    if firsts:
        least = min(firsts, key=lambda key: faster(results, key, LLAMA).median)
        value = faster(results, least, LLAMA)
        asked = f"first token no later than {LLAMA}'s"
        found.append((asked, f"least: {times(value)}x ({described(least)})", value.median >= 1))
    return found


def described(key: Key) -> str:
    return f"{key.contender}: {place(key)}"


def place(key: Key) -> str:
    return f"{key.size}, {key.tokens} tokens, {key.rows} rows, {key.threads} threads"


def write(results: Results, folder: Path, command: str) -> None:
    """Write CSV file, figure and page."""
    stem = folder / "decode"
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, "quantity", *Quartiles._fields])
        for key, samples in results.seconds.items():
            writer.writerow([*key, "seconds", *(f"{x:.6g}" for x in quartiles(samples))])
        for (size, rows, new), read in results.step_bytes.items():
            writer.writerow(["step", "", rows, new, "", size, "bytes", "", round(read), ""])
    draw(results, f"{stem}.png")
    Path(f"{stem}.md").write_text(page(results, command), encoding="utf-8")


def page(results: Results, command: str) -> str:
    """Return the Markdown page."""
    asked = [(*bar[:2], "yes" if bar[2] else "NO") for bar in bars(results)]
    decoded = []
    for key in turns(results):
        limit, _ = bound(results, key)
        # The bound is of our step: Llama's, with more to read, has a lower one.
        ours = key.contender in (OURS, COMPILED)
        share = f"{100 * speed(results, key).median / limit:.0f} %" if ours else ""
        decoded.append(
            (
                f"{key.size} / {key.threads} / {key.rows} / {key.tokens}",
                key.contender,
                spread(speed(results, key)),
                share,
                "" if key.contender == LLAMA else times(faster(results, key, LLAMA)),
            )
        )
    machine = []
    for key, samples in results.seconds.items():
        if key.task == "bandwidth":
            lower, median, upper = quartiles(samples)
            values = Quartiles(*(key.tokens / x / 1e9 for x in (upper, median, lower)))
            where = (key.size, str(key.threads), str(key.rows or ""))
            machine.append((*where, f"{key.tokens / 2**20:,.0f}", key.contender, times(values)))
    limits = []
    for key in turns(results):
        if key.contender == OURS:
            limit, fastest = bound(results, key)
            read = results.step_bytes[key.size, key.rows, key.tokens] / 2**20
            row = (f"{read:.1f}", f"{fastest / 1e9:.1f}", f"{limit:,.0f}")
            where = (str(key.threads), str(key.rows), str(key.tokens))
            limits.append((key.size, *where, *row))
    firsts = [
        (
            f"{key.size} / {key.threads} / {key.tokens}",
            key.contender,
            times(Quartiles(*(1000 * value for value in quartiles(samples)))),
            "" if key.contender == LLAMA else times(faster(results, key, LLAMA)),
        )
        for key, samples in results.seconds.items()
        if key.task == "first token"
    ]
    note = (
        f"A turn: a prompt of {PROMPT} tokens is read, then tokens are written greedily; counted "
        "from the first token on (its time, measured in the same round, is taken off). Medians, "
        "quartiles in brackets; the last column is the median of the ratios within a round."
    )
    parts = [
        "# Speed of decoding",
        f"Written by `{command}`; every figure below comes from that run. All values are in "
        "[decode.csv](decode.csv).",
        markdown_table(Table("", ("", "this run"), list(results.facts.items()), prose=True)),
        "## What was asked, and what came out",
        markdown_table(Table("", ("asked", "measured", "met"), asked, prose=True)),
        "![Tokens per second](decode.png)",
        "## Tokens per second",
        markdown_table(
            Table(
                "",
                (
                    "size / threads / rows / tokens",
                    "",
                    "tokens/s",
                    "of the bound",
                    f"times {LLAMA}",
                ),
                decoded,
                note,
            )
        ),
        "## Time to the first token",
        markdown_table(
            Table(
                "",
                ("size / threads / prompt", "", "milliseconds", f"times {LLAMA}"),
                firsts,
                "One row. Ours reads the whole memory, too: 256 slots a layer of Micro, 1,024 of "
                "Mini.",
            )
        ),
        "## The bound",
        "Every step reads the weights that its tokens visit, the memory's keys and values, and "
        "those of the turn. The bound is the fastest bandwidth measured in the same run, by those "
        "bytes. What a step of a small model reads fits into the last cache of most machines; "
        "the product with a vector is therefore also measured over a buffer of that size.",
        markdown_table(
            Table(
                "", ("size", "threads", "rows", "tokens", "MiB a step", "GB/s", "tokens/s"), limits
            )
        ),
        markdown_table(Table("", ("size", "threads", "rows", "MiB", "", "GB/s"), machine)),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def draw(results: Results, path: str) -> None:
    """Draw tokens per second, and the bound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(key._replace(contender="") for key in turns(results)))
    names = list(dict.fromkeys(key.contender for key in turns(results)))
    figure = Figure(figsize=(10, 1.5 + 1.2 * len(places)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [speed(results, key._replace(contender=name)) for key in places]
        axes.barh(
            [number + width * index for number in range(len(places))],
            [value.median for value in found],
            0.9 * width,
            label=name,
            xerr=[[v.median - v.lower for v in found], [v.upper - v.median for v in found]],
        )
    for number, key in enumerate(places):
        limit, _ = bound(results, key)
        label = "bandwidth bound" if number == 0 else None
        axes.vlines(limit, number - 0.1, number + 0.8, colors="black", label=label)
    axes.set_yticks(
        [number + 0.35 for number in range(len(places))],
        [place(key) for key in places],
    )
    axes.set(xlabel="tokens per second, all rows together")
    axes.legend()
    figure.savefig(path, dpi=120)


def spread(value: Quartiles) -> str:
    return f"{value.median:,.0f} ({value.lower:,.0f}-{value.upper:,.0f})"


def times(value: Quartiles) -> str:
    lower, median, upper = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in value)
    return f"{median} ({lower}-{upper})"
