"""Gradient checkpointing and bfloat16 with every type of self-attention, in the unroll over turns.

Not here: how much memory it saves (benchmarks/training_memory.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rxlm.rxt.components
import rxlm.rxt.unroll
from rxlm.errors import UserError
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.rxt.layers import ReactiveLayer
from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)

KINDS = ("softmax", "gla", "deltanet", "gated_deltanet", "kda", "md_gdn")
DROPOUT = {"ff_dropout": 0.2, "att_dropout": 0.2}


def model_of(tiny: Any, kind: str, **fields: Any) -> ReactiveModel:
    config = tiny.model().config.model_dump(mode="json")
    linear = {
        "use_linear_self_attn": True,
        "linear_attn_type": kind,
        "linear_attn_use_short_conv": True,
    }
    for part in ("encoder", "decoder"):
        config[part] |= {**({} if kind == "softmax" else linear), **fields}
    config["memory_attention"]["att_dropout"] = fields.get("att_dropout", 0.0)
    torch.manual_seed(0)
    return ReactiveModel(config, tiny.tokenizer)


def memory_aware(tiny: Any, model: ReactiveModel) -> Any:
    settings = MemoryAwareSettings(phases=(Phase(turns=3, dialogues=2),), validation_dialogues=2)
    return tiny.objective(MemoryAwareObjective, settings, model)


def loss_and_gradients(objective: Any) -> list[Tensor]:
    torch.manual_seed(1)
    objective.set_training_mode()
    objective.trained_modules().zero_grad()
    loss = objective.loss(objective.batch(0, 0), 0).loss
    loss.backward()
    parameters = objective.trained_modules().parameters()
    return [loss.detach(), *(item.grad for item in parameters if item.grad is not None)]


def count_blocks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record what is checkpointed."""
    blocks: list[object] = []
    for module in (rxlm.rxt.components, rxlm.rxt.unroll):
        real = module.recompute

        def recorded(function: Any, *arguments: Any, _real: Any = real, **keywords: Any) -> Any:
            blocks.append(function)
            return _real(function, *arguments, **keywords)

        monkeypatch.setattr(module, "recompute", recorded)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(
    tiny: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches other dropout in the second forward pass, an input that the recomputation does not
    see (padding, memory, the carried state), and a setting that reaches no layer or turn."""
    blocks = count_blocks(monkeypatch)
    objective = memory_aware(tiny, model_of(tiny, kind, **DROPOUT))
    expected = loss_and_gradients(objective)
    assert not blocks
    for layers, turns in ((True, False), (False, True), (True, True)):
        objective.set_gradient_checkpointing(layers=layers, turns=turns)
        blocks.clear()
        given = loss_and_gradients(objective)
        assert len(given) == len(expected)
        assert all(torch.equal(one, two) for one, two in zip(expected, given, strict=True))
        owners = [getattr(block, "__self__", block) for block in blocks]
        is_layer = [isinstance(owner, ReactiveLayer) for owner in owners]
        assert (any(is_layer), not all(is_layer)) == (layers, turns)


def test_memory_pretraining_is_checkpointed_too(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stage that forgets to pass the setting on to its scan."""
    blocks = count_blocks(monkeypatch)
    model = model_of(tiny, "softmax", **DROPOUT)
    settings = MemoryPretrainingSettings(turns=3, dialogues=2)
    objective = tiny.objective(MemoryPretrainingObjective, settings, model)
    expected = loss_and_gradients(objective)
    objective.set_gradient_checkpointing(layers=False, turns=True)
    given = loss_and_gradients(objective)
    assert blocks
    assert all(torch.equal(one, two) for one, two in zip(expected, given, strict=True))


def test_a_setting_without_effect_is_reported(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a silent setting: joint LM of a model that carries no state has no turns."""
    objective = tiny.objective(JointLMObjective, JointLMSettings(turns=2, dialogues=2))
    objective.set_gradient_checkpointing(layers=True, turns=True)
    assert "no effect" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32(tiny: Any, kind: str) -> None:
    """Catches a product of mixed types, a tensor that is not cast on one path, a recurrence in
    bfloat16 (whose error grows with the turns), and weights that lose their precision."""
    objective = memory_aware(tiny, model_of(tiny, kind))
    exact = loss_and_gradients(objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = loss_and_gradients(objective)
    assert all(item.dtype == torch.float32 for item in rough)
    torch.testing.assert_close(rough[0], exact[0], rtol=0.01, atol=0.0)
    one, two = (torch.cat([item.flatten() for item in parts[1:]]) for parts in (exact, rough))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.set_gradient_checkpointing(layers=True, turns=True)
        again = loss_and_gradients(objective)
    assert all(torch.equal(one, two) for one, two in zip(rough, again, strict=True))


@pytest.mark.parametrize("mechanism", KINDS[1:-1])
def test_states_and_gates_stay_float32(mechanism: str) -> None:
    """Catches autocast that reaches the gates (a decay of 0.999 is 1.0 in bfloat16) or the state
    that is carried over a whole conversation."""
    layer = LinearSelfAttention(LinearAttentionSettings(mechanism, 12, 2, 4, 4))
    x = torch.randn(2, 70, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = layer.gates(x)
        y, cache = layer(x)
    assert y.dtype == torch.bfloat16
    assert cache is not None and cache.state.dtype == torch.float32
    assert {gate.dtype for gate in gates if gate is not None} == {torch.float32}


def test_a_stage_that_cannot_says_so(tiny: Any) -> None:
    """Catches a stage of one's own for which the setting would silently do nothing."""
    from rxlm.training.objective import Objective

    with pytest.raises(UserError, match="gradient_checkpointing"):
        Objective.set_gradient_checkpointing(
            memory_aware(tiny, tiny.model()), layers=True, turns=False
        )
