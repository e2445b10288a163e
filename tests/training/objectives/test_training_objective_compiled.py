"""Compiled layers: the loss and the gradients of the layers as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from rxlm.errors import UserError
from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.compilation import compile_layers, uncompiled
from rxlm.training.distributed.strategy import put_on_device
from rxlm.training.objectives.frozen_policy import FrozenPolicyObjective
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.settings import TrainSettings


def model_of(tiny: Any, kind: str) -> ReactiveModel:
    """Return a small model of one kind of self-attention."""
    config = tiny.model().config.model_dump(mode="json")
    for part in ("encoder", "decoder"):
        config[part] |= {"self_att_type": kind, "num_layers": 1}
    config["memory_attention"] |= {"num_layers": 1}
    torch.manual_seed(0)
    return ReactiveModel(config, tiny.tokenizer)


def sft(tiny: Any, kind: str = "mha") -> Any:
    """Return a stage that reads earlier turns and predicts answers."""
    return tiny.objective(SFTObjective, SFTSettings(turns=2, dialogues=2), model_of(tiny, kind))


def loss_and_gradients(objective: Any, step: int) -> list[Tensor]:
    """Return the loss of a step and all gradients."""
    objective.set_training_mode()
    objective.trained_modules().zero_grad()
    loss = objective.loss(objective.batch(step, 0), step).loss
    loss.backward()
    parameters = objective.trained_modules().parameters()
    return [loss.detach(), *(item.grad for item in parameters if item.grad is not None)]


def num_graphs() -> int:
    """Return how many pieces of code were translated so far."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("mha", "aot_eager"),
        # Also translated into C++, which takes a minute.
        pytest.param("mha", "inductor", marks=pytest.mark.slow),
        pytest.param("local", "aot_eager", marks=pytest.mark.slow),
        pytest.param("kda", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_compute_the_same(tiny: Any, kind: str, backend: str) -> None:
    """Catches a layer that means something else when translated, padding that is lost in it, and a
    setting that translates nothing."""
    torch._dynamo.reset()
    objective = sft(tiny, kind)
    expected = loss_and_gradients(objective, 0)
    compile_layers(objective, backend)
    before = num_graphs()
    for given, wanted in zip(loss_and_gradients(objective, 0), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    assert num_graphs() > before
    with uncompiled():
        before = num_graphs()
        objective.validate()
        assert num_graphs() == before, "a validation translates nothing"


def test_weights_keep_their_names(tiny: Any) -> None:
    """Catches checkpoints of a compiled run that an uncompiled one cannot read."""
    objective = sft(tiny)
    names = list(objective.trained_modules().state_dict())
    put_on_device(objective, TrainSettings(steps=1, compile=True), torch.device("cpu"))
    assert list(objective.trained_modules().state_dict()) == names


def test_a_stage_without_layers_refuses(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a setting that is accepted and does nothing."""
    objective = sft(tiny)
    monkeypatch.setattr(SFTObjective, "layers", FrozenPolicyObjective.layers)
    with pytest.raises(UserError, match="compile: stage sft does not offer it"):
        put_on_device(objective, TrainSettings(steps=1, compile=True), torch.device("cpu"))
