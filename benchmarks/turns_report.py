"""What `turns.py` found, as a table of values, a figure and a page."""

from __future__ import annotations

import csv
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import Quartiles, quartiles, ratio

OURS = "rxlm"
AGAIN = "rxlm, first beside last"
"""The first and the last turn, timed next to each other: their ratio is taken from these."""
REREADS = "Llama, rereads"
CACHED = "Llama, prefix cache"
NAMES = (OURS, CACHED, REREADS)


class Key(NamedTuple):
    """What a sample belongs to; ``task`` is 'first token', 'answer' or 'update'."""

    task: str
    turn: int
    contender: str


@dataclass
class TurnResults:
    """All that was measured: seconds per call, one a round; ``think``: of first tokens."""

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    state_bytes: dict[tuple[int, str], int] = field(default_factory=dict)
    think: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def turns(results: TurnResults) -> list[int]:
    return sorted({key.turn for key in results.seconds})


def grown(results: TurnResults, task: str) -> Quartiles:
    """Return how many times longer the last turn takes than the first, ours."""
    first, last = turns(results)[0], turns(results)[-1]
    return ratio(results.seconds[Key(task, last, AGAIN)], results.seconds[Key(task, first, AGAIN)])


def better(results: TurnResults, turn: int, other: str) -> Quartiles:
    """Return how many times sooner our first token comes."""
    mine = results.seconds[Key("first token", turn, OURS)]
    return ratio(results.seconds[Key("first token", turn, other)], mine)


def added(results: TurnResults) -> float:
    """Return by how many milliseconds a background update delays the next first token."""
    medians = {name: statistics.median(values) for name, values in results.think.items()}
    return 1000 * (medians["background"] - medians["inline"])


def bars(results: TurnResults) -> list[tuple[str, str, bool]]:
    """Return what was asked, what came out, and whether that is enough."""
    first, last = turns(results)[0], turns(results)[-1]
    at = min(turns(results), key=lambda turn: abs(turn - 64))
    found = []
    for task in ("first token", "answer", "update"):
        value = grown(results, task)
        asked = f"{task}: turn {last} over turn {first} at most 1.05"
        found.append((asked, _text(value), value.median <= 1.05))
    for other, least in ((REREADS, 10.0), (CACHED, 1.0)):
        value = better(results, at, other)
        asked = f"first token at turn {at}: at least {least:.0f}x sooner than {other}"
        found.append((asked, f"{_text(value)}x", value.median >= least))
    sizes = {results.state_bytes[turn, OURS] for turn in turns(results)}
    found.append(
        ("bytes of a conversation: constant", f"{max(sizes):,}", len(sizes) == 1),
    )
    late = added(results)
    asked = "added to the next first token by a finished background update: < 2 ms"
    found.append((asked, f"{late:+.2f} ms (median)", late < 2.0))
    return found


def _text(value: Quartiles) -> str:
    return f"{value.median:.3g} ({value.lower:.3g}-{value.upper:.3g})"


def write(results: TurnResults, out: Path, command: str) -> None:
    """Write all files."""
    _write_csv(results, out / "turns.csv")
    _draw(results, out / "turns.png")
    (out / "turns.md").write_text(_page(results, command), encoding="utf-8")


def _page(results: TurnResults, command: str) -> str:
    facts = Table("", ("", "this run"), list(results.facts.items()))
    asked = Table(
        "",
        ("asked", "measured", "met"),
        [(text, value, "yes" if met else "NO") for text, value, met in bars(results)],
    )
    parts = [
        "# The cost of a turn",
        f"Written by `{command}`; every figure below comes from that run. All values are in "
        "[turns.csv](turns.csv).",
        markdown_table(facts),
        "## What was asked, and what came out",
        markdown_table(asked),
        "![Time to the first token and bytes by turn](turns.png)",
    ]
    for title, task in (
        ("Time to the first token (ms)", "first token"),
        ("Time of the whole answer (ms)", "answer"),
    ):
        rows = [
            (str(turn), *(_milliseconds(results, Key(task, turn, name)) for name in NAMES))
            for turn in turns(results)
        ]
        parts += [f"## {title}", markdown_table(Table("", ("turn", *NAMES), rows))]
    rows = [
        (
            str(turn),
            _milliseconds(results, Key("update", turn, OURS)),
            *(f"{results.state_bytes[turn, name]:,}" for name in (OURS, CACHED)),
        )
        for turn in turns(results)
    ]
    header = ("turn", "update (ms)", f"bytes, {OURS}", f"bytes, {CACHED}")
    parts += ["## Memory update, and bytes between turns", markdown_table(Table("", header, rows))]
    parts.append(
        "Medians, quartiles in brackets; ratios are taken within a round. The update runs after "
        "the answer, in the background if asked for. A stateless client also keeps and sends the "
        "text, which is not counted."
    )
    return "\n\n".join(parts) + "\n"


def _milliseconds(results: TurnResults, key: Key) -> str:
    values = quartiles([1000 * value for value in results.seconds[key]])
    return _text(values)


def _write_csv(results: TurnResults, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("task", "turn", "contender", "lower", "median", "upper", "unit"))
        for key, seconds in results.seconds.items():
            table.writerow((*key, *(f"{value:.6f}" for value in quartiles(seconds)), "s"))
        for (turn, name), size in results.state_bytes.items():
            table.writerow(("bytes", turn, name, size, size, size, "bytes"))
        for name, seconds in results.think.items():
            values = (f"{value:.6f}" for value in quartiles(seconds))
            table.writerow(("first token after thinking", "", name, *values, "s"))


def _draw(results: TurnResults, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    first, whole, size = figure.subplots(1, 3)
    axis = turns(results)
    for panel, task in ((first, "first token"), (whole, "answer")):
        for name in NAMES:
            values = [quartiles(results.seconds[Key(task, turn, name)]).median for turn in axis]
            panel.plot(axis, [1000 * value for value in values], marker="o", label=name)
        panel.set(xlabel="turn", ylabel=f"{task} (ms)", xscale="log", yscale="log")
    for name in (OURS, CACHED):
        size.plot(axis, [results.state_bytes[turn, name] / 1024 for turn in axis], marker="o")
    size.set(xlabel="turn", ylabel="KiB between turns", xscale="log", yscale="symlog")
    first.legend()
    figure.savefig(path, dpi=120)
