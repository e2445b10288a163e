"""What `serving.py` found, as a table of values, a figure and a page."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import Quartiles, ratio

BATCHED, SERIAL = "batched", "serial"


class Sample(NamedTuple):
    """One turn: seconds from asking to the first text, the end of the answer, the commit."""

    first: float
    ended: float
    committed: float
    tokens: int


class Round(NamedTuple):
    """Turns that were answered one after the other or together."""

    name: str
    number: int
    seconds: float
    samples: tuple[Sample, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(sample.tokens for sample in self.samples) / self.seconds


@dataclass
class ServingResults:
    """All that was measured."""

    rounds: list[Round] = field(default_factory=list)
    long: list[Sample] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)
    state_files: int = 0
    state_bytes: int = 0
    mean_rows: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)


def speedup(results: ServingResults) -> Quartiles:
    """Return how many times more tokens a second batching gives, within rounds."""
    speeds = {
        name: [one.tokens_per_second for one in results.rounds if one.name == name]
        for name in (BATCHED, SERIAL)
    }
    return ratio(speeds[BATCHED], speeds[SERIAL])


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that so many (a share) do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def growth(results: ServingResults) -> float:
    """Return the memory at the end over that after a quarter of the turns."""
    quarter = results.resident[len(results.resident) // 4][1]
    return results.resident[-1][1] / quarter


def bars(results: ServingResults) -> list[tuple[str, str, bool]]:
    """Return what was asked, what came out, and whether that is enough."""
    found = speedup(results)
    grown = growth(results)
    return [
        (
            "continuous batching: at least 4 times the tokens per second of one by one",
            f"{found.median:.3g} ({found.lower:.3g}-{found.upper:.3g})x",
            found.median >= 4,
        ),
        (
            "memory of the process: flat (the last three quarters of the long run, 5 %)",
            f"{100 * (grown - 1):+.1f} %",
            grown <= 1.05,
        ),
    ]


def write(results: ServingResults, out: Path, command: str) -> None:
    """Write all files."""
    _write_csv(results, out / "serving.csv")
    _draw(results, out / "serving.png")
    first = [sample.first for sample in results.long]
    values = {
        "facts": results.facts,
        "speedup": speedup(results)._asdict(),
        "first_token_p50": percentile(first, 0.5),
        "first_token_p99": percentile(first, 0.99),
        "resident": results.resident,
        "state_files": results.state_files,
        "state_bytes": results.state_bytes,
        "mean_rows": results.mean_rows,
    }
    (out / "serving.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (out / "serving.md").write_text(page(results, command), encoding="utf-8")


def page(results: ServingResults, command: str) -> str:
    """Return the Markdown page."""
    facts = Table("", ("", "this run"), list(results.facts.items()))
    asked = Table(
        "",
        ("asked", "measured", "met"),
        [(text, found, "yes" if met else "NO") for text, found, met in bars(results)],
    )
    speeds = Table(
        "",
        ("", "tokens/s", "first token p50 (ms)", "p99 (ms)", "turn p50 (ms)"),
        [_speed_row(results, name) for name in (BATCHED, SERIAL)],
    )
    first = [1000 * sample.first for sample in results.long]
    committed = [1000 * (sample.committed - sample.ended) for sample in results.long]
    long = Table(
        "",
        ("long run", ""),
        [
            ("turns", f"{len(results.long):,}"),
            ("first token, p50 / p99 (ms)", f"{percentile(first, 0.5):.1f} / "
             f"{percentile(first, 0.99):.1f}"),
            ("end of answer to commit, p50 / p99 (ms)", f"{percentile(committed, 0.5):.1f} / "
             f"{percentile(committed, 0.99):.1f}"),
            ("rows of a decode step, mean", f"{results.mean_rows:.1f}"),
            ("state files", f"{results.state_files:,} of "
             f"{results.state_bytes / max(1, results.state_files):,.0f} bytes"),
        ],
    )  # fmt: skip
    return (
        "\n\n".join(
            [
                "# Serving many conversations",
                f"Written by `{command}`; every figure below comes from that run.",
                markdown_table(facts),
                "## What was asked, and what came out",
                markdown_table(asked),
                "## Batched and one by one",
                markdown_table(speeds),
                "Medians over rounds. A client asks the next session as soon as its turn is "
                "committed, so that a turn of the serial service waits for those of all others.",
                "## Many turns",
                markdown_table(long),
                "![Memory of the process and time to the first token](serving.png)",
            ]
        )
        + "\n"
    )


def _speed_row(results: ServingResults, name: str) -> tuple[str, ...]:
    rounds = [one for one in results.rounds if one.name == name]
    first = [1000 * sample.first for one in rounds for sample in one.samples]
    ended = [1000 * sample.ended for one in rounds for sample in one.samples]
    speed = statistics.median(one.tokens_per_second for one in rounds)
    return (
        name,
        f"{speed:,.0f}",
        f"{percentile(first, 0.5):.1f}",
        f"{percentile(first, 0.99):.1f}",
        f"{percentile(ended, 0.5):.1f}",
    )


def _write_csv(results: ServingResults, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("round", "service", "turns", "tokens", "seconds", "tokens_per_second"))
        for one in results.rounds:
            tokens = sum(sample.tokens for sample in one.samples)
            values = (one.number, one.name, len(one.samples), tokens)
            table.writerow((*values, f"{one.seconds:.4f}", f"{one.tokens_per_second:.1f}"))


def _draw(results: ServingResults, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    memory, first = figure.subplots(1, 2)
    memory.plot(*zip(*((done, size / 2**20) for done, size in results.resident), strict=True))
    memory.set(xlabel="turns", ylabel="resident memory (MiB)", ylim=(0, None))
    values = sorted(1000 * sample.first for sample in results.long)
    first.plot(values, [(place + 1) / len(values) for place in range(len(values))])
    first.set(xlabel="time to the first token (ms)", ylabel="share of turns", xlim=(0, None))
    figure.savefig(path, dpi=120)
