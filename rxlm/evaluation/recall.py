"""Facts over turns: does the model still know what it was told, after d turns and n facts?

Every question is answered for real, token by token, by greedy decoding. Beside the memory of the
conversation the decoder is given controls: no memory, and that of another conversation; what it
still answers then, it did not remember. What is asked is in ``recall_plan``, what the figures must
reach in ``recall_summary``.

Shapes: L layers, B conversations, S slots, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.generator import DialogueGenerator
from rxlm.evaluation.answering import (
    greedy_answers,
    memory_of_own_answers,
    memory_of_references,
    start_of,
)
from rxlm.evaluation.conditions import Condition, state_to_read
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.recall_plan import (
    Cell,
    RecallSettings,
    cell_dialogues,
    plan_cells,
)
from rxlm.evaluation.rows import Mistake, RecallRow
from rxlm.evaluation.scoring import score_answer
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.reactive import ReactiveModel


@dataclass(frozen=True)
class RecallResult:
    """Everything that a run of the recall test found, as plain data."""

    settings: RecallSettings
    rows: list[RecallRow]
    mistakes: list[Mistake]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "rows": list(self.rows),
            "mistakes": list(self.mistakes),
            "seconds": self.seconds,
        }


def evaluate_recall(
    model: ReactiveModel, settings: RecallSettings | None = None, progress: Progress | None = None
) -> RecallResult:
    """Run the recall test.

    Args:
        model: with its tokenizer.
        settings: default: the full test, about 40 cells for each of 3 seeds.
        progress: told before every cell and at the end.

    Raises:
        UserError: if a built-in turn is longer than the model's ``seq_len``.
    """
    settings = settings or RecallSettings()
    generator = DialogueGenerator(settings.generator)
    turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
    rows: list[RecallRow] = []
    mistakes: list[Mistake] = []
    begin = time.perf_counter()
    work = [(cell, seed) for cell in plan_cells(settings) for seed in settings.seeds]
    with evaluation_mode(model), torch.no_grad():
        for done, (cell, seed) in enumerate(work):
            if progress is not None:
                progress(done, len(work), f"{cell.name}, seed {seed}")
            dialogues = cell_dialogues(generator, cell, seed, settings.dialogues)
            answers = answer_cell(model, turns, dialogues, cell, settings)
            for condition, texts in answers.items():
                rows.append(_row(cell, seed, condition, dialogues, texts, generator))
            mistakes += _mistakes(cell, dialogues, answers)[: settings.mistakes_per_cell]
    if progress is not None:
        progress(len(work), len(work), "done")
    return RecallResult(settings, rows, mistakes, time.perf_counter() - begin)


def answer_cell(
    model: ReactiveModel,
    turns: TurnEncoder,
    dialogues: Sequence[Conversation],
    cell: Cell,
    settings: RecallSettings,
) -> dict[Condition, list[str]]:
    """Return the answers to the last question of each dialogue, under each condition."""
    size = settings.batch_size
    starts = range(0, len(dialogues), size)
    memory = ConversationState.stack(
        [
            _memory(model, turns, dialogues[start : start + size], cell, settings, start)
            for start in starts
        ]
    )
    initial = start_of(model, len(dialogues))
    # The neighbour in the cell, not in the batch: the batch size must not change a result.
    other = memory.select([*range(1, len(dialogues)), 0])
    read = [state_to_read(condition, memory, other, initial) for condition in cell.conditions]
    queries = [dialogue.interactions[-1].query for dialogue in dialogues]
    texts: dict[Condition, list[str]] = {condition: [] for condition in cell.conditions}
    for start in starts:
        part = queries[start : start + size]
        # One batch for all conditions: the questions are the same, only what is read differs.
        rows = range(start, start + len(part))
        state = ConversationState.stack([state.select(rows) for state in read])
        answers = greedy_answers(model, state, part * len(read), settings.max_answer_tokens)
        for index, condition in enumerate(cell.conditions):
            own = answers[index * len(part) : (index + 1) * len(part)]
            texts[condition] += [turns.tokenizer.decode(answer.ids) for answer in own]
    return texts


def _memory(
    model: ReactiveModel,
    turns: TurnEncoder,
    dialogues: Sequence[Conversation],
    cell: Cell,
    settings: RecallSettings,
    first: int,
) -> ConversationState:
    """Return the conversations before the question."""
    earlier = [dialogue.interactions[:-1] for dialogue in dialogues]
    if cell.history == "own":
        return memory_of_own_answers(model, earlier, settings.max_answer_tokens, first)
    return memory_of_references(model, turns, earlier, first)


def _row(
    cell: Cell,
    seed: int,
    condition: Condition,
    dialogues: Sequence[Conversation],
    texts: Sequence[str],
    generator: DialogueGenerator,
) -> RecallRow:
    asked = [dialogue.interactions[-1] for dialogue in dialogues]
    scores = [score_answer(text, item) for text, item in zip(texts, asked, strict=True)]
    count = len(scores)

    def share(name: str) -> float:
        return sum(getattr(score, name) for score in scores) / count

    def guess(item: Interaction) -> float:
        # What was never told cannot be guessed, and a made-up word is in no pool.
        return 0.0 if item.value is None or item.fact is None else generator.chance(item.fact)

    return RecallRow(
        test=cell.test,
        unseen=cell.unseen,
        distance=cell.distance,
        facts=cell.facts,
        history=cell.history,
        seed=seed,
        condition=condition,
        n=count,
        exact=share("exact"),
        value=share("value"),
        stale=share("stale"),
        declined=share("declined"),
        chance=0.0 if cell.unseen == "words" else sum(map(guess, asked)) / count,
    )


def _mistakes(
    cell: Cell, dialogues: Sequence[Conversation], answers: dict[Condition, list[str]]
) -> list[Mistake]:
    found = []
    for dialogue, text in zip(dialogues, answers.get("memory", ()), strict=False):
        asked = dialogue.interactions[-1]
        if not score_answer(text, asked).exact:
            found.append(
                Mistake(
                    test=cell.test,
                    unseen=cell.unseen,
                    distance=cell.distance,
                    facts=cell.facts,
                    told=_told(dialogue),
                    query=asked.query,
                    expected=asked.answer,
                    answer=text,
                )
            )
    return found


def _told(dialogue: Conversation) -> str:
    """Return the query that told the fact asked for; empty if none did."""
    fact = dialogue.interactions[-1].fact
    telling = [
        turn.query
        for turn in dialogue.interactions[:-1]
        if any(kind == fact for kind, _ in turn.told)
    ]
    return telling[-1] if telling else ""
