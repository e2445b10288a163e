"""What mqar.py writes: a CSV file, a figure, a page; and what was asked of the mechanisms.

A row is a line of mqar.jsonl (a dictionary): ``scores`` maps numbers of pairs to (correct, asked).
Every figure on the page comes from the rows given here. Nothing is trained here.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mqar_training import WITHOUT_CONVOLUTION, Recipe

from rxlm.evaluation.statistics import wilson_interval
from rxlm.evaluation.tables import Table, markdown_table

Row = dict[str, Any]
GOAL = 0.99
REACHING = ("deltanet", "gated_deltanet", "kda")
BELOW = ("gla", "elu")
MINUTES = 30.0
TITLES = {
    "softmax": "softmax", "deltanet": "DeltaNet", "gated_deltanet": "Gated DeltaNet",
    "kda": "KDA", "gla": "GLA", "elu": "ELU + 1", "local": "window",
}  # fmt: skip


class Bar(NamedTuple):
    """Something asked, what was measured, and whether that is enough."""

    asked: str
    measured: str
    met: bool


def shares(row: Row) -> dict[int, float]:
    """Share of right answers by number of pairs."""
    return {int(pairs): correct / asked for pairs, (correct, asked) in row["scores"].items()}


def title(mixer: str) -> str:
    return TITLES.get(mixer, mixer)


def score_table(rows: Sequence[Row]) -> Table:
    """Accuracy by number of pairs, with what it took."""
    pairs = list(shares(rows[0]))
    body = []
    for row in sorted(rows, key=lambda row: row["dim"]):
        found = shares(row)
        correct, asked = list(row["scores"].values())[-1]
        low, high = wilson_interval(correct, asked)
        body.append((
            title(row["mixer"]), f"{row['dim']}", f"{row['seed']}",
            *(f"{100 * found[count]:.1f}" for count in pairs),
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{row['state_bytes']:,}",
            f"{row['steps']:,}" + ("" if row["reached_target"] else " (end)"),
            f"{row['cpu_seconds'] / 60:.1f}",
        ))  # fmt: skip
    chance = ("guess among the told", "-", "-", *(f"{100 / count:.1f}" for count in pairs))
    body.append((*chance, "-", "-", "-", "-"))
    header = (
        "mechanism", "D", "seed", *(f"{count} pairs" for count in pairs),
        f"95 % of {pairs[-1]} pairs", "state bytes", "steps", "CPU minutes",
    )  # fmt: skip
    return Table("Right answers in %", header, body)


def bars(rows: Sequence[Row]) -> list[Bar]:
    """What was asked, for each width; a mechanism counts with its worst seed."""
    found = []
    for dim in sorted({row["dim"] for row in rows}):
        mine = [row for row in rows if row["dim"] == dim]
        pairs = list(shares(mine[0]))
        for name in REACHING:
            seen = [shares(row) for row in mine if row["mixer"] == name]
            if seen:
                least = {count: min(share[count] for share in seen) for count in pairs}
                good = [count for count in pairs if least[count] >= GOAL]
                reach = ", ".join(map(str, good)) or "no"
                text = f"least {100 * min(least.values()):.1f} %; {GOAL:.0%} at {reach} pairs"
                asked = f"D = {dim}: {title(name)} at least {GOAL:.0%} at up to {pairs[-1]} pairs"
                found.append(Bar(asked, text, min(least.values()) >= GOAL))
        for name in BELOW:
            lower = [row["scores"] for row in mine if row["mixer"] == name]
            higher = [row["scores"] for row in mine if row["mixer"] in REACHING]
            if lower and higher:
                best = max(wilson_interval(*list(scores.values())[-1])[1] for scores in lower)
                worst = min(wilson_interval(*list(scores.values())[-1])[0] for scores in higher)
                found.append(
                    Bar(
                        f"D = {dim}: {title(name)} below the delta rules at {pairs[-1]} pairs",
                        f"at most {100 * best:.1f} % against at least {100 * worst:.1f} % "
                        "(ends of 95 % intervals)",
                        best < worst,
                    )
                )
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    text = (
        f"{minutes:.1f} CPU minutes of process time; on each of two cores half: {minutes / 2:.1f}"
    )
    found.append(Bar(f"the table in under {MINUTES:g} minutes on two cores", text,
                     minutes / 2 < MINUTES))  # fmt: skip
    return found


def page(rows: Sequence[Row], recipe: Recipe, command: str, name: str) -> str:
    """Return the Markdown page."""
    machines, versions = distinct(rows, "machine"), distinct(rows, "torch")
    loads = [load for row in rows for load in row["load_average"]]
    steps = "; ".join(
        f"D = {dim}: {max(row['max_steps'] for row in rows if row['dim'] == dim):,}"
        for dim in sorted({row["dim"] for row in rows})
    )
    facts = [
        ("machine", machines),
        ("processes", "one thread each; CPU minutes are process time, whatever else ran"),
        ("torch", versions),
        ("date", distinct(rows, "date")),
        ("load average", f"{min(loads):g} to {max(loads):g}"),
        ("seeds", ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))),
        ("heads", "; ".join(
            f"D = {dim}: {heads}" for dim, heads in sorted({(row["dim"], row["num_heads"])
                                                           for row in rows}))),
        ("vocabulary", f"{recipe.vocab_size}, half keys and half values"),
        ("rows (pairs: tokens in training, tested)", "; ".join(
            f"{d.num_pairs}: {d.train_length}, {d.test_length}" for d in recipe.difficulties)),
        ("optimizer", f"AdamW, learning rate {recipe.learning_rate:g}, weight decay "
         f"{recipe.weight_decay:g}, {recipe.tokens_per_step:,} tokens a step"),
        ("most steps", steps),
    ]  # fmt: skip
    asked = [(bar.asked, bar.measured, "yes" if bar.met else "NO") for bar in bars(rows)]
    table = Table("", ("asked", "measured", "met"), asked, prose=True)
    wanting = ", ".join(title(name) for name in WITHOUT_CONVOLUTION)
    return f"""# Multi-query associative recall

