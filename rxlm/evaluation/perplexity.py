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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation
from rxlm.data.generator import DialogueGenerator
from rxlm.errors import RunError, UserError
from rxlm.evaluation.answering import NUM_BUCKETS, move_batch
from rxlm.evaluation.carry_over import carry_over_flags
from rxlm.evaluation.conditions import Condition, memory_to_read
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.rows import ALL_TURNS, PerplexityRow
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.rxt.dialogues import DialogueBatch, Row, Rows, TurnEncoder, dialogue_batch
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import (
    answer_rows,
    decode_turns,
    encode_turns,
    memory_reader,
    scan_memory,
)
from rxlm.tokenization.template import encode_system, render_parts

logger = logging.getLogger(__name__)

MAX_EXPONENT = 700.0
"""exp() of more is no number; a loss like that is reported as it is."""

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


class _Sums:
    """Losses and numbers of tokens by token set, condition and turn, in double precision."""

    def __init__(self, settings: PerplexitySettings) -> None:
        self._totals: dict[tuple[str, str], Tensor] = {
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
                    if not math.isfinite(mean):
                        raise RunError(
                            "the loss is not a finite number: the model's weights are damaged or "
                            "its training diverged; evaluate an earlier checkpoint."
                        )
                    found.append(
                        PerplexityRow(
                            test="perplexity",
                            tokens=tokens,
                            turn=turn,
                            condition=condition,
                            n=int(count),
                            loss=mean,
                            perplexity=math.exp(min(mean, MAX_EXPONENT)),
                        )
                    )
        return found


class _Plan(NamedTuple):
    """A batch and where its answers belong.

    ``batch``: the B conversations, and after them the one whose memory the last of them borrows;
    ``turn``: the number of the turn, from 1, that reads flat memory ``m * B + b``, by that index;
    ``carried``: the carry-over flags of its tokens after [A], likewise.
    """

    batch: DialogueBatch
    turn: dict[int, int]
    carried: dict[int, list[bool]]


def _choose(
    conversations: Sequence[Conversation], turns: TurnEncoder, settings: PerplexitySettings
) -> tuple[list[Conversation], int]:
    """Return the conversations to read, cut to ``max_turns``, and how many were left out."""
    chosen: list[Conversation] = []
    num_skipped = 0
    for number, conversation in enumerate(conversations, start=1):
        if len(chosen) == settings.max_dialogues:
            break
        conversation = conversation.window(0, settings.max_turns)
        longest = _longest_turn(conversation, turns)
        if longest <= turns.seq_len:
            chosen.append(conversation)
        elif settings.too_long == "skip":
            num_skipped += 1
        else:
            raise UserError(
                f"conversation {number} ({conversation.id or 'without id'}) has a turn of "
                f"{longest} tokens but the model's seq_len is {turns.seq_len}: shorten it, or "
                "leave such conversations out with too_long='skip'."
            )
    if num_skipped:
        logger.warning("%d conversations are left out: a turn is too long", num_skipped)
    if len(chosen) < 2:
        raise UserError(
            f"{len(chosen)} conversations can be used ({num_skipped} hold a turn that is too "
            "long); expected at least two, because one gets the memory of the other."
        )
    return chosen, num_skipped


def _longest_turn(conversation: Conversation, turns: TurnEncoder) -> int:
    tokenizer = turns.tokenizer
    lengths = [len(render_parts(tokenizer, turn.parts()).ids) for turn in conversation.interactions]
    if conversation.system:
        lengths.append(len(encode_system(tokenizer, conversation.system)))
    return max(lengths, default=0)


def _measure(
    model: ReactiveModel,
    turns: TurnEncoder,
    conversations: Sequence[Conversation],
    start: int,
    settings: PerplexitySettings,
    sums: _Sums,
) -> None:
    """Add the losses of the ``batch_size`` conversations from ``start`` on."""
    for condition, losses, rows, plan in _batch_losses(
        model, turns, conversations, start, settings
    ):
        turn, carried = _belonging(plan, rows)
        sums.add(condition, losses, turn, carried)


def token_losses(
    model: ReactiveModel,
    conversations: Sequence[Conversation],
    conditions: Sequence[Condition],
    batch_size: int = 32,
) -> dict[Condition, list[list[list[float]]]]:
    """Return the loss of every token of every answer, in nats.

    Args:
        model: with its tokenizer.
        conversations: at least two; each borrows the memory of the next.
        conditions: what the decoder reads.
        batch_size: conversations computed at once; changes no result.

    Returns:
        by condition, conversation, turn and token: all tokens after [A], [EOS] included.

    Raises:
        UserError: if a turn is longer than the model's ``seq_len``.
    """
    settings = PerplexitySettings(batch_size=batch_size, conditions=tuple(conditions))
    turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
    found: dict[Condition, list[list[list[float]]]] = {
        condition: [[[] for _ in item.interactions] for item in conversations]
        for condition in conditions
    }
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(conversations), batch_size):
            for condition, losses, rows, plan in _batch_losses(
                model, turns, conversations, start, settings
            ):
                count = plan.batch.num_dialogues - 1
                places = rows.place.tolist()
                sizes = [len(plan.carried[place]) for place in places]
                for place, part in zip(places, losses.split(sizes), strict=True):
                    dialogue, turn = start + place % count, plan.turn[place] - 1
                    found[condition][dialogue][turn] = part.tolist()
    return found


