"""Small tokenizers of every kind, trained once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

KINDS = ("byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe")


def corpus() -> Iterator[str]:
    """Yield texts with spelled special tokens, digits, line breaks and several scripts."""
    names = ("Ann", "Ben", "Zoe", "Émile", "Łucja", "漢字")
    for index in range(240):
        name, city = names[index % len(names)], ("Oslo", "Rome", "Paris")[index % 3]
        yield f"Hello, my name is {name} and I live in {city}. My number is {index * 37}."
        yield f"{city} it is.\n  What is my name? [A] Your name is {name} [EOS] \u2581 😀"


@cache
def small_tokenizer(kind: str, add_prefix_space: bool = True, split_digits: bool = False):
    """Return a tokenizer of about 500 ids trained on :func:`corpus`."""
    if kind != "byte-bpe":
        pytest.importorskip("sentencepiece")
    options = {"add_prefix_space": add_prefix_space, "split_digits": split_digits}
    return train_tokenizer(corpus(), TokenizerTraining(kind=kind, vocab_size=512, **options))


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A small tokenizer of each kind, with default options."""
    return small_tokenizer(request.param)


@pytest.fixture(params=[(kind, prefix) for kind in KINDS for prefix in (True, False)], ids=str)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A small tokenizer of each kind, with and without the prefix space."""
    return small_tokenizer(*request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind; those whose library is missing are skipped."""
    if request.param != "byte-bpe":
        pytest.importorskip("sentencepiece")
    return request.param


@pytest.fixture
def make_tokenizer() -> Callable[..., Tokenizer]:
    """The function that makes small tokenizers, for tests that choose the options."""
    return small_tokenizer


@pytest.fixture
def texts() -> list[str]:
    """The training texts."""
    return list(corpus())
