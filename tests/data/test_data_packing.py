"""Packing and windows: nothing dropped, nothing invented, segments apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Conversation, Interaction, pack_documents, windows
from rxlm.errors import UserError

BOS, EOS = 1, 2


@given(
    documents=st.lists(st.lists(st.integers(10, 99), max_size=20), max_size=12),
    length=st.integers(2, 16),
    marks=st.sampled_from([(BOS, EOS), (None, EOS), (None, None)]),
)
def test_rows_hold_the_stream_exactly_once(
    documents: list[list[int]], length: int, marks: tuple[int | None, int | None]
) -> None:
    """Catches tokens lost at the cut, rows not filled, documents that see each other."""
    bos, eos = marks
    rows = pack_documents(documents, length, bos, eos)
    stream = [
        (number, token)
        for number, document in enumerate(filter(None, documents))
        for token in [bos, *document, eos]
        if token is not None
    ]
    assert [token for row in rows for token in row.ids] == [token for _, token in stream]
    assert all(len(row.ids) == length for row in rows[:-1])
    place = 0
    for row in rows:
        assert len(row.ids) == len(row.segment_ids) == len(row.positions) <= length
        owners = [number for number, _ in stream[place : place + len(row.ids)]]
        assert row.segment_ids == [owner - owners[0] for owner in owners]
        starts = [owners.index(owner) for owner in owners]
        assert row.positions == [index - start for index, start in enumerate(starts)]
        place += len(row.ids)


def test_too_short_rows_are_refused() -> None:
    """Catches an endless loop or rows without a target."""
    with pytest.raises(UserError, match="length=1"):
        pack_documents([[1]], 1, None, None)


@given(num_turns=st.integers(1, 30), most=st.integers(1, 12))
def test_windows_cover_every_turn_once(num_turns: int, most: int) -> None:
    """Catches a dropped tail, overlaps, and padding turns."""
    turns = tuple(Interaction(str(number), "x") for number in range(num_turns))
    conversation = Conversation(turns, system="Be kind.", id="a")
    parts = windows(conversation, most)
    assert tuple(turn for part in parts for turn in part.interactions) == turns
    assert all(len(part) == most for part in parts[:-1]) and 1 <= len(parts[-1]) <= most
    assert {part.system for part in parts} == {"Be kind."}
    assert len({part.id for part in parts}) == len(parts)


def test_windows_of_no_turns_are_refused() -> None:
    """Catches a range with step 0 reaching the user as a bare ValueError."""
    with pytest.raises(UserError, match="num_turns=0"):
        windows(Conversation((Interaction("a", "b"),)), 0)
