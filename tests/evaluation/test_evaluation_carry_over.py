"""Which tokens are carry-over words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Interaction
from rxlm.evaluation.carry_over import carry_over_flags, tokens_of_words, words
from rxlm.tokenization import Tokenizer


def flagged(tokenizer: Tokenizer, text: str, flags: list[bool]) -> str:
    """Return the text of the flagged tokens, without spaces (which may be tokens or parts)."""
    ids = tokenizer.encode(text)
    chosen = [token for token, flag in zip(ids, flags, strict=True) if flag]
    return "".join(b"".join(map(tokenizer.token_bytes, chosen)).decode().split())


def test_words_of_earlier_turns_but_not_of_the_query(tokenizer: Tokenizer) -> None:
    """Catches words of the query, of the present answer, or of later turns taken as carried."""
    turns = [
        Interaction("My name is Zbigniew.", "Nice to meet you, Zbigniew."),
        Interaction("Hello!", "Hello, Zbigniew, my friend of Oslo."),
        Interaction("What is my name? Oslo?", "Your name is ZBIGNIEW, my friend; Prague is not."),
    ]
    first, second, third = carry_over_flags(tokenizer, turns)
    assert not any(first)
    assert flagged(tokenizer, turns[1].answer, second) == "Zbigniewmy"
    # 'is', 'name', 'my' and 'Oslo' are in the query, 'Your', 'Prague' and 'not' are new.
    assert flagged(tokenizer, turns[2].answer, third) == "ZBIGNIEWfriend"


def test_the_system_text_is_said_earlier(tokenizer: Tokenizer) -> None:
    """Catches a system prompt that is not counted."""
    turns = [Interaction("Who are you?", "I am Pixie.")]
    flags = carry_over_flags(tokenizer, turns, system="You play Pixie.")[0]
    assert flagged(tokenizer, turns[0].answer, flags) == "Pixie"
    assert not any(carry_over_flags(tokenizer, turns)[0])


def test_a_word_inside_another_is_none(tokenizer: Tokenizer) -> None:
    """Catches 'Ann' flagged within 'Anna', and words that span several tokens cut short."""
    text = "Anna, Ann; ann-Annäpfel é Ann's"
    assert words(text) == {"anna", "ann", "annäpfel", "é", "ann's"}
    flags = tokens_of_words(tokenizer, tokenizer.encode(text), {"ann"})
    assert flagged(tokenizer, text, flags) == "Annann"


@given(st.lists(st.sampled_from(["Oslo", "Łódź", "漢字", "a-b", "!", "x"]), max_size=6))
def test_flags_cover_whole_words_of_any_script(tokenizer: Tokenizer, parts: list[str]) -> None:
    """Catches offsets counted in characters where tokens are bytes."""
    text = " ".join(parts)
    for word in words(text):
        flags = tokens_of_words(tokenizer, tokenizer.encode(text), {word})
        count = [part.lower() for part in text.replace("-", " ").split()].count(word)
        assert flagged(tokenizer, text, flags).lower() == word * count
