"""T1: facts over turns. What is asked, the rows of what is answered, and the numbers from them.

Dialogues are the built-in ones, made up for each question (``rxlm.data.probes``), so nothing can be
known from training. Works on text through :mod:`.contestant`; no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.generator import DialogueGenerator
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.recall_plan import SEED_STRIDE
from rxlm.evaluation.scoring import score_answer
from rxlm.evaluation.statistics import Estimate, difference, estimate
from rxlm.evaluation.suite.contestant import Contestant, Control
from rxlm.evaluation.suite.findings import Finding, finding, of_estimate
from rxlm.evaluation.suite.settings import FactsSettings

Group = Literal["main", "long", "capacity", "together", "unseen", "update", "unknown"]
Metric = Literal["exact", "value", "stale", "declined"]
TEST = "facts"


class FactsCell(NamedTuple):
    """Questions of one form. ``kind``, ``unseen``, ``together``: as of the generator's probes."""

    group: Group
    kind: Literal["recall", "update", "unknown"]
    unseen: Literal["none", "pairs", "templates", "words"]
    distance: int
    facts: int
    together: int = 1

    @property
    def name(self) -> str:
        """For progress lines."""
        return f"{self.group}: distance {self.distance}, {self.facts} facts, {self.unseen}"


class FactsRow(TypedDict):
    """Shares of the ``n`` answers of a cell, seed and control (``rxlm.evaluation.scoring``)."""

    group: str
    kind: str
    unseen: str
    distance: int
    facts: int
    together: int
    control: str
    seed: int
    n: int
    exact: float
    value: float
    stale: float
    declined: float
    chance: float
    """Share that guessing from the pool of values would get right."""


def plan_facts(settings: FactsSettings) -> list[FactsCell]:
    """Return every cell, the main test first."""
    side, at = settings.side_facts, settings.side_distances
    cells = [
        FactsCell("main", "recall", "pairs", distance, facts)
        for facts in settings.facts
        for distance in settings.distances
    ]
    cells += [
        FactsCell("capacity", "recall", "pairs", settings.capacity_distance, facts)
        for facts in settings.capacity_facts
        if facts not in settings.facts
    ]
    cells += [
        FactsCell("long", "recall", "pairs", distance, facts)
        for facts in settings.long_facts
        for distance in settings.long_distances
    ]
    cells += [
        FactsCell("together", "recall", "pairs", distance, max(side, together), together)
        for together in settings.together
        for distance in at
    ]
    for unseen in ("none", "templates", "words"):
        cells += [FactsCell("unseen", "recall", unseen, distance, side) for distance in at]
    cells += [FactsCell("update", "update", "pairs", distance, side) for distance in at]
    cells += [FactsCell("unknown", "unknown", "none", distance, min(side, 11)) for distance in at]
    return cells


def cell_dialogues(
    generator: DialogueGenerator, cell: FactsCell, seed: int, count: int
) -> list[Conversation]:
    """Return the dialogues of a cell; the last interaction of each is the question."""
    return [
        generator.probe(
            seed * SEED_STRIDE + number,
            kind=cell.kind,
            distance=cell.distance,
            num_facts=cell.facts,
            unseen=cell.unseen,
            together=cell.together,
        )
        for number in range(count)
    ]


