"""One update: exact accumulation, clipping, parameter groups, optimizer state, bad numbers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from rxlm.errors import UserError
from rxlm.training.device import move_to_device, resolve_device
from rxlm.training.distributed.strategy import Strategy, scale_and_clip
from rxlm.training.optim import (
    build_optimizer,
    decay_groups,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from rxlm.training.settings import TrainSettings
from rxlm.training.update import UpdateOutcome, run_update

CPU = torch.device("cpu")


def updates(objective: Any, num_steps: int, **values: Any) -> list[UpdateOutcome]:
    settings = TrainSettings(steps=num_steps, lr=0.01, **values)
    optimizer = build_optimizer(objective.model, objective.parameter_groups(settings), settings)
    outcomes = []
    for step in range(num_steps):
        batches = [objective.batch(step, micro) for micro in range(settings.accumulation)]
        outcomes.append(
            run_update(Strategy(objective, optimizer, settings, CPU), batches, step, CPU)
        )
    return outcomes


def test_four_times_sixteen_is_once_sixtyfour(toy: ModuleType) -> None:
    """Catches micro-batches that count equally although their numbers of targets differ."""
    whole = toy.ToyObjective(batch_size=64, dropout=0.0)
    parts = toy.ToyObjective(batch_size=16, accumulation=4, dropout=0.0)
    counts = {int(parts.batch(0, micro)["is_target"].sum()) for micro in range(4)}
    assert len(counts) > 1, "the test needs unequal target counts"
    one = updates(whole, 3)
    four = updates(parts, 3, accumulation=4)
    for left, right in zip(one, four, strict=True):
        assert (left.num_targets, left.num_tokens) == (right.num_targets, right.num_tokens)
        assert right.metrics["loss"] == pytest.approx(left.metrics["loss"], rel=1e-5)
        assert right.metrics["grad_norm"] == pytest.approx(left.metrics["grad_norm"], rel=1e-5)
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_without_targets_changes_nothing(toy: ModuleType) -> None:
    """Catches a division by zero targets, and an empty micro-batch that dilutes the gradient."""
    settings = TrainSettings(steps=1)
    results = []
    for extra in (0, 1):
        objective = toy.ToyObjective(dropout=0.0)
        optimizer = build_optimizer(objective.model, objective.parameter_groups(settings), settings)
        empty = {"inputs": torch.ones(2, 3), "is_target": torch.zeros(2, dtype=torch.bool)}
        batches = [objective.batch(0, 0)] + [empty] * extra
        results.append(run_update(Strategy(objective, optimizer, settings, CPU), batches, 0, CPU))
        results.append(objective.model[0].weight.detach().clone())
    assert results[0].metrics == results[2].metrics
    assert torch.equal(results[1], results[3])
    nothing = run_update(Strategy(objective, optimizer, settings, CPU), [empty], 0, CPU)
    assert nothing.problem == "no micro-batch had a target"


def test_unmeasured_metrics_are_left_out(toy: ModuleType) -> None:
    """Catches a NaN metric of one micro-batch that spoils the mean or stops the update."""
    (outcome,) = updates(toy.ToyObjective(), 1)
    assert outcome.problem is None
    assert set(outcome.metrics) == {"loss", "grad_norm", "error"}


def test_clipping_limits_the_scaled_gradient() -> None:
    """Catches clipping before the division by the targets, or a reported norm after clipping."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    norm = scale_and_clip([parameter], 0.1, None)
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([3.0, 4.0]))
    norm = scale_and_clip([parameter], 1.0, 1.0)
    assert float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_bad_numbers_leave_weights_and_optimizer_alone(toy: ModuleType) -> None:
    """Catches an update made with a NaN loss or an infinite gradient."""
    objective = toy.ToyObjective()
    objective.bad_steps = {0}
    before = [param.detach().clone() for param in objective.model.parameters()]
    (outcome,) = updates(objective, 1)
    assert outcome.problem == "the loss is nan"
    after = list(objective.model.parameters())
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))

    objective = toy.ToyObjective()
    objective.model[3].weight.register_hook(lambda grad: grad * torch.inf)
    (outcome,) = updates(objective, 1)
    assert outcome.problem is not None
    assert "'3.weight'" in outcome.problem


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(toy: ModuleType) -> None:
    """Catches a precision setting without effect, or one that casts the weights themselves."""
    objective = toy.ToyObjective(dropout=0.0)
    seen: list[torch.dtype] = []
    objective.model[3].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    updates(objective, 1, precision="bf16")
    assert seen == [torch.bfloat16]
    assert {param.dtype for param in objective.model.parameters()} == {torch.float32}


