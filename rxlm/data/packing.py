"""Cuts data to the lengths that training wants: documents to rows, conversations to windows.

Nothing is dropped and nothing is padded here; padding is the batch's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from rxlm.data.conversations import Conversation
from rxlm.errors import UserError


class PackedRow(NamedTuple):
    """Tokens of one or more documents that share a row and must not see each other."""

    ids: list[int]
    segment_ids: list[int]
    """Which document of the row a token belongs to: 0, 1, ..."""
    positions: list[int]
    """Position within the segment; 0 where a segment begins."""


def pack_documents(
    token_lists: Iterable[Sequence[int]], length: int, bos: int | None, eos: int | None
) -> list[PackedRow]:
    """Lay documents end to end and cut the stream into rows.

    A document that crosses the end of a row goes on in the next one as a segment of its own.

    Args:
        token_lists: the documents' ids, without bos and eos. Empty ones are left out.
        length: tokens in a row, >= 2; the last row may be shorter.
        bos: put before each document, if not ``None``.
        eos: put after each document, if not ``None``.

    Returns:
        Rows whose ``ids``, one after the other, are the stream.
    """
    if length < 2:
        raise UserError(f"length={length}: expected at least 2 tokens in a row.")
    rows: list[PackedRow] = []
    for tokens in token_lists:
        if not len(tokens):
            continue
        document = [*([] if bos is None else [bos]), *tokens, *([] if eos is None else [eos])]
        start = 0
        while start < len(document):
            if not rows or len(rows[-1].ids) == length:
                rows.append(PackedRow([], [], []))
            row = rows[-1]
            piece = document[start : start + length - len(row.ids)]
            segment = row.segment_ids[-1] + 1 if row.segment_ids else 0
            row.ids.extend(piece)
            row.segment_ids.extend([segment] * len(piece))
            row.positions.extend(range(len(piece)))
            start += len(piece)
    return rows


def window(conversation: Conversation, start: int, num_turns: int) -> Conversation:
    """Return turns ``start`` to ``start + num_turns`` as a conversation (the system text kept)."""
    end = min(start + num_turns, len(conversation))
    if start == 0 and end == len(conversation):
        return conversation
    return replace(
        conversation,
        interactions=conversation.interactions[start:end],
        id=f"{conversation.id}[{start}:{end}]",
    )


def windows(conversation: Conversation, num_turns: int) -> list[Conversation]:
    """Split a conversation into consecutive windows of at most ``num_turns`` turns.

    Every turn is in exactly one window; the last window may be shorter.
    """
    if num_turns < 1:
        raise UserError(f"num_turns={num_turns}: expected at least 1.")
    starts = range(0, len(conversation), num_turns)
    return [window(conversation, start, num_turns) for start in starts]
