"""Multi-query associative recall: layout, laws, and that a row depends on (seed, position) only.

The layout is checked against Zoology's description, not its bytes: its fillers come from a global
generator. The oracle below reads tokens only, as a model does.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data.mqar import IGNORED, MqarSettings, distance_law, mqar_rows
from rxlm.errors import UserError


@st.composite
def settings(draw: st.DrawFn) -> MqarSettings:
    pairs = draw(st.integers(1, 12))
    length = 4 * pairs + 2 * draw(st.integers(0, 20))
    return MqarSettings(pairs, length, 2 * (pairs + 1 + draw(st.integers(0, 40))))


@given(settings(), st.integers(0, 2**40), st.integers(0, 2**40))
def test_layout(task: MqarSettings, seed: int, position: int) -> None:
    """Catches a repeated or misplaced key, a target beside its question, a filler that rebinds."""
    tokens, targets = (rows[0] for rows in mqar_rows(task, seed, [position]))
    context = task.context_length
    keys, values = tokens[:context:2], tokens[1:context:2]
    assert len(set(keys)) == len(set(values)) == task.num_pairs
    assert 1 <= keys.min() and keys.max() < task.vocab_size // 2
    assert task.vocab_size // 2 <= values.min() and values.max() < task.vocab_size
    (asked,) = np.nonzero(targets != IGNORED)
    assert asked.min() >= context and not (asked % 2).any()
    assert sorted(tokens[asked]) == sorted(keys)
    later = np.delete(tokens, np.concatenate((np.arange(context), asked)))
    assert not set(later) & set(keys)
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size


@given(settings(), st.integers(0, 99))
def test_who_looks_up_knows_every_answer(task: MqarSettings, seed: int) -> None:
    """Catches targets that do not follow from the tokens before them."""
    tokens, targets = mqar_rows(task, seed, range(5))
    for row, answers in zip(tokens, targets, strict=True):
        told: dict[int, int] = {}
        for place, token in enumerate(row):
            if answers[place] != IGNORED:
                assert told[token] == answers[place]
            # A reader that knows nothing of the layout: a value belongs to the key before it.
            if place and row[place - 1] < task.first_value <= token:
                told[row[place - 1]] = token


def test_guesses_get_chance() -> None:
    """Catches answers that can be had without the question: positions or values that tell them."""
    task = MqarSettings(8, 64, 64)
    tokens, targets = mqar_rows(task, 0, range(2000))
    rows, asked = np.nonzero(targets != IGNORED)
    answers = targets[rows, asked]
    for order in range(8):  # always the value of the n-th pair, or of the n-th question
        assert abs((tokens[rows, 2 * order + 1] == answers).mean() - 1 / 8) < 0.012
    nth = np.arange(len(rows)) % 8
    assert abs((tokens[rows, 2 * nth + 1] == answers).mean() - 1 / 8) < 0.04
    counts = np.bincount(answers, minlength=64)[32:]
    assert abs(counts / len(answers) - 1 / 32).max() < 0.006


def test_questions_keep_their_distance_law() -> None:
    """Catches uniform places, or a law that begins at another place."""
    task = MqarSettings(1, 40)
    _, targets = mqar_rows(task, 1, range(8000))
    places = (np.nonzero(targets != IGNORED)[1] - task.context_length) // 2
    shares = np.bincount(places, minlength=19) / 8000
    weights = np.arange(1, 20) ** -0.99
    assert np.allclose(distance_law(task), weights / weights.sum())
    assert abs(shares - weights / weights.sum()).max() < 0.02


def test_draws_without_replacement_are_those_of_numpy() -> None:
    """Catches a law of several questions that differs from successive draws without replacement."""
    task = MqarSettings(3, 20)
    law = distance_law(task)
    _, targets = mqar_rows(task, 2, range(8000))
    ours = (targets != IGNORED)[:, 6::2].mean(axis=0)
    generator = np.random.default_rng(0)
    theirs = np.zeros(len(law))
    for _ in range(8000):
        theirs[generator.choice(len(law), 3, replace=False, p=law)] += 1 / 8000
    assert abs(ours - theirs).max() < 0.03


def test_full_row_asks_at_every_place() -> None:
    """Catches lost questions where there are exactly as many places as pairs."""
    _, targets = mqar_rows(MqarSettings(64, 256), 0, [0])
    assert (targets[0, 128::2] != IGNORED).all() and (targets[0, 1::2] == IGNORED).all()


@given(settings(), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_position_alone_decides(task: MqarSettings, positions: list[int]) -> None:
    """Catches a generator that is shared by rows: a resumed run would see other data."""
    all_rows = mqar_rows(task, 3, range(51))
    some = mqar_rows(task, 3, positions)
    assert np.array_equal(some.tokens, all_rows.tokens[positions])
    assert np.array_equal(some.targets, all_rows.targets[positions])
    assert not np.array_equal(mqar_rows(task, 4, range(51)).tokens, all_rows.tokens)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_pairs": 0, "length": 8}, "num_pairs=0"),
        ({"num_pairs": 4, "length": 14}, "length=14"),
        ({"num_pairs": 4, "length": 17}, "length=17"),
        ({"num_pairs": 4, "length": 16, "vocab_size": 8}, "vocab_size=8"),
        ({"num_pairs": 4, "length": 16, "vocab_size": 11}, "vocab_size=11"),
        ({"num_pairs": 4, "length": 16, "power": 0.0}, "power=0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, int], names: str) -> None:
    """Catches an endless or a crippled row where an error is due."""
    with pytest.raises(UserError, match=names):
        MqarSettings(**fields)


def test_negative_numbers_are_refused() -> None:
    """Catches numpy's message about entropy where ours should name the seed."""
    with pytest.raises(UserError, match="seed=-1"):
        mqar_rows(MqarSettings(1, 4), -1, [0])
