"""T2: bAbI over turns. Facts are told in one turn, the question comes in a later one.

That is harder than the published setting, in which a question stands right behind its story. Beside
the scores stands what the most frequent answer of the task would get. Works on text; no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.sources import load_conversations
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.scoring import normalise
from rxlm.evaluation.statistics import Estimate, estimate
from rxlm.evaluation.suite.contestant import Contestant, Control, Turns
from rxlm.evaluation.suite.findings import Finding, finding, of_estimate
from rxlm.evaluation.suite.settings import BabiSettings

TEST = "babi"
FILE = "dialogues/babi_turns.valid.jsonl.gz"
GOALS = {
    "qa1": 0.95,
    "qa2": 0.85,
    "qa3": 0.60,
    "qa6": 0.95,
    "qa7": 0.90,
    "qa8": 0.90,
    "qa9": 0.95,
    "qa11": 0.95,
    "qa15": 0.95,
}


class Question(NamedTuple):
    """A question and the turns before it; ``majority``: the most frequent answer of its task."""

    task: str
    history: Turns
    asked: Interaction
    majority: str


class BabiRow(TypedDict):
    """Right answers of one task, distance, control and seed. ``distance`` 0: not known."""

    task: str
    distance: int
    control: str
    seed: int
    n: int
    right: int
    majority: int


def load_questions(
    data: Path, settings: BabiSettings, fits: Callable[[Turns], bool]
) -> dict[str, list[Question]]:
    """Return a question of each conversation of each task, in an order that does not depend on
    the file's.

    Args:
        data: the folder that ``RXLM_DATA`` names.
        settings: which tasks.
        fits: whether a contestant can read turns; conversations with others are left out.

    Raises:
        UserError: if the file is missing or damaged.
    """
    by_task: dict[str, list[Conversation]] = {task: [] for task in settings.tasks}
    for conversation in load_conversations(data / FILE):
        task = conversation.id.split(":")[0]
        if task in by_task and fits(conversation.interactions):
            by_task[task].append(conversation)
    return {task: questions_of(task, found) for task, found in by_task.items() if found}


def questions_of(task: str, conversations: Sequence[Conversation]) -> list[Question]:
    """Return one question of each conversation that asks any."""
    every = Counter(
        turn.answer
        for item in conversations
        for turn in item.interactions
        if turn.kind == "question"
    )
    majority = max(every, key=lambda answer: (every[answer], answer), default="")
    found = []
    for item in sorted(conversations, key=lambda item: _rank(item.id)):
        places = [n for n, turn in enumerate(item.interactions) if turn.kind == "question"]
        if places:
            place = places[_rank(f"{item.id}?") % len(places)]
            turns = item.interactions
            found.append(Question(task, turns[:place], turns[place], majority))
    return found


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def run_babi(
    contestants: Sequence[Contestant],
    questions: dict[str, list[Question]],
    settings: BabiSettings,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[BabiRow]:
    """Ask everything and return the rows. A task with few conversations is shared by the seeds."""
    rows: list[BabiRow] = []
    for done, (task, found) in enumerate(questions.items()):
        if progress is not None:
            progress(done, len(questions), task)
        count = min(settings.questions, len(found) // len(seeds))
        parts = [found[place * count : (place + 1) * count] for place in range(len(seeds))]
        asked = [question for part in parts for question in part]
        for contestant in contestants:
            held = contestant.read([question.history for question in asked])
            queries = [question.asked.query for question in asked]
            for control in contestant.controls:
                texts = contestant.answer(held, queries, control)
                for place, (seed, part) in enumerate(zip(seeds, parts, strict=True)):
                    own = texts[place * count : (place + 1) * count]
                    rows += _rows(task, control, seed, part, own)
    if progress is not None:
        progress(len(questions), len(questions), "done")
    return rows


def _rows(
    task: str, control: Control, seed: int, part: Sequence[Question], texts: Sequence[str]
) -> list[BabiRow]:
    rows: dict[int, BabiRow] = {}
    for question, text in zip(part, texts, strict=True):
        distance = question.asked.distance or 0
        row = rows.setdefault(
            distance,
            BabiRow(
                task=task, distance=distance, control=control, seed=seed, n=0, right=0, majority=0
            ),
        )
        wanted = normalise(question.asked.answer)
        row["n"] += 1
        row["right"] += normalise(text) == wanted
        row["majority"] += normalise(question.majority) == wanted
    return [rows[distance] for distance in sorted(rows)]


def pooled(rows: Sequence[BabiRow]) -> Estimate:
    """Return the share of right answers of rows (at least one)."""
    return estimate([(row["seed"], row["right"], row["n"]) for row in rows])


def majority_share(rows: Sequence[BabiRow]) -> float:
    """Return what the most frequent answer would get."""
    return sum(row["majority"] for row in rows) / sum(row["n"] for row in rows)


def summarise_babi(rows: Sequence[BabiRow]) -> list[Finding]:
    """Return the score of each task beside its goal, and the mean over tasks."""
    found: list[Finding] = []
    memory = [row for row in rows if row["control"] == "M"]
    tasks = list(dict.fromkeys(row["task"] for row in memory))
    for task in tasks:
        part = [row for row in memory if row["task"] == task]
        note = f"most frequent answer: {100 * majority_share(part):.1f} %"
        found.append(
            of_estimate(TEST, task, f"{task}", pooled(part), goal=GOALS.get(task), note=note)
        )
    for control, label in (("M", "mean over tasks"), ("Z", "mean over tasks, memory zeroed")):
        chosen = [row for row in rows if row["control"] == control]
        shares = [
            pooled([row for row in chosen if row["task"] == task]).mean
            for task in tasks
            if any(row["task"] == task for row in chosen)
        ]
        if shares:
            n = sum(row["n"] for row in chosen)
            found.append(finding(TEST, f"mean_{control}", label, sum(shares) / len(shares), n=n))
    return found
