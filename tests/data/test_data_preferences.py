"""Rejected answers: wrong ones that only a memory can tell, and those of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.data import Conversation, DialogueGenerator, Interaction
from rxlm.data.preferences import as_rejected, has_pairs, with_rejected
from rxlm.data.sources import load_conversations
from rxlm.errors import UserError

DIALOGUES = [with_rejected(DialogueGenerator().conversation(n, 12)) for n in range(60)]
ASKED = [
    turn for item in DIALOGUES for turn in item.interactions if turn.kind in ("question", "unknown")
]


def test_every_question_has_a_wrong_answer_and_nothing_else_has() -> None:
    """Catches a pair whose rejected answer is right, and pairs about small talk."""
    assert len(ASKED) > 200
    for item in DIALOGUES:
        for turn in item.interactions:
            is_asked = turn.kind in ("question", "unknown")
            assert (turn.rejected is not None) is is_asked
            assert turn.rejected != turn.answer


def test_all_kinds_of_mistakes_occur() -> None:
    """Catches pairs that teach one thing only, such as never to say that one does not know."""
    changed = [turn for turn in ASKED if turn.stale]
    stale = [turn for turn in changed if any(old in turn.rejected for old in turn.stale)]
    assert 0.3 < len(stale) / len(changed) < 0.9
    questions = [turn for turn in ASKED if turn.kind == "question"]
    refusals = [turn for turn in questions if "do not know" in turn.rejected]
    assert 0.05 < len(refusals) / len(questions) < 0.35
    unknown = [turn for turn in ASKED if turn.kind == "unknown"]
    assert unknown
    assert not any("do not know" in turn.rejected for turn in unknown)


def test_a_value_that_was_told_again_is_not_rejected() -> None:
    """Catches 'Rex' rejected after: Rex, then Max, then Rex again."""
    asked = Interaction(
        "what is the name of my dog?", "x Rex.", "question", "dog", "Rex", ("Rex", "Max", "Rex")
    )
    for n in range(50):
        (turn,) = with_rejected(Conversation((asked,), id=str(n))).interactions
        assert "Rex" not in str(turn.rejected)


def test_pairs_are_a_function_of_the_conversation() -> None:
    """Catches pairs that a resumed run draws anew."""
    again = [with_rejected(DialogueGenerator().conversation(n, 12)) for n in range(60)]
    assert again == DIALOGUES
    assert with_rejected(DIALOGUES[0]) == DIALOGUES[0]


def test_files_bring_their_own(tmp_path: Path) -> None:
    """Catches a field that is read and lost on the way, or lost when it is written again."""
    row = {
        "id": "1",
        "interactions": [
            {"query": "a", "answer": "b", "rejected": "c"},
            {"query": "d", "answer": "e"},
        ],
    }
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (conversation,) = load_conversations(file)
    assert [turn.rejected for turn in conversation.interactions] == ["c", None]
    assert Conversation.from_dict(conversation.to_dict()) == conversation
    assert has_pairs([conversation])
    worse = as_rejected(conversation)
    assert [(turn.query, turn.answer, turn.rejected) for turn in worse.interactions] == [
        ("a", "c", None)
    ]
    flat = {"query": "a", "answer": "b", "rejected": "c"}
    file.write_text(json.dumps(flat) + "\n", encoding="utf-8")
    assert load_conversations(file)[0].interactions[0].rejected == "c"


@pytest.mark.parametrize(
    ("rejected", "message"),
    [("b ", r"rejected': is the same text as 'answer'"), (3, r"rejected': expected text, got 3")],
)
def test_bad_pairs_are_named(tmp_path: Path, rejected: object, message: str) -> None:
    """Catches a pair of equal answers, whose loss nothing can lower."""
    row = {"interactions": [{"query": "a", "answer": "b", "rejected": rejected}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_conversations(tmp_path / "pairs.jsonl")
