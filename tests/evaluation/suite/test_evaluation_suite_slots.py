"""T6: what deleting, comparing and probing slots finds in memories that are made for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rxlm.evaluation.suite.reactive import ReactiveContestant
from rxlm.evaluation.suite.settings import SlotsSettings
from rxlm.evaluation.suite.slots import (
    SlotsResult,
    ridge_probe,
    run_slots,
    slot_cosines,
    slot_features,
    summarise_slots,
    verdict,
    without_slots,
)
from rxlm.rxt.models import RxTAlpha


def test_the_probe_finds_what_is_there_and_nothing_else() -> None:
    """Catches a probe that is wired to the wrong rows, or that sees its own test."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    labels = [n % 5 for n in range(150)]
    noise = torch.randn(150, 40, generator=generator, dtype=torch.float64)
    told = codes[labels] + 0.3 * noise
    names = [f"value {label}" for label in labels]
    assert ridge_probe(told[:100], names[:100], told[100:]) == names[100:]
    guessed = ridge_probe(noise[:100], names[:100], noise[100:])
    assert sum(a == b for a, b in zip(guessed, names[100:], strict=True)) < 25


def test_features_do_not_mix_conversations() -> None:
    """Catches a reshape over the wrong axes."""
    slots = torch.randn(2, 3, 4, 5)
    features = slot_features(slots)
    assert features["all slots"].shape == (3, 40) and features["pooled"].shape == (3, 20)
    assert torch.equal(features["all slots"][1].view(2, 4, 5).float(), slots[:, 1])
    assert torch.allclose(features["pooled"][2].view(2, 10)[:, :5].float(), slots[:, 2].mean(1))


def test_cosines_tell_collapse() -> None:
    """Catches a mean that holds each slot's cosine with itself."""
    same = torch.ones(1, 2, 3, 4)
    apart = torch.eye(4)[None, None]
    assert slot_cosines(same)[0]["mean"] == pytest.approx(1.0)
    assert slot_cosines(apart)[0] == pytest.approx({"mean": 0.0, "largest": 0.0})


def test_a_deleted_slot_takes_no_part(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches deletion by zeros, which still draws attention, and a state that is changed."""
    model = make_model()
    state = model.new_conversation(2)
    kept = without_slots(state, [1, 3])
    assert kept.slots.shape[2] == 2 and state.slots.shape[2] == 4
    assert torch.equal(kept.slots, state.slots[:, :, [0, 2]])
    assert torch.equal(without_slots(state, []).slots, state.slots)


def test_the_verdict_names_a_side() -> None:
    """Catches sides that are exchanged."""
    assert verdict(0.9, 0.3, 0.1).startswith("the read")
    assert verdict(0.12, 0.1, 0.1).startswith("the write")
    assert verdict(0.2, 0.97, 0.1).startswith("neither")
    assert verdict(0.5, 0.6, 0.1).startswith("not told")


def test_all_of_it(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches a part that a whole run leaves out, and shapes that do not fit together."""
    settings = SlotsSettings(dialogues=4, facts=2, distance=2, probe_train=12, probe_test=6)
    result = run_slots(ReactiveContestant(make_model(), 50, 4), settings, (0, 1))
    assert isinstance(result, SlotsResult)
    assert sorted({row["slot"] for row in result.deleted if row["slot"] is not None}) == [
        0,
        1,
        2,
        3,
    ]
    assert {row["features"] for row in result.probe} == {
        "all slots", "pooled", "decoder", "most frequent",
    }  # fmt: skip
    assert len(result.written) == 12 and len(result.written[0]) == 2
    names = [item["name"] for item in summarise_slots(result)]
    assert {"all_slots", "worst_slot", "cosine", "fault"} <= set(names)
