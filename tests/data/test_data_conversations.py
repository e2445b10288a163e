"""Conversations as values: windows of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Conversation, Interaction


@given(num_turns=st.integers(1, 30), most=st.integers(1, 12))
def test_windows_cover_every_turn_once(num_turns: int, most: int) -> None:
    """Catches a dropped tail, overlaps, a lost system text, and two windows of one name."""
    turns = tuple(Interaction(str(number), "x") for number in range(num_turns))
    conversation = Conversation(turns, system="Be kind.", id="a")
    parts = [conversation.window(start, most) for start in range(0, num_turns, most)]
    assert tuple(turn for part in parts for turn in part.interactions) == turns
    assert all(len(part) == most for part in parts[:-1]) and 1 <= len(parts[-1]) <= most
    assert {part.system for part in parts} == {"Be kind."}
    assert len({part.id for part in parts}) == len(parts)


def test_a_window_of_everything_is_the_conversation() -> None:
    """Catches a copy under another name, which would be other training data for probes."""
    conversation = Conversation((Interaction("a", "b"),), id="a")
    assert conversation.window(0, 5) is conversation
