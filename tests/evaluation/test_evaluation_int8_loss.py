"""What the check of an int8 model says of equal models, and of one that is broken."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rxlm.evaluation.int8_loss import Int8LossSettings, int8_table, measure_int8_loss
from rxlm.nn.int8_linear import Int8Linear
from rxlm.rxt.int8 import quantize_int8
from rxlm.rxt.models import RxTAlpha

FEW = Int8LossSettings(dialogues=3, turns=2, distances=(1,), questions=3, max_answer_tokens=8)


def test_the_check_tells_a_broken_model_from_a_good_one(
    make_model: Callable[..., RxTAlpha],
) -> None:
    """Catches a check that compares a model with itself, and so passes whatever was lost."""
    model = make_model(seq_len=120)
    itself = measure_int8_loss(model, model, FEW)
    assert itself.before == itself.after and itself.agreeing_tokens == itself.same_answers == 1.0
    assert itself.tokens > 0 and (itself.answers, itself.questions) == (3, 3)
    good = quantize_int8(model)
    near = measure_int8_loss(model, good, FEW)
    for layer in good.modules():
        if isinstance(layer, Int8Linear):
            layer.weight.data = layer.weight.data.flip(0)
    broken = measure_int8_loss(model, good, FEW)

    def lost(found: object) -> float:
        return abs(found.after.perplexity / found.before.perplexity - 1)  # type: ignore[attr-defined]

    assert 0 < lost(near) < 0.02 < lost(broken)
    assert broken.agreeing_tokens < near.agreeing_tokens
    table = int8_table(near, 1000, 610)
    assert table.rows[0] == ("bytes of weights", "1,000", "610", "0.61 x")
    assert torch.is_grad_enabled()
