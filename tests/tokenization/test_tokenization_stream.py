"""Streaming text: complete characters only, and together exactly what decode gives."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rxlm.tokenization import TextStream, Tokenizer
from rxlm.tokenization.stream import TokenTable, decode_ids

BYTES_TABLE = TokenTable(
    token_bytes=(b"", b"", *(bytes([byte]) for byte in range(256)), b"\xf0\x9f", b" \xf0\x9f\x98"),
    spellings=("[PAD]", "[A]"),
    prefix_space=True,
)
first_byte = 2  # id of byte 0 in BYTES_TABLE


def pushed(stream: TextStream, ids: list[int]) -> list[str]:
    """Return every piece of text, the flush included."""
    return [*(stream.push(index) for index in ids), stream.flush()]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_joins_to_decode_for_any_ids(
    any_tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    """Would catch text lost or doubled at broken characters, special tokens and prefix spaces."""
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=30))
    pieces = pushed(any_tokenizer.stream(skip_special_tokens=skip), ids)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, len(BYTES_TABLE) - 1), max_size=20), skip=st.booleans())
def test_a_stream_of_single_bytes_joins_to_decode(ids: list[int], skip: bool) -> None:
    """Would catch differences in where invalid bytes become U+FFFD; bytes are dense here."""
    assert "".join(pushed(TextStream(BYTES_TABLE, skip), ids)) == decode_ids(BYTES_TABLE, ids, skip)


def test_a_character_appears_when_its_last_byte_does(tokenizer: Tokenizer) -> None:
    """Would catch half an emoji (U+FFFD) on a terminal."""
    ids = tokenizer.encode("a👍🏽b")
    pieces = pushed(tokenizer.stream(), ids)
    assert "".join(pieces) == "a👍🏽b"
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "👍", "🏽", "b"]


def test_unfinished_bytes_wait_for_the_flush(tokenizer: Tokenizer) -> None:
    """Would catch U+FFFD shown although the next id could still complete the character."""
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    stream = tokenizer.stream()
    assert [stream.push(byte[b]) for b in (b"\xf0", b"\x9f", b"\x98")] == ["", "", ""]
    assert stream.push(byte[b"\x80"]) == "😀"
    assert stream.push(byte[b"\xf0"]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_an_impossible_continuation_is_replaced_at_once() -> None:
    """Would catch text held back forever behind a byte that can never be completed."""
    stream = TextStream(BYTES_TABLE)
    assert stream.push(first_byte + 0xE2) == ""
    assert stream.push(first_byte + ord("x")) == "\ufffdx"
    assert stream.push(first_byte + 0xFF) == "\ufffd"


def test_special_tokens_are_skipped_by_default(tokenizer: Tokenizer) -> None:
    """Would catch '[EOS]' printed to the user."""
    (word, *_) = tokenizer.encode("Oslo")
    assert tokenizer.stream().push(tokenizer.eos_id) == ""
    assert tokenizer.stream(skip_special_tokens=False).push(tokenizer.eos_id) == "[EOS]"
    assert tokenizer.token_bytes(word).startswith(b" ")


def test_a_flushed_stream_starts_a_new_text(tokenizer: Tokenizer) -> None:
    """Would catch the second answer of a chat beginning with a space."""
    stream, ids = tokenizer.stream(), tokenizer.encode("Oslo")
    assert "".join(pushed(stream, ids)) == "Oslo"
    assert "".join(pushed(stream, ids)) == "Oslo"
