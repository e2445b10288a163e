"""Text to ids and back: exact for every text, never a special id, checked ids."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlm.errors import UserError
from rxlm.tokenization import SpecialTokens, Tokenizer
from rxlm.tokenization.sentencepiece_backend import import_sentencepiece

per_tokenizer = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
spaces = (" ", "  ", "\n", "\0", "\t", "\u2581", "\u2581\u2581")
lookalikes = ("<0x41>", "<unk>", "\u0120", "\ufffd", "\ufeff", "\u2047")
words = ("Oslo", " Oslo", "é", "漢", "😀", "7", "42")
tricky = st.sampled_from([*SpecialTokens().spellings(), *spaces, *lookalikes, *words])
any_text = st.text() | st.lists(tricky | st.text(max_size=3)).map("".join)


@per_tokenizer
@given(text=any_text)
def test_decoding_an_encoded_text_gives_it_back(any_tokenizer: Tokenizer, text: str) -> None:
    """Would catch lost or added spaces, normalised characters, and bytes without a token."""
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@per_tokenizer
@given(text=any_text)
def test_no_text_encodes_to_a_special_id(any_tokenizer: Tokenizer, text: str) -> None:
    """Would catch a user's '[EOS]' ending the conversation, and unknown characters."""
    assert any_tokenizer.special_ids.isdisjoint(any_tokenizer.encode(text))


@per_tokenizer
@given(batch=st.lists(any_text, max_size=4))
def test_a_batch_is_encoded_as_its_texts_are(any_tokenizer: Tokenizer, batch: list[str]) -> None:
    """Would catch padding, reordering, or special tokens recognised on the batch path only."""
    assert any_tokenizer.encode_batch(batch) == [any_tokenizer.encode(text) for text in batch]


@pytest.mark.parametrize("spelling", SpecialTokens().spellings())
def test_a_spelled_special_token_is_text(tokenizer: Tokenizer, spelling: str) -> None:
    """Would catch special-token matching left on for some token or after a word."""
    for text in (spelling, f"so {spelling} it is", spelling * 2):
        ids = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_copies_keep_special_tokens_out_of_texts(tokenizer: Tokenizer) -> None:
    """Would catch data-loading workers turning '[EOS]' into the id: the library forgets it."""
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode("[EOS] Oslo") == tokenizer.encode("[EOS] Oslo")
        assert twin.fingerprint == tokenizer.fingerprint


def test_a_word_is_the_same_at_the_start_and_in_the_middle(make_tokenizer) -> None:
    """Would catch the prefix space getting lost, which doubles what a small model must learn."""
    tokenizer = make_tokenizer("byte-bpe")
    (oslo,) = tokenizer.encode("Oslo")
    assert tokenizer.encode("in Oslo")[-1] == oslo
    assert make_tokenizer("byte-bpe", add_prefix_space=False).encode("Oslo") != [oslo]


def test_split_digits_gives_every_digit_its_token(kind: str, make_tokenizer) -> None:
    """Would catch the option being ignored by one of the backends."""
    tokenizer = make_tokenizer(kind, split_digits=True)
    pieces = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    assert not [piece for piece in pieces if sum(chr(byte).isdecimal() for byte in piece) > 1]
    assert tokenizer.decode(tokenizer.encode("a 370 b 37")) == "a 370 b 37"
    merged = make_tokenizer(kind)
    assert len(merged.encode("My number is 370.")) < len(tokenizer.encode("My number is 370."))


def test_special_ids_follow_the_fixed_order(tokenizer: Tokenizer) -> None:
    """Would catch a backend placing a special token elsewhere: every checkpoint relies on it."""
    spelled = [tokenizer.token_text(index) for index in range(11)]
    assert " ".join(spelled) == "[PAD] [UNK] [BOS] [EOS] [MASK] [Q] [A] [T] [C] [U] [I]"
    ids = [getattr(tokenizer, f"{role}_id") for role in SpecialTokens.roles()]
    assert ids == sorted(tokenizer.special_ids) == list(range(11))


def test_decode_skips_or_spells_special_tokens(tokenizer: Tokenizer) -> None:
    """Would catch special tokens in answers, and a prefix space left after a spelled one."""
    ids = [tokenizer.bos_id, *tokenizer.encode("Hello"), tokenizer.answer_id]
    ids += [*tokenizer.encode(" Ann"), tokenizer.eos_id]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[BOS]Hello[A] Ann[EOS]"
    assert tokenizer.decode(ids) == "Hello  Ann"
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_token_bytes_are_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    """Would catch wrong bits-per-byte: bytes counted for special tokens or in another alphabet."""
    text = "Oslo 漢 \u2581 😀"
    joined = b"".join(tokenizer.token_bytes(index) for index in tokenizer.encode(text))
    assert joined == (" " + text).encode()
    assert all(tokenizer.token_bytes(index) == b"" for index in tokenizer.special_ids)


def test_token_text_shows_partial_characters(tokenizer: Tokenizer) -> None:
    """Would catch U+FFFD in vocabulary listings, where 128 tokens would look the same."""
    index = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    assert tokenizer.token_text(index) == "\\xf0"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    """Would catch a negative id reading the last token, as a Python index does."""
    for use in (tokenizer.token_bytes, tokenizer.token_text, tokenizer.stream().push):
        with pytest.raises(UserError, match=f"token id {token_id} is outside the vocabulary"):
            use(token_id)
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer.decode([tokenizer.bos_id, token_id])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    """Would catch a library's obscure error (or a silent replacement) for broken input."""
    with pytest.raises(UserError, match=r"lone surrogate .* at position 3"):
        tokenizer.encode("Ann\ud800")


def test_a_missing_sentencepiece_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch an ImportError traceback instead of the remedy."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        import_sentencepiece()


@pytest.mark.parametrize("spelling", ["", "EOS", "[E OS]", "[]", "[{{x}}]", "[é]", "<0x41>"])
def test_a_spelling_that_text_could_merge_into_is_refused(spelling: str) -> None:
    """Would catch a special token that training learns as an ordinary word."""
    with pytest.raises(UserError, match="brackets"):
        SpecialTokens.parse({"eos": spelling})


def test_repeated_spellings_are_refused() -> None:
    """Would catch two roles sharing one id."""
    with pytest.raises(UserError, match=r"repeated: \['\[BOS\]'\]"):
        SpecialTokens.parse({"eos": "[BOS]"})
