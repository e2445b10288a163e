"""The scripted conversation: its phrases, its restart, and the judgement on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rxlm.data import DialogueGenerator
from rxlm.data.facts import FACT_KINDS, KINDS_BY_NAME, SMALL_TALK
from rxlm.errors import UserError
from rxlm.evaluation.scoring import DECLINE
from rxlm.evaluation.transcript import ASK, MODEL, TELL, USER, Line, judge, run_script
from rxlm.rxt.models import RxTAlpha


def phrases(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (fact kind, 'tell' | 'update' | 'ask', value) of every phrase that ``text`` is."""
    for kind in FACT_KINDS:
        for form, templates in (
            ("tell", kind.statements[:-1]),
            ("update", kind.updates),
            ("ask", kind.questions[:-1]),
        ):
            for template in templates:
                for value in kind.values:
                    phrase = template.replace("{}", value)
                    if phrase[0].upper() + phrase[1:] == text:
                        yield kind.name, form, value


def test_the_script_speaks_the_language_of_the_training() -> None:
    """Catches a query that no nano model was trained to understand, and a wrong expectation."""
    facts: dict[str, str] = {}
    told_at: dict[str, int] = {}
    for turn, text in enumerate(TELL, start=1):
        found = next(phrases(text), None)
        if found is None:
            assert text in {query for query, _ in SMALL_TALK}
            continue
        kind, form, value = found
        assert form == ("update" if kind in facts else "tell")
        facts[kind] = value
        told_at[kind] = turn
    assert len(TELL) >= 9 and len(facts) <= 4
    for question in ASK:
        kind, form, _ = next(phrases(question.query))
        assert form == "ask"
        assert question.expected == facts.get(kind, DECLINE)
        if kind not in facts:
            assert KINDS_BY_NAME[kind].unknown.lower().startswith(DECLINE)
    first = next(phrases(ASK[0].query))[0]
    assert told_at[first] == 1, "the first question goes back to the first turn"


def test_the_name_was_never_told_in_training() -> None:
    """Catches a demonstration that recites the training data."""
    kind, _, value = next(phrases(TELL[0]))
    assert value in DialogueGenerator().held_out(kind)


def test_a_restart_changes_nothing(make_model: Callable[..., RxTAlpha], tmp_path: Path) -> None:
    """Catches anything remembered outside of the saved session."""
    queries = [item.query for item in ASK]
    model = make_model(seq_len=32)
    model.save_pretrained(tmp_path / "model")
    first = run_script(model, TELL, tmp_path / "session", resume=False)
    restarted = RxTAlpha.from_pretrained(tmp_path / "model")
    second = run_script(restarted, queries, tmp_path / "session", resume=True)
    whole = run_script(make_model(seq_len=32), [*TELL, *queries], tmp_path / "whole", resume=False)
    assert first + second == whole
    assert [line.turn for line in second[::2]] == [10, 11, 12, 13]
    assert [line.text for line in second[::2]] == queries
    assert {line.speaker for line in whole[1::2]} == {MODEL}


def test_a_new_run_starts_anew(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches a demonstration that goes on from an older one, and a missing session unnoticed."""
    once = run_script(model, TELL[:2], tmp_path / "session", resume=False)
    assert run_script(model, TELL[:2], tmp_path / "session", resume=False) == once
    with pytest.raises(UserError, match="does not exist"):
        run_script(model, TELL, tmp_path / "nowhere", resume=True)


def test_answers_are_judged_by_their_word() -> None:
    """Catches an answer matched with another question, and a missing one that counts."""
    lines = [
        Line(10, USER, "What is my name?"),
        Line(10, MODEL, "Your name is Maria."),
        Line(11, USER, "What is my dog called?"),
        Line(11, MODEL, "Your dog is called Maria."),
        Line(12, USER, "what is my job"),
        Line(12, MODEL, "I do not know your job yet."),
    ]
    assert judge(lines) == [True, False, False, True]
    assert judge([]) == [False] * 4
