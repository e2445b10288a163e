"""T4: what is timed, and what is made of times that are given. No time decides a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rxlm.evaluation.suite.baseline import twin_config
from rxlm.evaluation.suite.cost import CostRow, run_cost, summarise_cost
from rxlm.evaluation.suite.settings import CostSettings
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.models import RxTAlpha


def row(actor: str, turn: int, rounds: list[float], state: int) -> CostRow:
    """Return a row with given prompt latencies."""
    middle = sorted(rounds)[len(rounds) // 2]
    return CostRow(
        actor=actor, turn=turn, prompt_ms=middle, low=min(rounds), high=max(rounds),
        tokens_per_second=1.0, update_ms=1.0, state_bytes=state, rounds=rounds,
    )  # fmt: skip


def test_ratios_of_last_to_first() -> None:
    """Catches a ratio that is upside down, and a goal on the baseline."""
    rows = [row("M", 1, [2.0, 2.0, 2.0], 8), row("M", 64, [2.1, 2.0, 9.0], 8)]
    rows += [row("F", 1, [1.0, 1.0, 1.0], 10), row("F", 64, [5.0, 5.0, 5.0], 640)]
    found = {item["name"]: item for item in summarise_cost(rows)}
    assert found["latency_M"]["value"] == pytest.approx(1.05) and found["latency_M"]["passed"]
    assert found["latency_F"]["value"] == pytest.approx(5.0)
    assert found["latency_F"]["passed"] is None
    assert found["state_F"]["value"] == pytest.approx(64) and found["state_M"]["passed"]


def test_state_grows_for_the_baseline_only(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches a baseline whose history does not grow: then nothing is compared."""
    model = make_model()
    torch.manual_seed(0)
    baseline = LanguageModel(twin_config(model)).eval()
    settings = CostSettings(turns=(1, 3), query_tokens=4, answer_tokens=3, rounds=2)
    rows = run_cost(model, baseline, settings)
    state = {(item["actor"], item["turn"]): item["state_bytes"] for item in rows}
    assert state["M", 1] == state["M", 3] == 2 * 4 * 16 * 4
    assert state["F", 3] == state["F kept", 3] > 2.5 * state["F", 1]
    assert all(len(item["rounds"]) == 2 and item["prompt_ms"] > 0 for item in rows)
