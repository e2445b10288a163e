"""One optimizer update: micro-batches, exact weighting, clipping, and the check for bad numbers.

Not here: when to update, log or save (``loop.py``), and how processes share the work
(:mod:`rxlm.training.distributed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.training.device import move_to_device
from rxlm.training.distributed.strategy import Strategy
from rxlm.training.objective import StepOutput

Sums = dict[str, tuple[float, float]]
"""Metric -> (sum of value * weight, sum of weights)."""


class UpdateOutcome(NamedTuple):
    """What one update did."""

    problem: str | None
    """Why the update was skipped (weights and optimizer untouched); ``None`` = it was made."""
    metrics: dict[str, float]
    """``loss``, ``grad_norm`` (before clipping) and the objective's metrics."""
    num_targets: int
    num_tokens: int


def run_update(
    strategy: Strategy, batches: Iterable[Any], step: int, device: torch.device
) -> UpdateOutcome:
    """Make one update from the micro-batches, or skip it when a number is not finite.

    Each micro-batch counts as much as it has targets: the gradient is that of the mean loss over
    all targets of the update, whatever way they are cut into micro-batches and processes.

    Args:
        strategy: the learning rates of its optimizer are already set.
        batches: the micro-batches of this process, on the CPU.
        step: index of the update.
        device: where the objective's modules are.

    Returns:
        the same in every process.
    """
    world = strategy.world
    own = list(batches)
    strategy.begin_update(own)
    outputs: list[StepOutput] = []
    for index, batch in enumerate(own):
        is_last = index == len(own) - 1
        output = strategy.compute(move_to_device(batch, device), step, is_last=is_last)
        outputs.append(output._replace(loss=output.loss.detach()))
    own_counts = (
        sum(output.num_targets for output in outputs),
        sum(output.num_tokens for output in outputs),
    )
    num_targets, num_tokens = map(sum, zip(*world.gather(own_counts), strict=True))
    if num_targets == 0:
        return UpdateOutcome("no micro-batch had a target", {}, 0, num_tokens)
    strategy.drop_gradients(strategy.objective.left_out(step))
    grad_norm = strategy.finish_gradient(num_targets)
    sums, norm = _weighted_sums([item for item in outputs if item.num_targets], grad_norm)
    means = _means(world.gather(sums))
    metrics = {"loss": means.pop("loss"), "grad_norm": norm, **means}
    problem = _find_problem(metrics, strategy)
    if problem is None:
        strategy.step()
    return UpdateOutcome(problem, metrics, num_targets, num_tokens)


def _weighted_sums(outputs: list[StepOutput], grad_norm: Tensor) -> tuple[Sums, float]:
    """Return sums of loss and metrics, and the gradient norm, with one transfer from the device."""
    names: list[tuple[str, float]] = []
    scalars: list[Tensor] = []
    for output in outputs:
        for name, value in {**output.metrics, "loss": output.loss}.items():
            names.append((name, output.weights.get(name, output.num_targets)))
            tensor = torch.as_tensor(value, dtype=torch.float32, device=grad_norm.device)
            scalars.append(tensor.detach().reshape(()))
    # One transfer of everything: the check for bad numbers needs a synchronisation anyway.
    *values, norm = torch.stack([*scalars, grad_norm.float()]).tolist()
    sums: Sums = {}
    for (name, weight), value in zip(names, values, strict=True):
        # A NaN metric was not measured in this micro-batch; a NaN loss is a problem.
        if name == "loss" or not math.isnan(value):
            total, weights = sums.get(name, (0.0, 0.0))
            sums[name] = (total + value * weight, weights + weight)
    return sums, norm


def _means(parts: list[Sums]) -> dict[str, float]:
    """Return the weighted means over all processes."""
    sums: Sums = {}
    for part in parts:
        for name, (total, weight) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + weight)
    return {name: total / weight for name, (total, weight) in sums.items() if weight}


def _find_problem(metrics: dict[str, float], strategy: Strategy) -> str | None:
    """Say which number is not finite; ``None`` when all are well."""
    if not math.isfinite(metrics["loss"]):
        return f"the loss is {metrics['loss']}"
    if math.isfinite(metrics["grad_norm"]):
        return None
    for name, gradient in strategy.gradients().items():
        if not torch.isfinite(gradient).all():
            return f"the gradient norm is {metrics['grad_norm']} (first in '{name}')"
    return f"the gradient norm is {metrics['grad_norm']}"
