"""The tables of the suite, built from its document. Every table of scores has all five controls.

No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rxlm.evaluation.result_tables import NO_VALUE, SHOWN_TURNS, percent, span
from rxlm.evaluation.suite import babi, facts
from rxlm.evaluation.suite.contestant import CONTROL_NAMES, CONTROLS
from rxlm.evaluation.suite.findings import NOT_GIVEN, Finding
from rxlm.evaluation.suite.rewards import ACTOR_NAMES
from rxlm.evaluation.suite.settings import TEST_TITLES
from rxlm.evaluation.tables import MET, NOT_MET, Table

BABI_DISTANCES = ((1, 1, "1"), (2, 2, "2"), (3, 4, "3-4"), (5, 8, "5-8"), (9, 10**6, "9+"))


def suite_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return every table of a document, the goals first."""
    tables = [goals_table(document)]
    for test in document["tests"]:
        tables += test_tables(document, test)
    return [table for table in tables if table.rows]


def goals_table(document: Mapping[str, Any]) -> Table:
    """Return every number that a goal stands for, and whether it is reached."""
    body = [
        (f"{TEST_TITLES[item['test']][:2]} {item['label']}", *_finding_cells(item)[1:])
        for result in document["tests"].values()
        for item in result["findings"]
        if item["goal"] is not None
    ]
    return Table(
        "Goals of the suite",
        ("", "found", "95 % interval", "by seed", "goal", ""),
        body,
        "Shares in percent. 'not judged': could not be measured; the test's own table says why.",
    )


def test_tables(document: Mapping[str, Any], test: str) -> list[Table]:
    """Return the tables of one test; of a test that was skipped, none."""
    result = document["tests"][test]
    if result["status"] != "done":
        return []
    makers = {
        "facts": _facts_tables,
        "babi": _babi_tables,
        "dialogues": _dialogue_tables,
        "cost": _cost_tables,
        "reward": _reward_tables,
        "slots": _slots_tables,
    }
    own = makers[test](result)
    return [_findings_table(TEST_TITLES[test], result["findings"]), *own]


def _findings_table(title: str, findings: Sequence[Finding]) -> Table:
    body = [(*_finding_cells(item), item["note"]) for item in findings]
    header = ("", "found", "95 % interval", "by seed", "goal", "", "note")
    return Table(f"{title}: numbers", header, body)


def _finding_cells(item: Finding) -> tuple[str, ...]:
    sign = "+-" if item["comparison"] == "within" else f"{item['comparison']} "
    goal, passed = item["goal"], item["passed"]
    judged = NO_VALUE if goal is None else "not judged"
    if passed is not None:
        judged = MET if passed else NOT_MET
    return (
        item["label"],
        shown_number(item["value"], item["unit"]),
        _range(item["low"], item["high"], item["unit"]),
        _range(item["seed_min"], item["seed_max"], item["unit"]),
        NO_VALUE if goal is None else f"{sign}{shown_number(goal, item['unit'])}",
        judged,
    )


def shown_number(value: float | None, unit: str) -> str:
    """Return a number of a finding as text."""
    if value is None:
        return NO_VALUE
    if unit == "share":
        return percent(value)
    return f"{value:+.3f}" if unit == "nats" else f"{value:.2f}"