def run_facts(
    contestants: Sequence[Contestant],
    settings: FactsSettings,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[FactsRow]:
    """Ask everything and return the rows."""
    generator = DialogueGenerator(settings.generator)
    work = [(cell, seed) for cell in plan_facts(settings) for seed in seeds]
    rows: list[FactsRow] = []
    for done, (cell, seed) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{cell.name}, seed {seed}")
        dialogues = cell_dialogues(generator, cell, seed, settings.dialogues)
        for control, texts in answers_of(contestants, dialogues):
            rows.append(_row(cell, seed, control, dialogues, texts, generator))
    if progress is not None:
        progress(len(work), len(work), "done")
    return rows


def answers_of(
    contestants: Sequence[Contestant], dialogues: Sequence[Conversation]
) -> Iterator[tuple[Control, list[str]]]:
    """Yield the answers to the last query of each dialogue under every control."""
    histories = [dialogue.interactions[:-1] for dialogue in dialogues]
    queries = [dialogue.interactions[-1].query for dialogue in dialogues]
    for contestant in contestants:
        held = contestant.read(histories)
        for control in contestant.controls:
            yield control, contestant.answer(held, queries, control)


def _row(
    cell: FactsCell,
    seed: int,
    control: Control,
    dialogues: Sequence[Conversation],
    texts: Sequence[str],
    generator: DialogueGenerator,
) -> FactsRow:
    asked = [dialogue.interactions[-1] for dialogue in dialogues]
    scores = [score_answer(text, item) for text, item in zip(texts, asked, strict=True)]

    def share(name: Metric) -> float:
        return sum(getattr(score, name) for score in scores) / len(scores)

    def guess(item: Interaction) -> float:
        # What was never told cannot be guessed, and a made-up word is in no pool.
        return 0.0 if item.value is None or item.fact is None else generator.chance(item.fact)

    return FactsRow(
        group=cell.group,
        kind=cell.kind,
        unseen=cell.unseen,
        distance=cell.distance,
        facts=cell.facts,
        together=cell.together,
        control=control,
        seed=seed,
        n=len(scores),
        exact=share("exact"),
        value=share("value"),
        stale=share("stale"),
        declined=share("declined"),
        chance=0.0 if cell.unseen == "words" else sum(map(guess, asked)) / len(asked),
    )


def select(rows: Sequence[FactsRow], **wanted: Any) -> list[FactsRow]:
    """Return the rows with the wanted values."""
    return [row for row in rows if wanted.items() <= dict(row).items()]


def pooled(rows: Sequence[FactsRow], metric: Metric = "exact") -> Estimate:
    """Pool rows (at least one) of any cells and seeds."""
    return estimate([(row["seed"], round(row[metric] * row["n"]), row["n"]) for row in rows])


def mean_chance(rows: Sequence[FactsRow]) -> float:
    """Return the level of chance of pooled rows."""
    return sum(row["chance"] * row["n"] for row in rows) / sum(row["n"] for row in rows)


def capacity(facts: int, accuracy: float, chance: float) -> float:
    """Return how many of ``facts`` pairs are held: k = (n v a - n) / (v - 1), v = 1 / chance.

    The estimate of ARMT (arXiv 2407.04841): what is not held is guessed among v values.
    """
    values = 1.0 / chance
    return facts * (values * accuracy - 1) / (values - 1)


def half_distance(points: Sequence[tuple[int, float]]) -> float | None:
    """Return the distance at which accuracy has fallen to half of that at the least distance.

    Between two measured distances it is read off a straight line over the logarithm of the
    distance. None: accuracy does not fall so far within what was measured.

    Args:
        points: (distance, accuracy).
    """
    ordered = sorted(points)
    half = ordered[0][1] / 2
    for (near, high), (far, low) in itertools.pairwise(ordered):
        if high > half >= low:
            part = (high - half) / (high - low)
            return near * (far / near) ** part
    return None


def summarise_facts(rows: Sequence[FactsRow]) -> list[Finding]:
    """Return the numbers of the test beside their goals; those without a row are left out."""
    found: list[Finding] = []
    memory = select(rows, control="M")

    def add(
        name: str,
        label: str,
        chosen: Callable[[FactsRow], bool],
        metric: Metric = "exact",
        **more: Any,
    ) -> None:
        part = [row for row in memory if chosen(row)]
        if part:
            found.append(of_estimate(TEST, name, label, pooled(part, metric), **more))

    def at(group: str, facts: int, most: int, least: int = 1) -> Callable[[FactsRow], bool]:
        return lambda row: (
            (row["group"], row["facts"]) == (group, facts) and least <= row["distance"] <= most
        )

    add("one_fact_near", "1 fact, told 1 to 4 turns ago", at("main", 1, 4), goal=0.995)
    add("four_facts", "4 facts, told 1 to 8 turns ago", at("main", 4, 8), goal=0.99)
    add("eight_facts_at_8", "8 facts, told 8 turns ago", at("main", 8, 8, 8), goal=0.97)
    add("updated", "changed facts, the new value", lambda row: row["group"] == "update", goal=0.98)
    add(
        "stale",
        "changed facts, the old value",
        lambda row: row["group"] == "update",
        "stale",
        comparison="<=",
        goal=0.01,
    )
    for distance, goal in ((24, 0.95), (36, None), (64, 0.90)):
        label = f"1 fact, told {distance} turns ago"
        add(f"after_{distance}", label, at("long", 1, distance, distance), goal=goal)
    for unseen, label, goal in (
        ("words", "values never seen: made-up words", 0.95),
        ("templates", "wordings never seen", None),
        ("none", "nothing unseen but the dialogue", None),
    ):
        add(
            f"unseen_{unseen}",
            label,
            lambda row, unseen=unseen: (row["group"], row["unseen"]) == ("unseen", unseen),  # type: ignore[misc]
            goal=goal,
        )
    for count in sorted({row["together"] for row in memory if row["group"] == "together"}):
        add(
            f"together_{count}",
            f"{count} facts told in one turn",
            lambda row, count=count: (row["group"], row["together"]) == ("together", count),  # type: ignore[misc]
        )
    found += _abstention(memory) + _controls(rows) + _derived(memory)
    return found


def _abstention(memory: Sequence[FactsRow]) -> list[Finding]:
    unknown = select(memory, group="unknown")
    if not unknown:
        return []
    # Everything but "I do not know" counts as recall of what was never told.
    declined = pooled(unknown, "declined")
    false = Estimate(
        1 - declined.mean,
        1 - declined.high,
        1 - declined.low,
        1 - declined.seed_max,
        1 - declined.seed_min,
        declined.n,
    )
    label = "never told, answered all the same"
    return [of_estimate(TEST, "false_recall", label, false, comparison="<=", goal=0.05)]


def _controls(rows: Sequence[FactsRow]) -> list[Finding]:
    found = []
    main = select(rows, group="main")
    for control, name in (("Z", "memory zeroed"), ("X", "memory of another conversation")):
        part = select(main, control=control)
        if part:
            found.append(
                of_estimate(
                    TEST,
                    f"{control}_minus_chance",
                    f"above chance with {name}",
                    pooled(part),
                    mean_chance(part),
                    comparison="within",
                    goal=0.02,
                )
            )
    own, other = select(main, control="M"), select(main, control="X")
    if own and other:
        gap, low, high = difference(pooled(own), pooled(other))
        label = "use of memory: M minus X, main test"
        found.append(finding(TEST, "memory_use", label, gap, interval=(low, high)))
    return found


def _derived(memory: Sequence[FactsRow]) -> list[Finding]:
    found = []
    held = capacity_points(memory)
    if held:
        best = max(held, key=lambda point: point["facts_held"])
        label = f"facts held, estimated of {best['facts']} told (distance {best['distance']})"
        found.append(
            finding(
                TEST,
                "capacity",
                label,
                best["facts_held"],
                unit="number",
                interval=(best["low"], best["high"]),
                n=best["n"],
            )
        )
    for facts in sorted({row["facts"] for row in memory if row["group"] == "main"}):
        part = [row for row in memory if row["group"] in ("main", "long") and row["facts"] == facts]
        distances = sorted({row["distance"] for row in part})
        points = [(item, pooled(select(part, distance=item)).mean) for item in distances]
        half = half_distance(points) if points[0][1] > 0 else math.nan
        note = "" if half is not None else f"not within {distances[-1]} turns"
        value = None if half is None or math.isnan(half) else half
        if half is not None and math.isnan(half):
            note = "nothing is right at the least distance"
        name, label = f"half_distance_{facts}", f"half-distance with {facts} facts, turns"
        found.append(finding(TEST, name, label, value, unit="number", note=note))
    return found


def capacity_points(memory: Sequence[FactsRow]) -> list[dict[str, Any]]:
    """Return for each number of facts, at the distance with most of them, how many are held."""
    rows = [row for row in memory if row["group"] in ("main", "capacity")]
    counts = {
        item: len({row["facts"] for row in select(rows, distance=item)})
        for item in sorted({row["distance"] for row in rows})
    }
    if not counts:
        return []
    distance = max(counts, key=lambda item: (counts[item], item))
    points = []
    for facts in sorted({row["facts"] for row in select(rows, distance=distance)}):
        part = select(rows, distance=distance, facts=facts)
        share, chance = pooled(part), mean_chance(part)
        points.append(
            {
                "facts": facts,
                "distance": distance,
                "accuracy": share.mean,
                "n": share.n,
                "facts_held": capacity(facts, share.mean, chance),
                "low": capacity(facts, share.low, chance),
                "high": capacity(facts, share.high, chance),
            }
        )
    return points
