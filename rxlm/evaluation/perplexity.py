"""Answer perplexity over whole conversations, with memory and without.

The reference answers are read token by token under every condition, the same tokens each time. A
token of an answer is every token after [A], [EOS] included; [A] itself always follows a query and
would only flatter. Reported over all turns, by turn, and on carry-over words (``carry_over``),
where a memory matters most.

Shapes: L layers, B conversations, N turns, S slots, D width, R rows of a bucket, M tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation
from rxlm.data.generator import DialogueGenerator
from rxlm.data.packing import window
from rxlm.errors import UserError
from rxlm.evaluation.answering import NUM_BUCKETS, move_batch
from rxlm.evaluation.carry_over import carry_over_flags
from rxlm.evaluation.conditions import Condition, memory_to_read
from rxlm.evaluation.recall import Progress
from rxlm.rxt.dialogues import DialogueBatch, Row, Rows, TurnEncoder, dialogue_batch
from rxlm.rxt.generation import evaluation_mode, turn_limit
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import answer_rows, encode_turns, scan_memory

logger = logging.getLogger(__name__)

ALL_TURNS = 0
"""The ``turn`` of figures over all turns; the turns themselves are numbered from 1."""

TokenSet = Literal["answer", "carry-over"]
TOKEN_SETS: tuple[TokenSet, ...] = ("answer", "carry-over")


class PerplexitySettings(Config):
    """How much to read, and under which conditions."""

    max_dialogues: PositiveInt = 200
    """At most so many conversations, the first ones."""
    max_turns: PositiveInt = 12
    """At most so many turns of each, the first ones."""
    batch_size: PositiveInt = 32
    """Conversations computed at once; changes no result."""
    conditions: tuple[Condition, ...] = ("memory", "zeroed", "reset", "swapped")
    """What the decoder reads: see ``conditions``."""
    too_long: Literal["error", "skip"] = "error"
    """What to do with conversations that hold a turn longer than the model's ``seq_len``: stop,
    or leave them out and count them."""

    @field_validator("conditions")
    @classmethod
    def _not_empty(cls, value: tuple[Condition, ...]) -> tuple[Condition, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"conditions={list(value)}: give at least one, each once")
        return value


class PerplexityRow(TypedDict):
    """One figure: ``turn`` 0 = all turns; ``n`` tokens; ``loss`` in nats a token."""

    test: str
    tokens: str
    turn: int
    condition: str
    n: int
    loss: float
    perplexity: float


@dataclass(frozen=True)
class PerplexityResult:
    """Everything that a run found, as plain data."""

    settings: PerplexitySettings
    source: str
    rows: list[PerplexityRow]
    num_dialogues: int
    num_skipped: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "source": self.source,
            "rows": list(self.rows),
            "num_dialogues": self.num_dialogues,
            "num_skipped": self.num_skipped,
            "seconds": self.seconds,
        }


def evaluate_perplexity(
    model: ReactiveModel,
    conversations: Sequence[Conversation],
    settings: PerplexitySettings | None = None,
    *,
    source: str = "",
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure the perplexity of the answers in ``conversations``.

    Args:
        model: with its tokenizer.
        conversations: at least two, because one gets the memory of the other.
        settings: default: 200 conversations of 12 turns.
        source: what a report calls the conversations.
        progress: told before every batch and at the end.

    Raises:
        UserError: if fewer than two conversations can be used, or a turn is longer than the
            model's ``seq_len`` (unless ``too_long='skip'``).
    """
    settings = settings or PerplexitySettings()
    turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
    chosen, num_skipped = _choose(conversations, turns, settings)
    sums = _Sums(settings)
    begin = time.perf_counter()
    starts = range(0, len(chosen), settings.batch_size)
    with evaluation_mode(model), torch.no_grad():
        for done, start in enumerate(starts):
            if progress is not None:
                progress(done, len(starts), f"conversation {start + 1} of {len(chosen)}")
            _measure(model, turns, chosen, start, settings, sums)
    if progress is not None:
        progress(len(starts), len(starts), "done")
    seconds = time.perf_counter() - begin
    return PerplexityResult(settings, source, sums.rows(), len(chosen), num_skipped, seconds)


