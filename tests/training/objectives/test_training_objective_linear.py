"""Stages train models with linear self-attention: gradients arrive, the loss falls.

Not here: what the stages compute (test_training_objective_memory_aware), whether such models learn
to remember (benchmarks).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings

LAYOUTS: dict[str, dict[str, Any]] = {
    **{
        kind: {"use_linear_self_attn": True, "linear_attn_type": kind}
        for kind in ("gla", "deltanet", "gated_deltanet", "kda")
    },
    "md_gdn": {"use_linear_self_attn": True, "linear_attn_type": "md_gdn"},
    "md_gdn concat": {
        "use_linear_self_attn": True,
        "linear_attn_type": "md_gdn",
        "memory_fusion_mode": "concat",
    },
    "hybrid md_gdn": {"self_att_type": "hybrid", "attn_layer_types": ["md_gdn", "mha"]},
    "hybrid": {"self_att_type": "hybrid", "attn_layer_types": ["mha", "gated_deltanet"]},
}


def linear_model(tiny: Any, fields: dict[str, Any]) -> ReactiveModel:
    config = tiny.model().config.model_dump(mode="json")
    for part in ("encoder", "decoder"):
        config[part] |= {"linear_attn_use_short_conv": True, **fields}
    torch.manual_seed(0)
    return ReactiveModel(config, tiny.tokenizer)


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_aware_training_moves_every_weight(tiny: Any, fields: dict[str, Any]) -> None:
    """Catches a type that cannot be differentiated through a window of turns, a weight that no
    gradient reaches, and updates that do not lower the loss."""
    model = linear_model(tiny, fields)
    settings = MemoryAwareSettings(phases=(Phase(turns=3, dialogues=2),), validation_dialogues=2)
    objective = tiny.objective(MemoryAwareObjective, settings, model)
    optimizer = torch.optim.AdamW(objective.trained_modules().parameters(), lr=2e-3)
    batch = objective.batch(0, 0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses = []
    for step in range(3):
        loss = objective.loss(batch, step).loss
        losses.append(float(loss.detach()))
        if step < 2:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    for part in (model.encoder.layers, model.decoder.layers):
        for name, weight in part.named_parameters():
            assert weight.grad is not None and torch.isfinite(weight.grad).all(), name
    same = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert not {name for name in same if "layers" in name and "self_attention" in name}
