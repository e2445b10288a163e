"""Sampling against a slow oracle in plain Python numbers, and its promises about randomness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rxlm.errors import RunError, UserError
from rxlm.ops.sampling import (
    GREEDY,
    SamplingSettings,
    penalize,
    sample,
    token_probabilities,
    uniform_draw,
)

INFINITY = float("inf")
PINNED = [0.3175435798086097, 0.7979726515430128, 0.29378295756088435]


def softmax(scores: list[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    return [weight / sum(weights) for weight in weights]


def oracle(scores: list[float], settings: SamplingSettings, previous: list[int]) -> list[float]:
    """The distribution, by the definitions, one number at a time."""
    for token in set(previous):
        score = scores[token]
        factor = settings.repetition_penalty
        scores[token] = score / factor if score > 0 else score * factor
    scores = [score / settings.temperature for score in scores]
    if settings.top_k is not None:
        worst = sorted(scores, reverse=True)[: settings.top_k][-1]
        scores = [score if score >= worst else -INFINITY for score in scores]
    if settings.top_p is not None:
        probabilities = softmax(scores)
        total, kept = 0.0, set()
        for token in sorted(range(len(scores)), key=lambda token: -probabilities[token]):
            kept.add(token)
            total += probabilities[token]
            if total >= settings.top_p:
                break
        scores = [score if token in kept else -INFINITY for token, score in enumerate(scores)]
    probabilities = softmax(scores)
    if settings.min_p is not None:
        least = settings.min_p * max(probabilities)
        probabilities = [share if share >= least else 0.0 for share in probabilities]
    return [share / sum(probabilities) for share in probabilities]


# Distinct scores, no closer than 1/4: which token a filter drops never hangs on rounding.
distinct_scores = st.lists(st.integers(-20, 20), min_size=2, max_size=12, unique=True).map(
    lambda scores: [score / 4 for score in scores]
)


@given(
    scores=distinct_scores,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.one_of(st.none(), st.integers(1, 14)),
    top_p=st.one_of(st.none(), st.sampled_from([0.05, 0.37, 0.71, 0.93, 1.0])),
    min_p=st.one_of(st.none(), st.sampled_from([0.0, 0.017, 0.23, 1.0])),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    data=st.data(),
)
def test_the_distribution_is_the_definitions(
    scores: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    data: st.DataObject,
) -> None:
    """Catches a filter that drops or keeps a wrong token, a wrong order of filters, or a result
    that does not sum to one."""
    previous = data.draw(st.lists(st.integers(0, len(scores) - 1), max_size=4))
    settings = SamplingSettings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    ids = torch.tensor([[*previous, -1]])
    given_scores = torch.tensor([scores])
    result = token_probabilities(given_scores, settings, ids)[0]
    assert given_scores.tolist() == [scores], "the input was changed"
    expected = torch.tensor(oracle(scores, settings, previous))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


@given(scores=distinct_scores, num_draws=st.sampled_from([50, 333]))
def test_each_token_gets_its_share_of_the_draws(scores: list[float], num_draws: int) -> None:
    """Catches a biased or shifted inversion: evenly spread draws must land in proportion."""
    settings = SamplingSettings(top_k=5)
    expected = oracle(scores, settings, [])
    uniforms = [(index + 0.5) / num_draws for index in range(num_draws)]
    rows = torch.tensor([scores]).expand(num_draws, -1)
    counts = sample(rows, settings, uniforms).bincount(minlength=len(scores))
    for count, share in zip(counts.tolist(), expected, strict=True):
        assert abs(count - share * num_draws) <= 1.001


def test_extreme_draws_never_find_an_impossible_token() -> None:
    """Catches an inversion that returns a filtered token for the smallest or largest draw."""
    logits = torch.tensor([[-INFINITY, 1.0, -INFINITY, 2.0, -INFINITY]])
    largest = 1.0 - 2.0**-52
    assert sample(logits, SamplingSettings(), [0.0]).tolist() == [1]
    assert sample(logits, SamplingSettings(), [largest]).tolist() == [3]
    assert sample(logits, SamplingSettings(top_k=1), [0.0]).tolist() == [3]


def test_top_p_keeps_the_token_that_crosses() -> None:
    """Catches the usual off-by-one of nucleus sampling, in one row of a batch or in all."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]).log()
    result = token_probabilities(logits, SamplingSettings(top_p=0.6))
    torch.testing.assert_close(result, torch.tensor([[0.625, 0.375, 0.0], [0.0, 0.625, 0.375]]))