def _batch_losses(
    model: ReactiveModel,
    turns: TurnEncoder,
    conversations: Sequence[Conversation],
    start: int,
    settings: PerplexitySettings,
) -> Iterator[tuple[Condition, Tensor, Rows, _Plan]]:
    """Yield condition, losses of the tokens that count ``[M]``, the rows that they are of, plan."""
    part = conversations[start : start + settings.batch_size]
    # The last of the batch borrows the memory of the first of the next one, so that the batch
    # size does not change who borrows from whom.
    borrowed = (start + len(part)) % len(conversations)
    plan = _plan(turns, part, conversations[borrowed])
    batch = move_batch(plan.batch, model.device)
    initial = torch.cat(
        (model.initial_memory(len(part), seed=start), model.initial_memory(1, seed=borrowed)), dim=1
    )
    encoded = encode_turns(model.encoder, batch)
    memories = scan_memory(model.memory_attention, initial, encoded, batch.num_turns)
    memories = memories.unflatten(1, (batch.num_turns + 1, batch.num_dialogues))
    own, other = memories[:, :, :-1], memories[:, :, 1:]
    history = _carried_history(model, batch, memories.flatten(1, 2))
    for condition in settings.conditions:
        read = memory_to_read(condition, own, other, initial[:, None, :-1]).flatten(1, 2)
        for rows in batch.answer:
            carried_in = _carried_to_read(condition, history, batch, rows)
            losses, kept = _token_losses(model, rows, read, carried_in)
            yield condition, losses[kept].cpu(), rows, plan


def _carried_history(
    model: ReactiveModel, batch: DialogueBatch, memories: Tensor
) -> CarriedState | None:
    """Return what the decoder carries before every turn and after the last; None if nothing."""
    if not model.decoder.carries_state:
        return None
    return decode_turns(model.decoder, batch, memory_reader(memories)).carried


def _carried_to_read(
    condition: Condition, history: CarriedState | None, batch: DialogueBatch, rows: Rows
) -> CarriedState | None:
    """Return what each row starts from: its own, its neighbour's, or nothing."""
    if history is None or condition not in ("memory", "swapped"):
        return None
    count = batch.num_dialogues - 1  # The last one only lends its memory.
    turn, dialogue = rows.place // count, rows.place % count
    return history.select(turn * (count + 1) + dialogue + (condition == "swapped"))


def _plan(turns: TurnEncoder, part: Sequence[Conversation], borrowed: Conversation) -> _Plan:
    """Lay out a batch: write every turn of all conversations, answer those of ``part``."""
    encode: list[Row] = []
    answer: list[Row] = []
    turn_numbers: dict[int, int] = {}
    carried: dict[int, list[bool]] = {}
    count = len(part)
    num_turns = 0
    for b, conversation in enumerate([*part, borrowed]):
        offset = 0
        if conversation.system:
            encode.append(Row(turns.system(conversation.system), b, 0))
            offset = 1
        for n, item in enumerate(conversation.interactions, start=offset):
            row = Row(turns.encode(item), n * (count + 1) + b, 0)
            encode.append(row)
            if b < count:
                answer.append(row._replace(place=n * count + b))
                turn_numbers[n * count + b] = n - offset + 1
        num_turns = max(num_turns, offset + len(conversation.interactions))
        if b < count:
            flags = carry_over_flags(
                turns.tokenizer, conversation.interactions, conversation.system
            )
            for n, turn_flags in enumerate(flags, start=offset):
                carried[n * count + b] = [*turn_flags, False]  # [EOS] is no word
    batch = dialogue_batch(
        encode,
        answer,
        num_dialogues=count + 1,
        num_turns=num_turns,
        num_buckets=NUM_BUCKETS,
        pad_id=turns.tokenizer.pad_id,
    )
    return _Plan(batch, turn_numbers, carried)


def _token_losses(
    model: ReactiveModel, rows: Rows, read: Tensor, carried: CarriedState | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every target ``[M]`` and whether it counts (all but what opens a part)."""
    answers = answer_rows(model.decoder, rows, read[:, rows.place], carried=carried)
    losses = torch.nn.functional.cross_entropy(
        answers.logits.float(), answers.labels, reduction="none"
    )
    # A text never holds these ids, so a target that is [A] is the one that opens the answer.
    ids = model.config.tokenizer
    openings = (ids.answer_token_id, ids.think_token_id, ids.tool_call_token_id)
    opens = torch.zeros_like(answers.labels, dtype=torch.bool)
    for token_id in openings:
        if token_id is not None:
            opens |= answers.labels == token_id
    return losses, ~opens


def _belonging(plan: _Plan, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return turn number and carry-over flag of every token that counts, in order."""
    turn: list[int] = []
    carried: list[bool] = []
    for place in rows.place.tolist():
        flags = plan.carried[place]
        carried += flags
        turn += [plan.turn[place]] * len(flags)
    return torch.tensor(turn), torch.tensor(carried)
