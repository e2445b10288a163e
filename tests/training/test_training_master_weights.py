"""``precision: bf16_pure``: bfloat16 weights that learn through float32 masters."""

from __future__ import annotations

import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rxlm.errors import UserError
from rxlm.training.checkpoint import find_latest
from rxlm.training.master_weights import MasterWeights
from rxlm.training.metrics import read_metrics
from rxlm.training.settings import TrainSettings

PURE: dict[str, Any] = {"precision": "bf16_pure", "accumulation": 2, "log_every": 2}


def final(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Return tensors of the newest checkpoint."""
    latest = find_latest(folder)
    assert latest is not None
    return load_file(latest / name)


def test_it_learns_as_autocast_does(toy: ModuleType, tmp_path: Path) -> None:
    """Catches masters that do not reach the weights, a gradient that is lost or counted twice,
    and weights that were never rounded."""
    losses = {}
    for precision in ("bf16", "bf16_pure"):
        objective = toy.ToyObjective(batch_size=32, dropout=0.0)
        toy.train(objective, tmp_path / precision, steps=80, lr=0.05, precision=precision)
        dtypes = {param.dtype for param in objective.model.parameters()}
        assert dtypes == {torch.bfloat16 if precision == "bf16_pure" else torch.float32}
        losses[precision] = [
            item["loss"] for item in read_metrics(tmp_path / precision / "metrics.jsonl")
        ]
    assert losses["bf16_pure"][-1] < 0.4 * losses["bf16_pure"][0]
    assert losses["bf16_pure"] == pytest.approx(losses["bf16"], rel=0.1)


def test_small_updates_add_up(toy: ModuleType, tmp_path: Path) -> None:
    """Catches an optimizer that works on the bfloat16 weights, where a step of a thousandth of a
    weight is rounded away."""
    objective = toy.ToyObjective(batch_size=32, dropout=0.0)
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    settings = {"steps": 30, "lr": 1e-5, "schedule": "constant", "weight_decay": 0.0}
    toy.train(objective, tmp_path, precision="bf16_pure", **settings)
    for name, value in final(tmp_path).items():
        assert value.dtype == torch.float32
        moved = (value - before[name]).abs()
        # AdamW moves a weight by up to the learning rate a step.
        assert 5e-5 < moved.mean() < 35e-5, name


def test_a_resumed_run_is_the_same_bit_for_bit(toy: ModuleType, tmp_path: Path) -> None:
    """Catches masters that are saved rounded, and a run that other precisions cannot go on with."""
    toy.train(toy.ToyObjective(accumulation=2), tmp_path / "whole", **PURE)
    stopped = toy.ToyObjective(accumulation=2)
    stopped.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
    assert toy.train(stopped, tmp_path / "parts", **PURE).step == 3
    rounded = final(tmp_path / "parts")
    assert any(not torch.equal(item, item.bfloat16().float()) for item in rounded.values())
    toy.train(toy.ToyObjective(accumulation=2), tmp_path / "parts", **PURE)
    for name in ("model", "train/optimizer", "train/rng"):
        one, two = (final(tmp_path / run, f"{name}.safetensors") for run in ("whole", "parts"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
        assert name == "train/rng" or {item.dtype for item in one.values()} == {torch.float32}
    other = {**PURE, "precision": "fp32", "steps": 8}
    assert toy.train(toy.ToyObjective(accumulation=2), tmp_path / "parts", **other).step == 8


def test_gradients_are_summed_in_float32() -> None:
    """Catches micro-batches added up in bfloat16, where 256 + 1 is 256."""
    module = nn.Linear(1, 1, bias=False)
    masters = MasterWeights(module)
    for value in (256.0, 1.0, 1.0):
        module.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        masters.take_gradients()
    assert module.weight.grad is None
    gradient = masters.of(module.weight).grad
    assert gradient is not None
    assert gradient.item() == 258.0


def test_marked_and_frozen_weights() -> None:
    """Catches a decay rate in bfloat16, a tied weight that is split, and a frozen weight that is
    saved rounded."""
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module[1].bias._full_precision = True
    module[2].requires_grad_(False)
    exact = {name: value.clone() for name, value in module.state_dict().items()}
    masters = MasterWeights(module)
    assert module[1].weight is module[0].weight
    assert module[1].bias.dtype == torch.float32
    assert masters.of(module[1].bias) is module[1].bias
    assert {module[0].weight.dtype, module[2].weight.dtype} == {torch.bfloat16}
    with masters.exact():
        assert all(torch.equal(value, exact[name]) for name, value in module.state_dict().items())
        module[0].weight.data.fill_(1.0 + 2**-12)
    assert torch.equal(module[0].weight, torch.ones(3, 3, dtype=torch.bfloat16))
    assert masters.of(module[0].weight)[0, 0] == 1.0 + 2**-12


def test_bad_gradients_are_named(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a search for the bad gradient among the weights, whose gradients are gone."""
    objective = toy.ToyObjective()
    objective.model[3].weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(Exception, match=r"first in '3\.weight'"):
        toy.train(objective, tmp_path, precision="bf16_pure", max_bad_steps=0)


def test_deepspeed_is_refused() -> None:
    """Catches bfloat16 weights that DeepSpeed trains without masters."""
    values = {"steps": 1, "precision": "bf16_pure", "deepspeed": "zero2.json"}
    with pytest.raises(UserError, match="bf16_pure with strategy=deepspeed"):
        TrainSettings.parse({**values, "strategy": "deepspeed"}, "train")