def test_rows_do_not_influence_each_other() -> None:
    """Catches filters that look across the batch: a row must be drawn as it is alone."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 30, generator=generator) * 3
    previous = torch.randint(-1, 30, (7, 4), generator=generator)
    settings = SamplingSettings(top_k=9, top_p=0.8, min_p=0.02, repetition_penalty=1.2)
    uniforms = [uniform_draw(5, row) for row in range(7)]
    together = sample(logits, settings, uniforms, previous)
    alone = [
        sample(logits[[row]], settings, [uniforms[row]], previous[[row]]).item() for row in range(7)
    ]
    assert together.tolist() == alone


def test_greedy_takes_the_best_after_the_penalty() -> None:
    """Catches greedy decoding that draws, or that ignores the repetition penalty."""
    logits = torch.tensor([[1.0, 2.0, 1.9], [-2.0, -1.0, -1.1]])
    assert sample(logits, GREEDY).tolist() == [1, 1]
    penalized = SamplingSettings(temperature=0, repetition_penalty=1.2)
    assert sample(logits, penalized, previous_ids=torch.tensor([[1], [1]])).tolist() == [2, 2]


def test_the_penalty_counts_a_token_once_and_skips_filler() -> None:
    """Catches a penalty applied per occurrence, to the last token for -1, or in place."""
    scores = torch.tensor([[2.0, -2.0, 4.0]])
    result = penalize(scores, torch.tensor([[0, 0, 1, -1]]), 2.0)
    assert result.tolist() == [[1.0, -4.0, 4.0]]
    assert scores.tolist() == [[2.0, -2.0, 4.0]]


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    """Catches scores that overflow when they are divided by a very small temperature."""
    logits = torch.tensor([[80.0, 81.0, -90.0]])
    result = token_probabilities(logits, SamplingSettings(temperature=1e-6))
    assert result.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings()])
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_scores_that_are_not_finite_are_an_error(settings: SamplingSettings, bad: float) -> None:
    """Catches a diverged model that goes on talking nonsense silently."""
    with pytest.raises(RunError, match="not finite"):
        sample(torch.tensor([[0.0, 1.0], [0.0, bad]]), settings, [0.5, 0.5])


def test_a_row_without_any_possible_token_is_an_error() -> None:
    """Catches an arbitrary token for a row whose scores are all -inf."""
    with pytest.raises(RunError, match="not finite"):
        sample(torch.full((1, 3), -INFINITY), SamplingSettings(), [0.5])


def test_drawing_without_numbers_is_an_error() -> None:
    """Catches a silent fall-back to global randomness."""
    with pytest.raises(ValueError, match="uniforms"):
        sample(torch.zeros(1, 3), SamplingSettings())


def test_draws_are_fixed_for_ever() -> None:
    """Catches a change of the draws, which would change every saved conversation's future."""
    assert [uniform_draw(0, 0), uniform_draw(0, 1), uniform_draw(1, 0)] == PINNED


def test_draws_are_uniform_and_streams_unrelated() -> None:
    """Catches draws outside [0, 1), a skewed mean, or seeds that share a stream."""
    draws = torch.tensor([[uniform_draw(seed, index) for index in range(2000)] for seed in (3, 4)])
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(dim=1) - 0.5).abs().max() < 0.03
    assert torch.corrcoef(draws)[0, 1].abs() < 0.08
    assert torch.corrcoef(torch.stack((draws[0, 1:], draws[1, :-1])))[0, 1].abs() < 0.08


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("temperature", -0.1, "use 0 or 0.7"),
        ("temperature", 1e-50, "use 0 or 0.7"),
        ("temperature", float("nan"), "finite"),
        ("top_k", 0, "None for all"),
        ("top_p", 0.0, "None for all"),
        ("top_p", 1.5, "None for all"),
        ("min_p", -0.5, "None for all"),
        ("repetition_penalty", 0.0, "1.0 to switch it off"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: float, remedy: str) -> None:
    """Catches settings that would keep no token or divide by zero."""
    with pytest.raises(UserError, match=remedy) as error:
        SamplingSettings.parse({field: value})
    assert field in str(error.value)
