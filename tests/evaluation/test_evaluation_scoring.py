"""Whether an answer is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Interaction
from rxlm.data.facts import FACT_KINDS
from rxlm.evaluation.scoring import contains_word, normalise, score_answer

ASKED = Interaction(
    "Where do I live?", "You live in Prague.", "question", "city", "Prague", stale=("Oslo", "Rome")
)


@pytest.mark.parametrize(
    "answer",
    [
        "You live in Prague.",
        "you live in prague",
        "  You  live\nin Prague !",
        "You live in Prague..",
    ],
)
def test_case_space_and_final_punctuation_do_not_matter(answer: str) -> None:
    """Catches an exact match that depends on how the text was decoded."""
    assert score_answer(answer, ASKED).exact


@pytest.mark.parametrize(
    "answer", ["You live in Oslo.", "You live in Prague now.", "Prague", "", "You, live in Prague"]
)
def test_other_words_are_not_exact(answer: str) -> None:
    """Catches a normalisation that drops more than it may."""
    assert not score_answer(answer, ASKED).exact


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing(text: str) -> None:
    """Catches punctuation that is uncovered by removing a space, and the like."""
    assert normalise(normalise(text)) == normalise(text)


def test_a_value_is_a_whole_word() -> None:
    """Catches 'Ann' found in 'Anna', and regular expressions made of a value."""
    assert contains_word("Your name is Ann.", "ann")
    assert not contains_word("Your name is Anna.", "Ann")
    assert not contains_word("Number 481 it is", "48")
    assert contains_word("Is it C++?", "C++")
    assert not contains_word("Is it C?", "C+")


@pytest.mark.parametrize(
    ("answer", "value", "stale", "declined"),
    [
        ("You live in Prague.", True, False, False),
        ("You live in Oslo.", False, True, False),
        ("You live in Rome!", False, True, False),
        ("First Oslo, then Prague.", True, False, False),
        ("You live in Paris.", False, False, False),
        ("I do not know where you live yet.", False, False, True),
    ],
)
def test_old_values_count_only_without_the_new_one(
    answer: str, value: bool, stale: bool, declined: bool
) -> None:
    """Catches a stale answer counted when old and new value are both named."""
    score = score_answer(answer, ASKED)
    assert (score.value, score.stale, score.declined) == (value, stale, declined)


def test_every_reference_is_scored_as_what_it_is() -> None:
    """Catches a decline or value rule that does not fit the built-in dialogues' wording."""
    for kind in FACT_KINDS:
        never = score_answer(kind.unknown, Interaction("?", kind.unknown, "unknown", kind.name))
        assert never.exact and never.declined and not never.value
        value = kind.values[0]
        answer = kind.answer.replace("{}", value)
        told = score_answer(answer, Interaction("?", answer, "question", kind.name, value))
        assert told.exact and told.value and not told.declined