def builtin_conversations(
    generator: DialogueGenerator, settings: PerplexitySettings
) -> list[Conversation]:
    """Return the test dialogues that ``settings`` ask for, from the built-in generator."""
    return [
        generator.conversation(number, settings.max_turns, "test")
        for number in range(settings.max_dialogues)
    ]


def loss_of(
    rows: Sequence[PerplexityRow], condition: str, tokens: str = "answer", turn: int = ALL_TURNS
) -> float | None:
    """Return one loss in nats a token; None if it was not measured."""
    for row in rows:
        if (row["condition"], row["tokens"], row["turn"]) == (condition, tokens, turn):
            return row["loss"]
    return None


class _Sums:
    """Losses and numbers of tokens by token set, condition and turn, in double precision."""

    def __init__(self, settings: PerplexitySettings) -> None:
        self._totals = {
            (tokens, condition): torch.zeros(2, settings.max_turns + 1, dtype=torch.float64)
            for tokens in TOKEN_SETS
            for condition in settings.conditions
        }

    def add(self, condition: str, losses: Tensor, turn: Tensor, carried: Tensor) -> None:
        """Add tokens: ``losses`` [M], their ``turn`` (from 1) [M], whether they are carry-over."""
        for tokens, chosen in (("answer", torch.ones_like(carried)), ("carry-over", carried)):
            total = self._totals[tokens, condition]
            values = losses[chosen].double()
            total.index_add_(1, turn[chosen], torch.stack((values, torch.ones_like(values))))

    def rows(self) -> list[PerplexityRow]:
        """Return a row for every sum that has tokens."""
        found = []
        for (tokens, condition), total in self._totals.items():
            # No token has turn 0, so its column is free for the sum of the others.
            total[:, ALL_TURNS] = total[:, 1:].sum(dim=1)
            for turn, (loss, count) in enumerate(total.T.tolist()):
                if count:
                    mean = loss / count
                    perplexity = math.exp(mean)
                    found.append(
                        PerplexityRow(
                            test="perplexity",
                            tokens=tokens,
                            turn=turn,
                            condition=condition,
                            n=int(count),
                            loss=mean,
                            perplexity=perplexity,
                        )
                    )
        return found


class _Plan(NamedTuple):
    """A batch and where its answers belong.

    ``batch``: the B conversations, and after them the one whose memory the last of them borrows;
    ``turn`` ``[(N + 1) * B]``: the turn number of the answer that reads flat memory ``m * B + b``;
    ``carried``: for each of those, the carry-over flags of its tokens after [A].
    """

    batch: DialogueBatch
    turn: Tensor
    carried: dict[int, list[bool]]


def _choose(
    conversations: Sequence[Conversation], turns: TurnEncoder, settings: PerplexitySettings
) -> tuple[list[Conversation], int]:
    """Return the conversations to read, cut to ``max_turns``, and how many were left out."""
    chosen: list[Conversation] = []
    num_skipped = 0
    for conversation in conversations:
        if len(chosen) == settings.max_dialogues:
            break
        if len(conversation) > settings.max_turns:
            conversation = window(conversation, 0, settings.max_turns)
        try:
            _encode(conversation, turns)
        except UserError as error:
            if settings.too_long == "error":
                raise UserError(
                    f"conversation {conversation.id or len(chosen) + num_skipped + 1}: {error} Or "
                    "leave such conversations out with too_long='skip'."
                ) from error
            num_skipped += 1
            continue
        chosen.append(conversation)
    if num_skipped:
        logger.warning("%d conversations are left out: a turn is too long", num_skipped)
    if len(chosen) < 2:
        raise UserError(
            f"{len(chosen)} conversations can be used ({num_skipped} hold a turn that is too "
            "long); expected at least two, because one gets the memory of the other."
        )
    return chosen, num_skipped