def test_decay_goes_to_matrices_only() -> None:
    """Catches decayed norms and biases, an ignored flag, and a frozen parameter in a group."""
    module = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    module[2].weight._no_weight_decay = True
    module[3].requires_grad_(False)
    decays, others = decay_groups(module, 0.1)
    assert decays["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [id(param) for param in decays["params"]] == [id(module[0].weight)]
    expected = [module[1].weight, module[1].bias, module[2].weight, module[2].bias]
    assert [id(param) for param in others["params"]] == [id(param) for param in expected]
    with pytest.raises(UserError, match="frozen"):
        decay_groups(module.requires_grad_(False), 0.1)


def test_groups_must_cover_every_parameter_once() -> None:
    """Catches a parameter forgotten by an objective's own groups, or optimised twice."""
    module, settings = nn.Linear(2, 2), TrainSettings(steps=1)
    for params in ([module.weight], [module.weight, module.bias, module.bias]):
        with pytest.raises(ValueError, match="exactly once"):
            build_optimizer(module, [{"params": params}], settings)


def test_lr_scale_multiplies_the_schedule() -> None:
    """Catches a group scale that the schedule overwrites."""
    module = nn.Linear(2, 2)
    groups = [{"params": [module.weight], "lr_scale": 0.1}, {"params": [module.bias]}]
    optimizer = build_optimizer(module, groups, TrainSettings(steps=1))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])


def test_optimizer_state_round_trip(toy: ModuleType) -> None:
    """Catches moments that are lost, or given to another parameter, on their way through a file."""
    settings = TrainSettings(steps=4)
    objective = toy.ToyObjective(dropout=0.0)
    groups = objective.parameter_groups(settings)
    optimizer = build_optimizer(objective.model, groups, settings)
    for step in range(3):
        run_update(
            Strategy(objective, optimizer, settings, CPU), [objective.batch(step, 0)], step, CPU
        )
    saved = {
        key: value.clone() for key, value in optimizer_tensors(objective.model, optimizer).items()
    }
    assert {"0.weight/exp_avg", "0.weight/exp_avg_sq", "3.bias/step"} <= set(saved)

    twin = toy.ToyObjective(dropout=0.0)
    twin.model.load_state_dict(objective.model.state_dict())
    # Another order of the groups: names, not positions, decide what belongs where.
    restored = build_optimizer(twin.model, twin.parameter_groups(settings)[::-1], settings)
    load_optimizer_tensors(twin.model, restored, saved)
    loaded = optimizer_tensors(twin.model, restored)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    run_update(Strategy(objective, optimizer, settings, CPU), [objective.batch(3, 0)], 3, CPU)
    run_update(Strategy(twin, restored, settings, CPU), [twin.batch(3, 0)], 3, CPU)
    pairs = zip(objective.model.parameters(), twin.model.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)

    other = toy.ToyObjective(width=9)
    wrong = build_optimizer(other.model, other.parameter_groups(settings), settings)
    with pytest.raises(UserError, match=r"0\.weight/exp_avg has shape"):
        load_optimizer_tensors(other.model, wrong, saved)


def test_devices_and_batches() -> None:
    """Catches an unknown device that ends in a traceback, and a container that loses its type."""
    assert resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="device='tpu9'"):
        resolve_device("tpu9")
    with pytest.raises(UserError, match="cuda:99"):
        resolve_device("cuda:99")
    outcome = UpdateOutcome(None, {"a": torch.ones(2)}, 3, 4)
    moved = move_to_device([outcome, (torch.ones(1), "text")], torch.device("meta"))
    assert isinstance(moved[0], UpdateOutcome)
    assert moved[0].metrics["a"].device.type == "meta"
    assert (moved[1][0].device.type, moved[1][1]) == ("meta", "text")
