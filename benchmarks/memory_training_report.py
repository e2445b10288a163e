"""What memory_training.py writes: a JSON file, a figure, a page. Nothing is trained here.

A result is one training (a variant and a seed) with the rows of its recall test. Shares are those
of exact answers, in per cent.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memory_training_variants import RECIPE

from rxlm.evaluation.recall_summary import mean_chance, pool
from rxlm.evaluation.rows import RecallRow
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.training.run_folder import write_atomically

Result = dict[str, Any]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Two-sided 95 % quantile of Student's t, by number of pairs."""


def _remembered(row: RecallRow) -> bool:
    return row["test"] == "recall" and row["condition"] == "memory"


FIGURES: dict[str, tuple[str, Callable[[RecallRow], bool]]] = {
    "recall": ("recall", _remembered),
    "distance_1": ("1 turn ago", lambda row: _remembered(row) and row["distance"] == 1),
    "distance_2": ("2 turns", lambda row: _remembered(row) and row["distance"] == 2),
    "distance_4": ("4 turns", lambda row: _remembered(row) and row["distance"] == 4),
    "pairs": ("value never met", lambda row: _remembered(row) and row["unseen"] == "pairs"),
    "changed": (
        "changed fact",
        lambda row: row["test"] == "update" and row["condition"] == "memory",
    ),
    "zeroed": (
        "memory zeroed",
        lambda row: row["test"] == "recall" and row["condition"] == "zeroed",
    ),
}
"""What is shown: title, and the rows of the recall test that it pools."""


class Difference(NamedTuple):
    """Variant minus recipe, paired by seed: mean and its 95 % interval (NaN with one pair)."""

    mean: float
    low: float
    high: float
    verdict: str


def write_report(results: Sequence[Result], out: Path, command: str) -> None:
    """Write memory_training.md, .json and .png into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    found = {"command": command, "results": list(results)}
    write_atomically(out / "memory_training.json", json.dumps(found, indent=1) + "\n")
    write_atomically(out / "memory_training.md", page(results, command))
    draw(results, out / "memory_training.png")


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each variant, in the order given."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result)
    return found


def figure(result: Result, name: str) -> float:
    """Return one figure of one training, in per cent."""
    chosen = FIGURES[name][1]
    return 100.0 * pool([row for row in result["rows"] if chosen(row)]).mean


def compare(variant: Sequence[Result], recipe: Sequence[Result]) -> Difference:
    """Compare the recall of a variant with that of the recipe.

    The verdict is that every seed of one is above every seed of the other; with fewer than two
    seeds of each there is none.
    """
    ours = {result["seed"]: figure(result, "recall") for result in variant}
    theirs = {result["seed"]: figure(result, "recall") for result in recipe}
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, "")
    mean = statistics.fmean(pairs)
    half = math.nan
    if len(pairs) in T_95:
        half = T_95[len(pairs)] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    verdict = "no difference beyond the spread"
    if min(len(ours), len(theirs)) < 2:
        verdict = ""
    elif min(ours.values()) > max(theirs.values()):
        verdict = "helps"
    elif max(ours.values()) < min(theirs.values()):
        verdict = "hurts"
    return Difference(mean, mean - half, mean + half, verdict)


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the range of the seeds."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def verdict_table(results: Sequence[Result]) -> Table:
    """Return recall, its difference to the recipe's, and what follows."""
    groups = by_variant(results)
    recipe = groups.get(RECIPE, [])
    body = []
    for name, group in groups.items():
        values = [figure(result, "recall") for result in group]
        difference, verdict = "", ""
        if name != RECIPE and recipe:
            found = compare(group, recipe)
            verdict = found.verdict
            if not math.isnan(found.mean):
                difference = f"{found.mean:+.1f}"
            if not math.isnan(found.low):
                difference += f" ({found.low:+.1f} to {found.high:+.1f})"
        body.append((name, group[0]["title"], spread(values), f"{len(group)}", difference, verdict))
    heads = ("", "what differs", "recall", "seeds", "difference to the recipe", "verdict")
    return Table("Recall by method", heads, body)


def figure_table(results: Sequence[Result]) -> Table:
    """Return all figures of all variants."""
    names = [name for name in FIGURES if name != "recall"]
    body = []
    for name, group in by_variant(results).items():
        tokens = statistics.fmean(result["tokens"] for result in group) / 1e6
        shown = (spread([figure(result, key) for result in group]) for key in names)
        body.append((name, *shown, f"{tokens:.2f}"))
    heads = ("", *(FIGURES[name][0] for name in names), "million tokens")
    return Table("All figures", heads, body)


def page(results: Sequence[Result], command: str) -> str:
    """Return the page that is committed."""
    first = results[0]
    budget = first["budget"]
    asked = [row for row in first["rows"] if FIGURES["recall"][1](row)]
    machines = ", ".join(sorted({result["machine"] for result in results}))
    dates = sorted({result["date"] for result in results})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    parts = [
        "# Methods of memory-aware training",
        "Each row is the nano recipe with one thing changed, at the same number of updates: joint "
        f"LM {budget['joint']}, SFT {budget['sft']}, memory pretraining {budget['pretraining']}, "
        f"then memory-aware training, {budget['history']} updates reading the history (4 turns x "
        f"16 dialogues) and {budget['memory']} reading the memory (6 turns x 8 dialogues). That is "
        "a tenth of the recipe's own length: methods that pay late do not show here. A seed sets "
        "new weights, dropout and training dialogues. Stages before memory pretraining are shared "
        "by all rows of a seed (an MD-GDN decoder has its own).",
        markdown_table(verdict_table(results)),
        f"Recall: {sum(row['n'] for row in asked)} questions of the test split for one of 4 facts, "
        "told 1, 2 or 4 turns ago, per cent right word for word, answered from memory alone; "
        f"guessing gives {100 * mean_chance(asked):.0f} %. Mean over seeds, range of the seeds in "
        "brackets. The difference is paired by seed, with its 95 % interval (Student's t). "
        "Verdict: every seed of one is above every seed of the other (by chance alone that happens "
        "to one row in ten at three seeds each).",
        "![Recall by method](memory_training.png)",
        "## All figures",
        "Recall by distance, of (kind, value) pairs that training never shows, of facts that were "
        "told anew 1 or 4 turns ago, and with a memory of zeros. Tokens are those of memory-aware "
        "training.",
        markdown_table(figure_table(results)),
        f"{machines}, 1 thread, torch {first['torch']}, {days}. All rows: "
        "[memory_training.json](memory_training.json).",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw recall of all variants: bars, and each seed as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_variant(results)
    canvas = Figure(figsize=(9, 1.5 + 0.32 * len(groups)), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for place, group in enumerate(groups.values()):
        values = [figure(result, "recall") for result in group]
        color = "tab:orange" if group[0]["variant"] == RECIPE else "tab:blue"
        axes.barh(place, statistics.fmean(values), 0.7, color=color, alpha=0.6)
        axes.plot(values, [place] * len(values), "o", color="black", markersize=4)
    if RECIPE in groups:
        mean = statistics.fmean(figure(result, "recall") for result in groups[RECIPE])
        axes.axvline(mean, color="tab:orange", linewidth=1)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set(xlabel="facts recalled, per cent (dots: seeds)", xlim=(0, 100))
    canvas.savefig(path, dpi=120)
