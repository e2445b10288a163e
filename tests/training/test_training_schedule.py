"""Learning-rate schedules: values at the corners, and what happens outside of the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.errors import UserError
from rxlm.training.schedule import learning_rate, learning_rate_factor
from rxlm.training.settings import TrainSettings


def settings(**values: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 100, "lr": 1.0, "warmup_steps": 10, **values})


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_wastes_no_step(schedule: str) -> None:
    """Catches a first update with rate 0 and a peak reached one update too early or late."""
    chosen = settings(schedule=schedule)
    rates = [learning_rate(chosen, step) for step in range(11)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] <= 1.0


def test_cosine_values() -> None:
    """Catches a cosine over the wrong interval or to the wrong end."""
    chosen = settings(schedule="cosine", final_lr_ratio=0.1)
    assert learning_rate(chosen, 54) == pytest.approx(0.55)  # update 55 is half way
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.2))
    assert learning_rate(chosen, 27) == pytest.approx(quarter)  # update 28: (28 - 10) / 90
    assert learning_rate(chosen, 99) == pytest.approx(0.1)


def test_wsd_values() -> None:
    """Catches a decay that begins too early, or does not end at the last update."""
    chosen = settings(schedule="wsd", decay_fraction=0.2, final_lr_ratio=0.0)
    assert {learning_rate(chosen, step) for step in range(10, 80)} == {1.0}
    assert learning_rate(chosen, 89) == pytest.approx(0.5)
    assert learning_rate(chosen, 99) == pytest.approx(0.0)


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(1, 50),
    st.integers(0, 60),
    st.floats(0, 1),
    st.integers(0, 200),
)
def test_rates_stay_in_range_and_clamp_after_the_end(
    schedule: Any, steps: int, warmup: int, final: float, step: int
) -> None:
    """Catches a rate above the peak, a division by zero, or one that moves after the end."""
    chosen = settings(schedule=schedule, steps=steps, warmup_steps=warmup, final_lr_ratio=final)
    assert 0.0 <= learning_rate_factor(chosen, step) <= 1.0
    assert learning_rate_factor(chosen, steps + step) == learning_rate_factor(chosen, steps - 1)


def test_settings_refuse_what_cannot_work() -> None:
    """Catches settings that would be silently without effect."""
    with pytest.raises(UserError, match="validate_every"):
        TrainSettings.parse({"steps": 5, "early_stop_patience": 2})
    with pytest.raises(UserError, match="betas"):
        TrainSettings.parse({"steps": 5, "betas": [0.9, 1.0]})
    with pytest.raises(UserError, match="did you mean 'warmup_steps'"):
        TrainSettings.parse({"steps": 5, "warmup_step": 2})
