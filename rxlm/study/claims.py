"""What people say of linear attention, and what this study found: claim, test, effect, verdict.

A verdict is ``supported`` or ``not supported`` by the interval of the effect, or ``not testable
here``, with the reason: no such hardware, not measured, or all answer everything. No torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rxlm.evaluation.statistics import wilson_interval
from rxlm.evaluation.tables import Table
from rxlm.nn.mixers import MIXERS
from rxlm.study.bench import samples_by_length
from rxlm.study.fits import Slope, find_crossover, fit_slope, mean_interval
from rxlm.study.mechanisms import title
from rxlm.study.results import OK, ResultStore, Row
from rxlm.study.settings import StudySettings

SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable here"
OPPOSITE = "it is the other way round"
"""What an effect says whose interval lies on the other side."""
PERPLEXITY_MARGIN = 1.02
"""Ratio of perplexities up to which a mechanism counts as no worse."""
CEILING = 99.0
"""Per cent from which on an order of two mechanisms says nothing."""
RECALL_ORDER = (("deltanet", "gated_deltanet", "kda"), ("gla",), ("elu",))
"""Published order on MQAR: softmax before delta rules, before decay alone, before none (Zoology,
arXiv:2312.04927; Gated DeltaNet, arXiv:2412.06464; Kimi Linear, arXiv:2510.26692)."""


class Claim(NamedTuple):
    """One line of the table."""

    claim: str
    test: str
    effect: str
    verdict: str


def claims_of(store: ResultStore, settings: StudySettings) -> list[Claim]:
    """Return what the rows say of every claim, in the order of speed, memory, quality, kernels."""
    parts: tuple[Callable[[ResultStore, StudySettings], Iterator[Claim]], ...] = (
        _time_slopes, _crossovers, _speeds, _memory_slopes, _states, _perplexities, _recall,
        _copying, _kernels,
    )  # fmt: skip
    return [claim for part in parts for claim in part(store, settings)]


def claims_table(claims: Sequence[Claim]) -> Table:
    """Return the table of claims."""
    note = (
        "Intervals are 95 %. A slope counts as linear if its interval holds 1 and lies between "
        "0.5 and 1.5, or lies wholly between 0.95 and 1.05; as quadratic likewise around 2."
    )
    return Table("Claims", ("claim", "test", "effect", "verdict"), list(claims), note, prose=True)


def _others(settings: StudySettings) -> list[str]:
    return [name for name in settings.attention if name != settings.baseline]


def slopes_of(
    store: ResultStore, settings: StudySettings, kind: str, column: str, **wanted: object
) -> dict[str, Slope]:
    """Return the exponent of a column over length, for every mechanism that has three points."""
    found = {}
    for name in settings.attention:
        rows = [
            row
            for row in store.rows(kind, attention=name, **wanted)
            if row["outcome"] == OK and row.get(column)
        ]
        rows.sort(key=lambda row: row["seq_len"])
        if rows:
            slope = fit_slope([row["seq_len"] for row in rows], [row[column] for row in rows])
            if slope is not None:
                found[name] = slope
    return found


def _slope_claim(name: str, what: str, expected: str, test: str, slope: Slope | None) -> Claim:
    claim = f"{title(name)}: {what} grows {'linearly' if expected == 'linear' else 'quadratically'}"
    if slope is None:
        return Claim(claim, test, "fewer than three lengths", NOT_TESTABLE)
    effect = f"slope {slope.slope:.2f} [{slope.low:.2f}, {slope.high:.2f}], {slope.verdict}"
    return Claim(claim, test, effect, SUPPORTED if slope.verdict == expected else NOT_SUPPORTED)


def _time_slopes(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    slopes = slopes_of(store, settings, "op", "step_time_ms", phase="forward+backward")
    for name in settings.attention:
        expected = MIXERS[name].cost
        test = "log-log slope of the operator, forward and backward"
        yield _slope_claim(name, "time", expected, test, slopes.get(name))


def _crossovers(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    rows = store.rows("op")
    base = samples_by_length(rows, settings.baseline, phase="forward+backward")
    for name in _others(settings):
        claim = f"{title(name)} is cheaper than {title(settings.baseline)} from some length on"
        own = samples_by_length(rows, name, phase="forward+backward")
        crossing = find_crossover(own, base)
        test = "operator, forward and backward: length where the ratio passes 1"
        if crossing is None:
            yield Claim(claim, test, "not measured at two lengths", NOT_TESTABLE)
        else:
            never = crossing.words.startswith("not")
            yield Claim(claim, test, crossing.words, NOT_SUPPORTED if never else SUPPORTED)


def _speeds(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    for kind, phase, what in (
        ("efficiency", "step", "trains faster"),
        ("decode", "decode", "decodes faster"),
    ):
        rows = [row for row in store.rows(kind, phase=phase) if row["outcome"] == OK]
        longest = max((row["seq_len"] for row in rows), default=0)
        for name in _others(settings):
            claim = f"{title(name)} {what} than {title(settings.baseline)} at {longest:,} tokens"
            test = f"{phase}: time over that of the baseline, paired rounds"
            chosen = [r for r in rows if (r["attention"], r["seq_len"]) == (name, longest)]
            if not chosen or chosen[0].get("ratio") is None:
                yield Claim(claim, test, "not measured", NOT_TESTABLE)
                continue
            row = chosen[0]
            effect = f"{row['ratio']:.2f} x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
            yield Claim(claim, test, effect, SUPPORTED if row["ratio_high"] < 1 else NOT_SUPPORTED)


def _memory_slopes(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    slopes = slopes_of(store, settings, "memory", "counted_total_mb")
    for name in settings.attention:
        test = "log-log slope of the operator's peak, forward and backward, counted"
        yield _slope_claim(name, "memory of training", "linear", test, slopes.get(name))


def _states(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    rows = [row for row in store.rows("decode") if row["outcome"] == OK]
    base = {row["seq_len"]: row for row in rows if row["attention"] == settings.baseline}
    for name in _others(settings):
        own = sorted(
            (row for row in rows if row["attention"] == name), key=lambda row: int(row["seq_len"])
        )
        claim = f"{title(name)}: what decoding keeps does not grow"
        test = "bytes of the cache after the two longest contexts"
        if len(own) < 2:
            yield Claim(claim, test, "fewer than two contexts", NOT_TESTABLE)
            continue
        before, last = own[-2:]
        effect = f"{before['state_bytes']:,} and {last['state_bytes']:,} bytes"
        if last["seq_len"] in base:
            share = last["state_bytes"] / base[last["seq_len"]]["state_bytes"]
            effect += f"; {share:.1%} of {title(settings.baseline)}'s at {last['seq_len']:,} tokens"
        grows = last["state_bytes"] > before["state_bytes"]
        yield Claim(claim, test, effect, NOT_SUPPORTED if grows else SUPPORTED)


def _perplexities(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    base = row_means(store, settings.baseline)
    for name in _others(settings):
        claim = (
            f"{title(name)}: perplexity at most {PERPLEXITY_MARGIN - 1:.0%} above "
            f"{title(settings.baseline)}'s"
        )
        own = row_means(store, name)
        test = "ratio of perplexities, bootstrap over validation rows (means over common seeds)"
        if base is None or own is None or len(base) != len(own):
            yield Claim(claim, test, "not measured", NOT_TESTABLE)
            continue
        low_high = mean_interval([a - b for a, b in zip(own, base, strict=True)])
        ratio, low, high = (math.exp(value) for value in low_high)
        seeds = len({row["seed"] for row in store.rows("ppl", attention=name)})
        effect = f"{ratio:.3f} x [{low:.3f}, {high:.3f}], {seeds} seed" + "s" * (seeds > 1)
        good = high <= PERPLEXITY_MARGIN
        yield Claim(claim, test, effect, SUPPORTED if good else NOT_SUPPORTED)


def row_means(store: ResultStore, name: str) -> list[float] | None:
    """Return the loss of every validation row, the mean over seeds; None if not measured."""
    rows = [row["samples"] for row in store.rows("ppl", attention=name) if row["outcome"] == OK]
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    return [float(value) for value in np.mean(np.asarray(rows), axis=0)]


def best_rows(store: ResultStore, task: str) -> list[Row]:
    """Return the rows of a task, of each mechanism and seed those of the learning rate with the
    best validation; all rates are in ``tasks.csv``."""
    rows = [row for row in store.rows("task", task=task) if row["outcome"] == OK]
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["attention"], row["seed"])
        if key not in best or _validated(row) > _validated(best[key]):
            best[key] = row
    return [
        row
        for row in rows
        if row["learning_rate"] == best[row["attention"], row["seed"]]["learning_rate"]
    ]


def _validated(row: Row) -> float:
    value = row.get("validation_accuracy")
    return -1.0 if value is None else float(value)


class Share(NamedTuple):
    """Right answers of a mechanism at one size, all seeds together, in per cent."""

    value: float
    low: float
    high: float


def shares_of(rows: Sequence[Row], size: int) -> dict[str, Share]:
    """Return the share of right answers of each mechanism, pooled over seeds."""
    found = {}
    for name in dict.fromkeys(row["attention"] for row in rows):
        own = [row for row in rows if row["attention"] == name and row["size"] == size]
        asked = sum(row["asked"] for row in own)
        if asked:
            right = sum(row["right"] for row in own)
            low, high = wilson_interval(right, asked)
            found[name] = Share(100.0 * right / asked, 100.0 * low, 100.0 * high)
    return found


def _difference(a: Share, b: Share) -> tuple[float, float, float]:
    """Return a - b and its 95 % interval (Newcombe 1998, method 10)."""
    low = a.value - b.value - math.hypot(a.value - a.low, b.high - b.value)
    high = a.value - b.value + math.hypot(a.high - a.value, b.value - b.low)
    return a.value - b.value, low, high


def _compared(claim: str, test: str, better: Share | None, worse: Share | None) -> Claim:
    if better is None or worse is None:
        return Claim(claim, test, "not measured", NOT_TESTABLE)
    value, low, high = _difference(better, worse)
    effect = f"{better.value:.1f} % - {worse.value:.1f} % = {value:+.1f} [{low:+.1f}, {high:+.1f}]"
    if low > 0:
        return Claim(claim, test, effect, SUPPORTED)
    if min(better.value, worse.value) >= CEILING:
        return Claim(claim, test, f"{effect}; both answer everything", NOT_TESTABLE)
    opposite = f"; {OPPOSITE}" if high < 0 else "; no difference shown"
    return Claim(claim, test, effect + opposite, NOT_SUPPORTED)


def _recall(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    if "mqar" not in settings.tasks:
        return
    rows = best_rows(store, "mqar")
    size = max((row["size"] for row in rows), default=0)
    shares = shares_of(rows, size)
    test = f"MQAR, {size} pairs, right answers pooled over seeds"
    levels = [(settings.baseline,), *RECALL_ORDER]
    levels = [tuple(name for name in level if name in settings.attention) for level in levels]
    levels = [level for level in levels if level]
    for upper, lower in itertools.pairwise(levels):
        for better in upper:
            for worse in lower:
                claim = f"{title(better)} recalls more than {title(worse)}"
                yield _compared(claim, test, shares.get(better), shares.get(worse))


def _copying(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    if "copy" not in settings.tasks:
        return
    rows = best_rows(store, "copy")
    size = max((row["size"] for row in rows), default=0)
    shares = shares_of(rows, size)
    test = f"copy of {size} symbols, right tokens pooled over seeds"
    for name in _others(settings):
        claim = f"{title(settings.baseline)} copies better than {title(name)}"
        yield _compared(claim, test, shares.get(settings.baseline), shares.get(name))


def _kernels(store: ResultStore, settings: StudySettings) -> Iterator[Claim]:
    claim = "fla's kernels are faster than PyTorch's operators"
    test = "training step, backend fla over backend torch"
    kernels = [row for row in store.rows("efficiency") if row.get("backend") == "fla"]
    if kernels:
        effect = "fla ran; compare with a study of --backend torch (rxlm study compare)"
    else:
        reasons = {
            row["backend_reason"]
            for row in store.rows("efficiency")
            if row.get("backend") == "torch"
        }
        effect = "; ".join(sorted(reasons)) or "no mechanism with such a kernel was timed"
    yield Claim(claim, test, effect, NOT_TESTABLE)
