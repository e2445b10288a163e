"""Is an answer right? Rules on text only; they are the same for every model and every test."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from rxlm.data.conversations import Interaction

DECLINE = "i do not know"
"""How every normalised answer to a question that cannot be answered begins."""

_FINAL_PUNCTUATION = ".!?,;:"


class Score(NamedTuple):
    """What one answer is.

    ``exact``: the reference answer, up to :func:`normalise`; ``value``: the value asked for occurs
    in it as a word; ``stale``: it holds a value that was replaced, and not the present one;
    ``declined``: it says that the fact is not known.
    """

    exact: bool
    value: bool
    stale: bool
    declined: bool


def normalise(text: str) -> str:
    """Return ``text`` in lower case, white space collapsed, without final punctuation."""
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(text.split()).rstrip(_FINAL_PUNCTUATION + " ")


def contains_word(text: str, word: str) -> bool:
    """Return whether ``word`` (perhaps several words) occurs in ``text`` as a whole."""
    pattern = rf"(?<!\w){re.escape(normalise(word))}(?!\w)"
    return re.search(pattern, normalise(text)) is not None


def score_answer(answer: str, asked: Interaction) -> Score:
    """Judge ``answer`` to the question ``asked``, which holds reference and old values."""
    has_value = asked.value is not None and contains_word(answer, asked.value)
    has_old = any(contains_word(answer, old) for old in asked.stale)
    return Score(
        exact=normalise(answer) == normalise(asked.answer),
        value=has_value,
        stale=has_old and not has_value,
        declined=normalise(answer).startswith(DECLINE),
    )
