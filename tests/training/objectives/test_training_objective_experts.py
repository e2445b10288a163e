"""Stages on models with mixtures of experts and layers without memory: the balance in the loss.

Not here: the balance itself (tests/nn/test_nn_moe).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.nn.expert_routing import record_routing
from rxlm.nn.moe import MixtureOfExperts
from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.sft import SFTObjective, SFTSettings

EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "shared_expert_dim": 8,
    "stateless_layers_config": ["dense"], "dense_layer_dim": 24,
}  # fmt: skip
PHASES = (Phase(turns=3, dialogues=2),)
STAGES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "joint_lm": (JointLMObjective, JointLMSettings, {"turns": 3, "dialogues": 2}),
    "sft": (SFTObjective, SFTSettings, {"turns": 3, "dialogues": 2}),
    "memory_aware": (MemoryAwareObjective, MemoryAwareSettings, {"phases": PHASES}),
}


def objective_of(tiny: Any, stage: str, fields: dict[str, Any] = EXPERTS, **settings: Any) -> Any:
    config = tiny.model().config.model_dump(mode="json")
    config["decoder"] |= {**fields, "final_stateless_layers_config": ["moe"]}
    config["encoder"] |= fields
    torch.manual_seed(0)
    cls, kind, defaults = STAGES[stage]
    model = ReactiveModel(config, tiny.tokenizer)
    return tiny.objective(cls, kind(**{**defaults, **settings}), model)


def loss_and_gradients(objective: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(1)
    objective.set_training_mode()
    objective.trained_modules().zero_grad()
    output = objective.loss(objective.batch(0, 0), 0)
    output.loss.backward()
    named = objective.trained_modules().named_parameters()
    return output, {name: item.grad for name, item in named if item.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_balance_joins_the_loss_as_a_value(tiny: Any, stage: str) -> None:
    """Catches a stage whose experts are not balanced, a weight that is not read, statistics that
    stay behind in the model, and usage that nobody reports."""
    losses, gradients = [], []
    for scale in (0.0, 0.5):
        objective = objective_of(tiny, stage, moe_aux_loss_scale=scale)
        with record_routing() as outside:
            output, gradient = loss_and_gradients(objective)
        assert not outside.entries
        losses.append(output.loss.item())
        gradients.append(gradient)
        again, _ = loss_and_gradients(objective)
        assert torch.equal(again.loss, output.loss)
    balance = float(output.metrics["expert_balance"])
    assert losses[1] - losses[0] == pytest.approx(0.5 * balance, rel=1e-4)
    assert (
        0 < float(output.metrics["expert_usage"]) <= 1 <= float(output.metrics["expert_max_load"])
    )
    routers = [name for name in gradients[0] if name.endswith("router.weight")]
    # Two layers each, and the decoder's last one.
    assert len(routers) == 5
    for name in routers:
        assert not torch.allclose(gradients[0][name], gradients[1][name])


def test_dense_models_are_left_alone(tiny: Any) -> None:
    """Catches metrics of experts, or a changed loss, where there are none."""
    objective = tiny.objective(JointLMObjective, JointLMSettings(turns=2, dialogues=2))
    output, _ = loss_and_gradients(objective)
    assert not any("expert" in name for name in output.metrics)


@pytest.mark.parametrize("stage", STAGES)
def test_buckets_and_padding_do_not_count(tiny: Any, stage: str) -> None:
    """Catches padding in the statistics of experts: other buckets, other padding, same loss."""
    losses = [
        loss_and_gradients(objective_of(tiny, stage, num_buckets=count))[0].loss.item()
        for count in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "md_gdn"])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_checkpointing_changes_no_bit(tiny: Any, kind: str, balance: str) -> None:
    """Catches statistics that are lost or counted twice where layers and turns are recomputed, and
    layers without memory that checkpointing forgets."""
    fields = {**EXPERTS, "ff_dropout": 0.2, "moe_balance": balance}
    if kind != "softmax":
        fields |= {"use_linear_self_attn": True, "linear_attn_type": kind}
    objective = objective_of(tiny, "memory_aware", fields, moe_aux_loss_scale=0.5)
    expected, wanted = loss_and_gradients(objective)
    for layers, turns in ((True, False), (False, True), (True, True)):
        objective.set_gradient_checkpointing(layers=layers, turns=turns)
        given, gradients = loss_and_gradients(objective)
        assert torch.equal(given.loss, expected.loss)
        assert gradients.keys() == wanted.keys()
        assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
        for name, value in expected.metrics.items():
            torch.testing.assert_close(given.metrics[name], value, rtol=0, atol=0)
    assert any(name.endswith("router.offset") for name in wanted) == (balance == "bias")


def test_biases_of_experts_do_not_decay(tiny: Any) -> None:
    """Catches weight decay on stacked biases and offsets, which pulls experts together."""
    from rxlm.training.optim import decay_groups

    fields = {**EXPERTS, "moe_bias_mode": "local", "moe_balance": "both"}
    model = objective_of(tiny, "joint_lm", fields).model
    decaying = {id(item) for item in decay_groups(model, 0.1)[0]["params"]}
    for part in model.modules():
        if isinstance(part, MixtureOfExperts):
            assert id(part.experts.up) in decaying and id(part.experts.down) in decaying
            assert id(part.experts.up_bias) not in decaying
            assert id(part.experts.down_bias) not in decaying
            assert id(part.router.offset) not in decaying
