"""What an int8 model loses beside the model that it was made of, on the built-in test dialogues.

Perplexity of answers, greedy answers token by token, and recall of facts; both models are asked the
same things and read memories that they wrote themselves. Not here: making the model
(:mod:`rxlm.rxt.int8`), its speed (``benchmarks/int8.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, PositiveInt

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.evaluation.answering import greedy_answers, memory_of_references
from rxlm.evaluation.perplexity import (
    PerplexitySettings,
    builtin_conversations,
    evaluate_perplexity,
)
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.recall_summary import pool
from rxlm.evaluation.rows import loss_of
from rxlm.evaluation.tables import Table
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.reactive import ReactiveModel


class Int8LossSettings(Config):
    """How much to ask."""

    dialogues: int = Field(default=40, ge=2)
    """Dialogues whose answers are scored, and whose last question is answered."""
    turns: PositiveInt = 6
    """Turns of each."""
    distances: tuple[PositiveInt, ...] = (1, 8)
    """Turns between telling a fact and asking for it; a cell of questions each."""
    questions: int = Field(default=50, ge=2)
    """Questions of a cell."""
    max_answer_tokens: PositiveInt = 24
    """Longer answers are cut."""
    generator: GeneratorConfig = GeneratorConfig()
    """The built-in dialogues; ``held_out_values`` must be that of the training."""


class Quality(NamedTuple):
    """One model: perplexity of answers, and the share of ``questions`` answered exactly."""

    perplexity: float
    recall: float


class Int8Loss(NamedTuple):
    """Two models, and how far the second gives the answers of the first.

    ``agreeing_tokens``: share of positions with the same token in greedy answers to ``answers``
    questions; where one answer is longer, its rest does not agree. ``same_answers``: share of
    answers that are the same to the end.
    """

    before: Quality
    after: Quality
    agreeing_tokens: float
    same_answers: float
    tokens: int
    answers: int
    questions: int


def measure_int8_loss(
    model: ReactiveModel,
    quantized: ReactiveModel,
    settings: Int8LossSettings | None = None,
    progress: Progress | None = None,
) -> Int8Loss:
    """Measure what ``quantized`` loses beside ``model``.

    Raises:
        UserError: if a built-in turn is longer than the model's ``seq_len``.
    """
    settings = settings or Int8LossSettings()
    perplexity = PerplexitySettings(
        max_dialogues=settings.dialogues, max_turns=settings.turns, conditions=("memory",)
    )
    dialogues = builtin_conversations(DialogueGenerator(settings.generator), perplexity)
    found, answers = [], []
    for done, one in enumerate((model, quantized)):
        if progress is not None:
            progress(done, 2, "int8" if done else "float32")
        found.append(_quality(one, dialogues, perplexity, settings))
        answers.append(_last_answers(one, dialogues, settings.max_answer_tokens))
    if progress is not None:
        progress(2, 2, "done")
    pairs = list(zip(*answers, strict=True))
    tokens = sum(max(len(a), len(b)) for a, b in pairs)
    agreeing = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return Int8Loss(
        before=found[0],
        after=found[1],
        agreeing_tokens=agreeing / tokens if tokens else 1.0,
        same_answers=sum(a == b for a, b in pairs) / len(pairs),
        tokens=tokens,
        answers=len(pairs),
        questions=settings.questions * len(settings.distances),
    )


def int8_table(loss: Int8Loss, bytes_before: int, bytes_after: int) -> Table:
    """Return the table that people read; the bytes are those of the weights' files."""
    before, after = loss.before, loss.after
    rows = (
        (
            "bytes of weights",
            f"{bytes_before:,}",
            f"{bytes_after:,}",
            f"{bytes_after / bytes_before:.2f} x",
        ),
        (
            "perplexity of answers",
            f"{before.perplexity:.4f}",
            f"{after.perplexity:.4f}",
            f"{after.perplexity / before.perplexity - 1:+.2%}",
        ),
        (
            f"recall, {loss.questions} questions",
            f"{before.recall:.1%}",
            f"{after.recall:.1%}",
            f"{100 * (after.recall - before.recall):+.1f} points",
        ),
        (f"same greedy token, of {loss.tokens:,}", "", f"{loss.agreeing_tokens:.1%}", ""),
        (f"same greedy answer, of {loss.answers}", "", f"{loss.same_answers:.1%}", ""),
    )
    return Table(
        "int8 beside float32",
        ("", "float32", "int8", "change"),
        rows,
        note="built-in test dialogues, memories written by each model itself",
    )


def _quality(
    model: ReactiveModel,
    dialogues: Sequence[Conversation],
    perplexity: PerplexitySettings,
    settings: Int8LossSettings,
) -> Quality:
    rows = evaluate_perplexity(model, dialogues, perplexity).rows
    loss = loss_of(rows, "memory")
    asked = RecallSettings(
        distances=settings.distances,
        facts=(2,),
        unseen=("pairs",),
        update_distances=(),
        unknown_distances=(),
        dialogues=settings.questions,
        seeds=(0,),
        conditions=("memory",),
        free_running=False,
        max_answer_tokens=settings.max_answer_tokens,
        generator=settings.generator,
    )
    recall = pool(evaluate_recall(model, asked).rows).mean
    return Quality(math.nan if loss is None else math.exp(loss), recall)


def _last_answers(
    model: ReactiveModel, dialogues: Sequence[Conversation], max_tokens: int
) -> list[list[int]]:
    """Return the ids of the model's answers to the last question of each dialogue."""
    turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
    with evaluation_mode(model), torch.no_grad():
        state = memory_of_references(model, turns, [item.interactions[:-1] for item in dialogues])
        queries = [item.interactions[-1].query for item in dialogues]
        return [item.ids for item in greedy_answers(model, state, queries, max_tokens)]
