"""Conversations as tensors: what a batch of dialogues must encode, remember and answer.

Every turn of every dialogue is one row. Rows of similar length share a bucket, so little is spent
on padding; which bucket a row falls into never changes a result.

Shapes: B dialogues, N turns of the longest, R rows of a bucket, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.length_buckets import length_buckets
from rxlm.errors import UserError
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn, encode_system, render_parts


class Rows(NamedTuple):
    """Right-padded rows of one bucket.

    ``ids`` int64 ``[R, T]``; ``mask`` bool ``[R, T]``; ``place`` int64 ``[R]``: in the encoding
    buckets the flat turn ``n * B + b``, in the answering buckets the flat memory ``m * B + b``
    that the row reads (m turns have been written); ``targets`` bool ``[R, T]``: tokens to learn;
    ``group`` int64 ``[R]``: index into :data:`GROUPS`, what kind of turn the row is.
    """

    ids: Tensor
    mask: Tensor
    place: Tensor
    targets: Tensor
    group: Tensor


class DialogueBatch(NamedTuple):
    """A batch of dialogues, ragged in turns and tokens.

    ``encode``: the turns to write into memory; ``answer``: the turns (and extra questions) whose
    answers are predicted; ``num_dialogues`` B; ``num_turns`` N; ``num_tokens``: real tokens;
    ``memory_seed``: where the memory is drawn, dialogue b starts from that of ``memory_seed + b``.
    """

    encode: tuple[Rows, ...]
    answer: tuple[Rows, ...]
    num_dialogues: int
    num_turns: int
    num_tokens: int
    memory_seed: int = 0


class Row(NamedTuple):
    """One row before batching: see :class:`Rows` for ``place`` and ``group``."""

    turn: EncodedTurn
    place: int
    group: int


#: Kinds of answers that are measured apart.
GROUPS = ("chat", "recall", "unknown", "probe")

_GROUP_OF_KIND = {"question": "recall", "unknown": "unknown"}


def group_of(interaction: Interaction) -> int:
    """Return the index into :data:`GROUPS` of a turn."""
    return GROUPS.index(_GROUP_OF_KIND.get(interaction.kind, "chat"))


def bucketed(rows: Sequence[Row], num_buckets: int, pad_id: int) -> tuple[Rows, ...]:
    """Sort rows by length and pad them to the longest of their bucket.

    Args:
        rows: any number of rows, also none.
        num_buckets: into how many buckets to cut at most.
        pad_id: filler; never read.
    """
    buckets = length_buckets(rows, num_buckets, lambda row: len(row.turn.ids))
    return tuple(_pad(bucket, pad_id) for bucket in buckets)


def _pad(rows: Sequence[Row], pad_id: int) -> Rows:
    length = len(rows[-1].turn.ids)
    ids = torch.tensor([row.turn.ids + [pad_id] * (length - len(row.turn.ids)) for row in rows])
    lengths = torch.tensor([len(row.turn.ids) for row in rows])
    starts = torch.tensor([row.turn.answer_start for row in rows])
    positions = torch.arange(length)
    mask = positions < lengths[:, None]
    return Rows(
        ids=ids,
        mask=mask,
        place=torch.tensor([row.place for row in rows]),
        targets=mask & (positions >= starts[:, None]),
        group=torch.tensor([row.group for row in rows]),
    )


class TurnEncoder:
    """Turns text into token rows, once per distinct turn, and refuses turns that do not fit."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, cache_size: int = 50_000) -> None:
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self._cache: dict[tuple[tuple[str, str], ...], EncodedTurn] = {}
        self._cache_size = cache_size

    def interaction(self, query: str, answer: str) -> EncodedTurn:
        """Encode one turn of query and answer; see :meth:`encode`."""
        return self.encode(Interaction(query, answer))

    def encode(self, interaction: Interaction) -> EncodedTurn:
        """Encode one turn with all its parts, as the tokenizer's template has them.

        Raises:
            UserError: if it is longer than ``seq_len`` tokens, or has parts that the template has
                not.
        """
        parts = interaction.parts()
        key = tuple(parts.items())
        turn = self._cache.get(key)
        if turn is None:
            turn = render_parts(self.tokenizer, parts).turn
            if len(turn.ids) > self.seq_len:
                raise UserError(
                    f"a turn has {len(turn.ids)} tokens but seq_len={self.seq_len}: raise the "
                    f"model's seq_len, or shorten the turn. It begins: "
                    f"{(interaction.query or interaction.tool_use or '')[:80]!r}"
                )
            if len(self._cache) < self._cache_size:
                self._cache[key] = turn
        return turn

    def check_lengths(self, conversations: Sequence[Conversation], name: str) -> None:
        """Refuse conversations with turns that do not fit, before anything is trained on them.

        A turn must fit the template as well as ``seq_len``.

        Args:
            conversations: all that will be used.
            name: what the message calls them.

        Raises:
            UserError: with how many do not fit, the longest, and what to change; or for parts of a
                turn that the tokenizer's template has not.
        """
        longest, too_long, where, total = 0, 0, "", 0
        for conversation in conversations:
            total += len(conversation)
            for number, item in enumerate(conversation.interactions, start=1):
                parts, place = item.parts(), f"turn {number} of conversation '{conversation.id}'"
                try:
                    self.tokenizer.template.sections(parts)
                except UserError as error:
                    raise UserError(f"{name}: {place}: {error}") from error
                # A token covers at least one byte, so short turns need no tokenizer.
                num_bytes = sum(len(text.encode()) for text in parts.values())
                if num_bytes + 2 * len(parts) + 4 <= self.seq_len:
                    continue
                length = len(render_parts(self.tokenizer, parts).ids)
                too_long += length > self.seq_len
                if length > longest:
                    longest, where = length, place
        if too_long:
            raise UserError(
                f"{name}: {too_long} of {total} turns have more than seq_len={self.seq_len} "
                f"tokens; the longest has {longest} ({where}). Set model.decoder.seq_len to at "
                f"least {longest}, or leave such conversations out."
            )

    def system(self, text: str) -> EncodedTurn:
        """Encode a system prompt, written to memory before the first turn; nothing is a target."""
        ids = encode_system(self.tokenizer, text)
        if len(ids) > self.seq_len:
            raise UserError(
                f"the system prompt has {len(ids)} tokens but seq_len={self.seq_len}: shorten it "
                "or raise the models' seq_len."
            )
        return EncodedTurn(ids, len(ids))


