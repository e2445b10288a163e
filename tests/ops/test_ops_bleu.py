"""BLEU of ids: every number beside NLTK's, text beside sacrebleu's."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.bleu import Smoothing, corpus_bleu, ngram_counts, sentence_bleu

METHODS = get_args(Smoothing)
Texts = list[list[int]]


def nltk_method(name: str) -> Any:
    from nltk.translate.bleu_score import SmoothingFunction

    return getattr(SmoothingFunction(), "method0" if name == "none" else name)


def nltk_sentence(references: Texts, candidate: list[int], name: str, **options: Any) -> float:
    from nltk.translate.bleu_score import sentence_bleu as oracle

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(
                oracle(references, candidate, smoothing_function=nltk_method(name), **options)
            )
        except AssertionError:  # method6 without a trigram
            return 0.0


def placed(texts: list[Texts], offsets: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[B, R, width]``; texts begin at offsets, and padding is no zero."""
    ids = torch.full((len(texts), max(map(len, texts)), width), 1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    count = 0
    for row, group in enumerate(texts):
        for place, text in enumerate(group):
            start = offsets[count % len(offsets)] % (width - len(text) + 1)
            count += 1
            ids[row, place, start : start + len(text)] = torch.tensor(text)
            mask[row, place, start : start + len(text)] = True
    return ids, mask


text_of = st.integers(1, 3).flatmap(
    lambda size: st.lists(st.integers(0, 2 * size), min_size=1, max_size=11)
)
corpus_of = st.lists(
    st.tuples(text_of, st.lists(text_of, min_size=1, max_size=3)), min_size=1, max_size=4
)
offsets_of = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(corpus=corpus_of, offsets=offsets_of)
@settings(max_examples=60, deadline=None)
def test_sentences_equal_nltk(corpus: list[tuple[list[int], Texts]], offsets: list[int]) -> None:
    """Catches clipped counts, brevity or a smoothing that differ, and padding that counts."""
    candidates, mask = placed([[candidate] for candidate, _ in corpus], offsets, 12)
    references, reference_mask = placed([texts for _, texts in corpus], offsets, 12)
    for method in METHODS:
        scores = sentence_bleu(
            candidates[:, 0], references, mask[:, 0], reference_mask, smoothing=method
        )
        expected = [nltk_sentence(texts, candidate, method) for candidate, texts in corpus]
        assert scores.tolist() == pytest.approx(expected, abs=1e-9), method


@given(corpus=corpus_of)
@settings(max_examples=30, deadline=None)
def test_a_corpus_equals_nltk(corpus: list[tuple[list[int], Texts]]) -> None:
    """Catches a corpus score that is the mean of its sentences'."""
    from nltk.translate.bleu_score import corpus_bleu as oracle

    candidates, mask = placed([[candidate] for candidate, _ in corpus], [0], 12)
    references, reference_mask = placed([texts for _, texts in corpus], [0], 12)
    for method in METHODS[:5]:
        score = corpus_bleu(
            candidates[:, 0], references, mask[:, 0], reference_mask, smoothing=method
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = oracle(
                [texts for _, texts in corpus],
                [candidate for candidate, _ in corpus],
                smoothing_function=nltk_method(method),
            )
        assert float(score) == pytest.approx(float(expected), abs=1e-9), method


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (0.2,) * 5])
def test_other_weights_equal_nltk(weights: tuple[float, ...]) -> None:
    """Catches orders that are always four."""
    candidate, reference = [1, 2, 3, 4, 5, 6, 7, 2, 3], [1, 2, 3, 4, 5, 9, 7, 2]
    score = sentence_bleu(
        torch.tensor([candidate]), torch.tensor([reference]), weights=weights, smoothing="method1"
    )
    expected = nltk_sentence([reference], candidate, "method1", weights=weights)
    assert float(score) == pytest.approx(expected, abs=1e-9)


def test_text_agrees_with_sacrebleu() -> None:
    """Catches a score that is no longer BLEU as it is reported: its 'exp' smoothing is method3.

    (With answers of fewer tokens than N, NLTK counts an n-gram that is not there, and so do we.)
    """
    import sacrebleu

    said = ["the cat sat on a mat today", "I live in Oslo now", "a dog barks at me"]
    meant = ["the cat sat on the mat today", "I live in Bergen now , I think", "the dog barks"]
    words: dict[str, int] = {}
    ids = [
        [[words.setdefault(word, len(words)) for word in text.split()]] for text in (*said, *meant)
    ]
    tokens, mask = placed(ids, [0], 10)
    score = corpus_bleu(tokens[:3, 0], tokens[3:], mask[:3, 0], mask[3:], smoothing="method3")
    expected = sacrebleu.corpus_bleu(said, [meant], tokenize="none", smooth_method="exp").score
    assert 100 * float(score) == pytest.approx(expected, abs=1e-6)


def test_a_perfect_answer_has_one_and_an_empty_one_has_zero() -> None:
    """Catches a division by the length of nothing."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[True] * 5, [False] * 5])
    assert sentence_bleu(ids, ids, mask).tolist() == [1.0, 0.0]


def test_of_two_references_as_near_the_shorter_one_counts() -> None:
    """Catches the longer one: it would make the candidate look too short."""
    candidate, shorter, longer = [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]
    references, mask = placed([[longer, shorter]], [0], 6)
    score = sentence_bleu(torch.tensor([candidate]), references, reference_mask=mask)
    assert float(score) == 1.0
    assert nltk_sentence([longer, shorter], candidate, "none") == pytest.approx(1.0)


def test_what_stands_at_padding_is_no_token() -> None:
    """Catches the -100 of masked labels being refused, or counted."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    padded = torch.tensor([[-100, 1, 2, 3, 4, 5, -100]])
    mask = padded >= 0
    assert sentence_bleu(padded, ids, mask).tolist() == [1.0]
    assert sentence_bleu(ids, padded, reference_mask=mask).tolist() == [1.0]


def test_ids_may_be_large_and_on_any_scale() -> None:
    """Catches names of n-grams that collide when ids are large."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 4, (8, 40), generator=generator)
    large = torch.tensor([7, 250_000, 99, 2_000_000_000])[small]
    found = ngram_counts(large[:4], large[4:])
    expected = ngram_counts(small[:4], small[4:])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": torch.zeros(2, 3)}, "candidates has dtype torch.float32"),
        ({"candidates": torch.full((2, 3), -1)}, "candidates holds the id -1"),
        ({"references": torch.zeros(3, 3, dtype=torch.long)}, r"expected \[B, T\]"),
        ({"reference_mask": torch.zeros(2, 3, dtype=torch.bool)}, "sentence 0 has no reference"),
        ({"candidate_mask": torch.ones(2, 4, dtype=torch.bool)}, r"candidate_mask has shape"),
        ({"candidate_mask": torch.zeros(2, 3)}, "a mask that is added to scores"),
        (
            {name: torch.zeros(0, 3, dtype=torch.long) for name in ("candidates", "references")},
            "no sentences",
        ),
        ({"smoothing": "method9"}, "smoothing='method9' does not exist"),
        ({"weights": ()}, "0 weights"),
    ],
)
def test_bad_input_is_one_message(changes: dict[str, Any], message: str) -> None:
    """Catches an index error from inside, and -100 counted as a word."""
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match=message):
        sentence_bleu(**{"candidates": ids, "references": ids, **changes})


def test_methods_of_sentences_are_refused_for_a_corpus() -> None:
    """Catches NLTK's way: the counts of the last sentence for the whole corpus."""
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match="defined for a sentence"):
        corpus_bleu(ids, ids, smoothing="method5")