def _range(low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return NO_VALUE
    return f"{shown_number(low, unit)} .. {shown_number(high, unit)}"


def _control_cells(rows: Sequence[Any], share: Any) -> list[str]:
    """Return a cell a control: the share of its rows, or that it was not given."""
    cells = []
    for control in CONTROLS:
        own = [row for row in rows if row["control"] == control]
        cells.append(percent(share(own).mean) if own else NOT_GIVEN)
    return cells


def _facts_tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    by_distance, other = [], []
    keys = dict.fromkeys((row["facts"], row["distance"]) for row in _main(rows))
    for count, distance in sorted(keys):
        part = facts.select(_main(rows), facts=count, distance=distance)
        own = facts.pooled(facts.select(part, control="M"))
        by_distance.append(
            (
                str(count),
                str(distance),
                *_control_cells(part, facts.pooled),
                percent(facts.mean_chance(part)),
                span(own.low, own.high),
            )
        )
    side = [row for row in rows if row["group"] in ("together", "unseen", "update", "unknown")]
    for key in dict.fromkeys(
        (row["group"], row["unseen"], row["together"], row["distance"]) for row in side
    ):
        group, unseen, together, distance = key
        part = facts.select(side, group=group, unseen=unseen, together=together, distance=distance)
        memory = facts.select(part, control="M")
        name = {
            "together": f"{together} facts in one turn",
            "unseen": {"none": "nothing new", "templates": "new wording", "words": "new words"}.get(
                unseen, unseen
            ),
            "update": "changed facts",
            "unknown": "never told: 'I do not know'",
        }[group]
        other.append(
            (
                name,
                str(distance),
                *_control_cells(part, facts.pooled),
                percent(facts.mean_chance(part)),
                percent(facts.pooled(memory, "stale").mean) if group == "update" else NO_VALUE,
                percent(facts.pooled(memory, "declined").mean),
            )
        )
    held = [
        (
            str(point["facts"]),
            percent(point["accuracy"]),
            f"{point['facts_held']:.2f}",
            f"{point['low']:.2f} .. {point['high']:.2f}",
        )
        for point in result["capacity"]
    ]
    note = "Percent right, word for word. " + "; ".join(
        f"{control}: {name}" for control, name in CONTROL_NAMES.items()
    )
    distance = result["capacity"][0]["distance"] if result["capacity"] else 0
    return [
        Table(
            "Right answers by facts held and turns since the fact was told",
            ("facts", "turns ago", *CONTROLS, "chance", "M, 95 %"),
            by_distance,
            note,
        ),
        Table(
            "Other questions",
            ("asked for", "turns ago", *CONTROLS, "chance", "M: old value", "M: declined"),
            other,
        ),
        Table(
            f"Facts held, estimated (distance {distance})",
            ("facts told", "right", "facts held", "95 % interval"),
            held,
            "(n v a - n) / (v - 1): what is not held is guessed among v values (arXiv 2407.04841).",
        ),
    ]


def _main(rows: Sequence[Any]) -> list[Any]:
    return [row for row in rows if row["group"] in ("main", "long", "capacity")]


def _babi_tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    body, distances = [], []
    for task in dict.fromkeys(row["task"] for row in rows):
        part = [row for row in rows if row["task"] == task]
        memory = [row for row in part if row["control"] == "M"]
        own = babi.pooled(memory)
        cells = [*_control_cells(part, babi.pooled), percent(babi.majority_share(memory))]
        body.append((task, *cells, span(own.low, own.high), str(own.n)))
        found = []
        for low, high, _ in BABI_DISTANCES:
            at = [row for row in memory if low <= row["distance"] <= high]
            found.append(f"{percent(babi.pooled(at).mean)}" if at else NO_VALUE)
        distances.append((task, *found))
    return [
        Table(
            "Right answers by task",
            ("task", *CONTROLS, "most frequent", "M, 95 %", "questions"),
            body,
            "Percent right. 'most frequent': the task's most frequent answer, always.",
        ),
        Table(
            "Right answers of M by turns since the last fact that is needed",
            ("task", *(name for _, _, name in BABI_DISTANCES)),
            distances,
        ),
    ]


def _dialogue_tables(result: Mapping[str, Any]) -> list[Table]:
    tables = []
    for source in dict.fromkeys(row["source"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["source"] == source]
        turns = [turn for turn in SHOWN_TURNS if any(row["turn"] == turn for row in rows)]
        columns = [("answer", 0), ("carry-over", 0), *(("answer", turn) for turn in turns)]
        losses = {(row["control"], row["tokens"], row["turn"]): row["loss"] for row in rows}
        body = []
        for control in CONTROLS:
            if any(row["control"] == control for row in rows):
                cells = [_perplexity(losses.get((control, *column))) for column in columns]
            else:
                cells = [NOT_GIVEN] * len(columns)
            body.append((f"{control}  {CONTROL_NAMES[control]}", *cells))
        count = max(row["conversations"] for row in rows)
        tables.append(
            Table(
                f"Answer perplexity: {source}",
                ("read", "all turns", "carry-over", *(f"turn {turn}" for turn in turns)),
                body,
                f"{count} conversations. Carry-over: tokens of words said in an earlier turn and "
                "not in the query.",
            )
        )
    return tables


def _perplexity(loss: float | None) -> str:
    if loss is None:
        return NO_VALUE
    value = math.exp(min(loss, 700.0))
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 10_000 else f"{value:.2e}"


def _cost_tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    actors = list(dict.fromkeys(row["actor"] for row in rows))
    body = []
    for turn in sorted({row["turn"] for row in rows}):
        cells = [str(turn)]
        for actor in actors:
            row = next(row for row in rows if (row["actor"], row["turn"]) == (actor, turn))
            cells += [f"{row['prompt_ms']:.2f}", f"{row['tokens_per_second']:,.0f}"]
            if actor == "M":
                cells.append(f"{row['update_ms']:.2f}")
            cells.append(f"{row['state_bytes'] / 1000:,.1f}")
        body.append(tuple(cells))
    header = ["turn"]
    for actor in actors:
        header += [f"{actor}: first token, ms", f"{actor}: tokens/s"]
        header += [f"{actor}: update, ms"] if actor == "M" else []
        header.append(f"{actor}: state, kB")
    return [
        Table(
            "Cost of a turn",
            tuple(header),
            body,
            f"Medians. Baseline: {result['baseline']}. F reads the whole conversation at every "
            "turn; 'F kept' keeps its keys and values.",
        )
    ]


def _reward_tables(result: Mapping[str, Any]) -> list[Table]:
    rows = result["rows"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    names = {**CONTROL_NAMES, **ACTOR_NAMES}
    body = []
    for actor in (*ACTOR_NAMES, *CONTROLS):
        cells = []
        for source in sources:
            own = [row for row in rows if (row["source"], row["actor"]) == (source, actor)]
            if not own:
                cells += [NOT_GIVEN] * 3
                continue
            means = [row["reward"] for row in own]
            last = [row["reward"] for row in own if row["step"] == max(r["step"] for r in own)]
            first = [row["reward"] for row in own if row["step"] == 1]
            cells += [f"{sum(part) / len(part):.2f}" for part in (means, first, last)]
        body.append((names[actor] if actor in ACTOR_NAMES else f"{actor}  {names[actor]}", *cells))
    header = ["answers of"]
    for source in sources:
        header += [f"{source}: mean", "first step", "last step"]
    left_out = result["left_out"]
    note = "From 0 to 10. Being on topic is rewarded, recalling or not; see the floors."
    if left_out:
        note += f" Left out, without real data: {', '.join(left_out)}."
    return [Table("Reward of the answers", tuple(header), body, note)]


def _slots_tables(result: Mapping[str, Any]) -> list[Table]:
    body = [
        (str(layer), f"{item['mean']:.3f}", f"{item['largest']:.3f}")
        for layer, item in enumerate(result["cosine"])
    ]
    return [Table("Cosine of two slots", ("layer", "mean", "largest"), body)]