def dialogue_batch(
    encode: Sequence[Row],
    answer: Sequence[Row],
    *,
    num_dialogues: int,
    num_turns: int,
    num_buckets: int,
    pad_id: int,
) -> DialogueBatch:
    """Assemble a batch from rows that were chosen elsewhere."""
    tokens = sum(len(row.turn.ids) for row in (*encode, *answer))
    return DialogueBatch(
        encode=bucketed(encode, num_buckets, pad_id),
        answer=bucketed(answer, num_buckets, pad_id),
        num_dialogues=num_dialogues,
        num_turns=num_turns,
        num_tokens=tokens,
    )


def select_dialogues(batch: DialogueBatch, first: int, count: int) -> DialogueBatch:
    """Return a batch of ``count`` dialogues of ``batch`` from number ``first`` on, unchanged.

    Every dialogue reads and writes what it did, and starts from the memory that it did.
    """
    encode, answer = (
        tuple(part for part in (_of(rows, batch, first, count) for rows in bucket) if len(part.ids))
        for bucket in (batch.encode, batch.answer)
    )
    return DialogueBatch(
        encode=encode,
        answer=answer,
        num_dialogues=count,
        num_turns=max(int(rows.place.max()) for rows in encode) // count + 1,
        num_tokens=sum(int(rows.mask.sum()) for rows in (*encode, *answer)),
        memory_seed=batch.memory_seed + first,
    )


def rows_of_dialogues(rows: Rows, batch: DialogueBatch, first: int, count: int) -> Tensor:
    """Return bool ``[R]``: which rows of a bucket :func:`select_dialogues` keeps."""
    dialogue = rows.place % batch.num_dialogues
    return (dialogue >= first) & (dialogue < first + count)


def _of(rows: Rows, batch: DialogueBatch, first: int, count: int) -> Rows:
    kept = Rows(*(part[rows_of_dialogues(rows, batch, first, count)] for part in rows))
    turn, dialogue = kept.place // batch.num_dialogues, kept.place % batch.num_dialogues
    return kept._replace(place=turn * count + dialogue - first)


def whole_dialogues(
    conversations: Sequence[Conversation], encoder: TurnEncoder, *, num_buckets: int = 3
) -> DialogueBatch:
    """Batch whole dialogues: every turn is written, every answer is predicted.

    A system prompt counts as turn 0: it is written but not answered. Dialogues may have different
    numbers of turns; missing turns are simply absent.
    """
    encode: list[Row] = []
    answer: list[Row] = []
    count, longest = len(conversations), 0
    for b, conversation in enumerate(conversations):
        offset = 0
        if conversation.system:
            encode.append(Row(encoder.system(conversation.system), b, 0))
            offset = 1
        for n, interaction in enumerate(conversation.interactions, start=offset):
            turn = encoder.encode(interaction)
            row = Row(turn, n * count + b, group_of(interaction))
            encode.append(row)
            answer.append(row)
        longest = max(longest, offset + len(conversation.interactions))
    return dialogue_batch(
        encode,
        answer,
        num_dialogues=count,
        num_turns=longest,
        num_buckets=num_buckets,
        pad_id=encoder.tokenizer.pad_id,
    )