Written by `{command}`, which trains what
[{name}.jsonl]({name}.jsonl) lacks: every figure below comes from the rows of that file, all values
are in [{name}.csv]({name}.csv). A row tells pairs of key and value, then asks for every key once,
at distances that follow Zoology's power law (arXiv:2312.04927; `rxlm/data/mqar.py`). Models are an
embedding, two blocks of norm and mechanism, no feed-forward network. Recurrences bring a short
convolution; in front of the others ({wanting}) stands one of the same width. All recurrences have
the full width of keys and values, so that their states are equally large: GLA, too, which is
published with half of it. One recipe for all mechanisms, chosen on three short trials of
DeltaNet at D = 64 (vocabulary, learning rate, tokens a step, one or two heads) and not tuned for
the others: a curriculum from few pairs to many, until {recipe.target:.1%} of other rows are
answered at every number of pairs, or until the learning rate has fallen to its end ("end").

{markdown_table(Table("", ("", "this run"), facts, prose=True))}
## What was asked, and what came out

{markdown_table(table)}
Zoology's models (vocabulary of 8,192, tested up to 256 pairs, read from its figure) do not answer
everything at this size of state either: DeltaNet 79 % on average at D = 64 and 96 % at 128.

## Right answers in %

{markdown_table(score_table(rows))}
![Right answers by number of pairs]({name}.png)

State bytes: what decoding keeps of one row after the longest test, both layers, convolutions
included; softmax keeps all keys and values. Guessing among the values that were told is what a
model can do that knows which tokens are values but not whose. Intervals are over questions: with
one seed, they say nothing of how much another seed would differ.
"""


def distinct(rows: Sequence[Row], field: str) -> str:
    return ", ".join(sorted({row[field] for row in rows}))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line for each row and number of pairs."""
    fields = ["mixer", "dim", "num_heads", "seed", "parameters", "state_bytes", "steps",
              "max_steps", "reached_target", "cpu_seconds", "wall_seconds"]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, "pairs", "correct", "asked", "accuracy", "low", "high"])
        for row in rows:
            common = [_plain(row[field]) for field in fields]
            for pairs, (correct, asked) in row["scores"].items():
                ends = wilson_interval(correct, asked)
                writer.writerow([*common, pairs, correct, asked, *map(_plain,
                                 (correct / asked, *ends))])  # fmt: skip


def _plain(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy over the number of pairs, one panel a width; seeds are averaged."""
    from matplotlib.figure import Figure

    dims = sorted({row["dim"] for row in rows})
    figure = Figure(figsize=(5 * len(dims), 3.6), layout="constrained")
    for place, dim in enumerate(dims):
        axes = figure.add_subplot(1, len(dims), place + 1)
        names = dict.fromkeys(row["mixer"] for row in rows if row["dim"] == dim)
        for name in names:
            seen = [shares(row) for row in rows if (row["mixer"], row["dim"]) == (name, dim)]
            pairs = list(seen[0])
            axes.plot(pairs, [mean(share[count] for share in seen) for count in pairs],
                      marker="o", label=title(name))  # fmt: skip
        axes.plot(pairs, [1 / count for count in pairs], ":", color="gray", label="guess")
        axes.set(xscale="log", xlabel="pairs", ylabel="right answers", title=f"D = {dim}",
                 ylim=(0, 1.02))  # fmt: skip
        axes.set_xticks(pairs, [str(count) for count in pairs])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
