"""Training: deterministic, from a stream, honest about size and about bad input."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rxlm.errors import UserError
from rxlm.tokenization import SpecialTokens, Tokenizer, TokenizerTraining, train_tokenizer

TRAIN_AND_PRINT = """
import sys
from rxlm.tokenization import TokenizerTraining, train_tokenizer
texts = open(sys.argv[1], encoding="utf-8", newline="").read().split("\\0")
for kind in sys.argv[2:]:
    print(train_tokenizer(texts, TokenizerTraining(kind=kind, vocab_size=512)).fingerprint)
assert "torch" not in sys.modules, "tokenization imported torch"
"""


def test_training_is_the_same_in_every_process(texts: list[str], tmp_path, make_tokenizer) -> None:
    """Would catch ids that depend on hashing order, thread timing or the process (or torch)."""
    pytest.importorskip("sentencepiece")
    kinds = ["byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe"]
    path = tmp_path / "texts"
    path.write_bytes("\0".join(texts).encode("utf-8"))
    result = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_PRINT, str(path), *kinds],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [make_tokenizer(kind).fingerprint for kind in kinds]


def test_different_trainings_differ_in_fingerprint(texts: list[str], make_tokenizer) -> None:
    """Would catch a fingerprint that ignores the vocabulary, the options or the spelling."""
    base = make_tokenizer("byte-bpe")
    config = TokenizerTraining(vocab_size=512)
    others = [
        make_tokenizer("byte-bpe", add_prefix_space=False),
        make_tokenizer("byte-bpe", split_digits=True),
        train_tokenizer(texts, config, SpecialTokens(eos="<|end|>")),
        train_tokenizer(texts[:100], config),
    ]
    assert len({tokenizer.fingerprint for tokenizer in [base, *others]}) == 5
    assert all(len(tokenizer.fingerprint) == 64 for tokenizer in others)


def test_a_small_corpus_gives_a_smaller_vocabulary(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch a failed run, or a vocab_size that is not the real one, with little text."""
    with caplog.at_level(logging.INFO, logger="rxlm.tokenization"):
        tokenizer = train_tokenizer(
            ["my name is Ann"] * 3, TokenizerTraining(kind=kind, vocab_size=4096)
        )
    assert 267 <= tokenizer.vocab_size < 400
    assert f"the vocabulary has {tokenizer.vocab_size}" in caplog.text
    assert max(tokenizer.encode("Zoë")) < tokenizer.vocab_size


def test_the_vocabulary_is_as_large_as_asked_with_enough_text(kind: str, texts: list[str]) -> None:
    """Would catch special tokens or bytes counted beside vocab_size."""
    config = TokenizerTraining(kind=kind, vocab_size=318)
    assert train_tokenizer(texts, config).vocab_size == 318


def test_training_reads_a_stream_once(kind: str) -> None:
    """Would catch reading all texts into a list, or iterating over them twice."""
    seen = []

    def stream() -> Iterator[str]:
        for index in range(50):
            seen.append(index)
            yield "" if index % 2 else f"line one of text\nline two of text {index}"

    train_tokenizer(stream(), TokenizerTraining(kind=kind))
    assert seen == list(range(50))


def test_long_texts_are_not_dropped(kind: str) -> None:
    """Would catch SentencePiece skipping lines over its length limit without a word."""
    tokenizer = train_tokenizer(["remember " * 3000], TokenizerTraining(kind=kind, vocab_size=300))
    assert len(tokenizer.encode("remember")) <= 3


def test_spelled_special_tokens_in_the_corpus_are_learned_as_text(kind: str) -> None:
    """Would catch merges that end in a special token's id."""
    tokenizer = train_tokenizer(["[A] [EOS] [Q][A]", "say [A]"] * 200, TokenizerTraining(kind=kind))
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("[A] [EOS] [Q][A]"))
    assert tokenizer.decode(tokenizer.encode("[A] [EOS]")) == "[A] [EOS]"


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["no texts", "empty texts"])
def test_no_text_is_refused(kind: str, texts: list[str]) -> None:
    """Would catch a tokenizer trained on nothing from a wrong path."""
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(texts, TokenizerTraining(kind=kind))


@pytest.mark.parametrize("bad", [b"bytes", None, "half \ud83d"], ids=["bytes", "None", "surrogate"])
def test_a_bad_text_is_refused_with_its_reason(kind: str, bad: object) -> None:
    """Would catch the libraries' own errors ('INTERNAL: ...') hiding ours."""
    with pytest.raises(UserError, match=r"must be str|lone surrogate"):
        train_tokenizer(["fine", bad], TokenizerTraining(kind=kind))  # type: ignore[list-item]


def test_an_error_of_the_source_is_passed_on(kind: str) -> None:
    """Would catch a full disk or Ctrl-C reported as a tokenizer problem."""

    def stream() -> Iterator[str]:
        yield "fine"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train_tokenizer(stream(), TokenizerTraining(kind=kind))


def test_a_vocabulary_below_bytes_and_special_tokens_is_refused() -> None:
    """Would catch a byte without a token."""
    with pytest.raises(UserError, match="vocab_size"):
        TokenizerTraining.parse({"vocab_size": 266})
    assert train_tokenizer(["abab"], TokenizerTraining(vocab_size=267)).vocab_size == 267


def test_too_many_characters_for_the_vocabulary_is_explained() -> None:
    """Would catch SentencePiece's refusal escaping as a RuntimeError."""
    pytest.importorskip("sentencepiece")
    texts = ["".join(chr(0x4E00 + index) for index in range(500))] * 2
    config = TokenizerTraining(kind="sentencepiece-bpe", vocab_size=300, character_coverage=1.0)
    with pytest.raises(UserError, match="could not be trained"):
        train_tokenizer(texts, config)


def test_custom_spellings_take_the_same_ids(kind: str, texts: list[str]) -> None:
    """Would catch spellings fixed somewhere in a backend."""
    special = SpecialTokens(eos="<|end|>", answer="<assistant>")
    tokenizer: Tokenizer = train_tokenizer(
        texts, TokenizerTraining(kind=kind, vocab_size=400), special
    )
    assert tokenizer.token_text(tokenizer.eos_id) == "<|end|>"
    assert tokenizer.token_text(tokenizer.answer_id) == "<assistant>"
    text = "<|end|> [EOS] <assistant>"
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
