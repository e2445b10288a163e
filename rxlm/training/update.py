"""One optimizer update: micro-batches, exact weighting, clipping, and the check for bad numbers.

Not here: when to update, log or save (``trainer.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.training.device import autocast, move_to_device
from rxlm.training.objective import Objective, StepOutput
from rxlm.training.settings import TrainSettings


class UpdateOutcome(NamedTuple):
    """What one update did."""

    problem: str | None
    """Why the update was skipped (weights and optimizer untouched); ``None`` = it was made."""
    metrics: dict[str, float]
    """``loss``, ``grad_norm`` (before clipping) and the objective's metrics."""
    num_targets: int
    num_tokens: int


def run_update(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    step: int,
    settings: TrainSettings,
    device: torch.device,
) -> UpdateOutcome:
    """Make one update from the micro-batches, or skip it when a number is not finite.

    Each micro-batch counts as much as it has targets: the gradient is that of the mean loss over
    all targets of the update, whatever way they are cut into micro-batches.

    Args:
        objective: gives the loss of each micro-batch.
        optimizer: its groups' learning rates are already set.
        batches: the micro-batches, on the CPU.
        step: index of the update.
        settings: precision and clipping.
        device: where the objective's modules are.
    """
    optimizer.zero_grad(set_to_none=True)
    outputs: list[StepOutput] = []
    for batch in batches:
        with autocast(device, settings.precision):
            output = objective.loss(move_to_device(batch, device), step)
        if output.num_targets > 0:
            # The number of all targets is known only after the last micro-batch; it divides the
            # gradient below.
            (output.loss * output.num_targets).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
    num_targets = sum(output.num_targets for output in outputs)
    num_tokens = sum(output.num_tokens for output in outputs)
    if num_targets == 0:
        return UpdateOutcome("no micro-batch had a target", {}, 0, num_tokens)
    parameters = [param for group in optimizer.param_groups for param in group["params"]]
    grad_norm = scale_and_clip(parameters, 1.0 / num_targets, settings.grad_clip)
    metrics = _weighted_means(outputs, grad_norm)
    problem = _find_problem(metrics, objective.trained_modules())
    if problem is None:
        optimizer.step()
    return UpdateOutcome(problem, metrics, num_targets, num_tokens)


def scale_and_clip(
    parameters: Iterable[nn.Parameter], scale: float, max_norm: float | None
) -> Tensor:
    """Multiply all gradients by ``scale``, then shrink them to ``max_norm`` if they are longer.

    Returns:
        The norm of the scaled gradient before clipping, a scalar tensor (no synchronisation).
    """
    gradients = [param.grad for param in parameters if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) * scale
    factor = torch.full_like(norm, scale)
    if max_norm is not None:
        shrink = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        # A bad norm must not spread to the good gradients: the error message looks for the bad one.
        factor = factor * torch.where(torch.isfinite(norm), shrink, 1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return norm


def _weighted_means(outputs: list[StepOutput], grad_norm: Tensor) -> dict[str, float]:
    """Return loss, gradient norm and metrics as floats, with one transfer from the device."""
    names: list[tuple[str, int]] = []
    scalars: list[Tensor] = []
    for output in outputs:
        for name, value in {**output.metrics, "loss": output.loss}.items():
            names.append((name, output.num_targets))
            tensor = torch.as_tensor(value, dtype=torch.float32, device=grad_norm.device)
            scalars.append(tensor.detach().reshape(()))
    # One transfer of everything: the check for bad numbers needs a synchronisation anyway.
    *values, norm = torch.stack([*scalars, grad_norm.float()]).tolist()
    sums: dict[str, list[float]] = {}
    for (name, weight), value in zip(names, values, strict=True):
        total = sums.setdefault(name, [0.0, 0.0])
        # A NaN metric was not measured in this micro-batch; a NaN loss is a problem.
        if name == "loss" or not math.isnan(value):
            total[0] += value * weight
            total[1] += weight
    means = {name: total / weight for name, (total, weight) in sums.items() if weight}
    return {"loss": means.pop("loss"), "grad_norm": norm, **means}


def _find_problem(metrics: dict[str, float], module: nn.Module) -> str | None:
    """Say which number is not finite; ``None`` when all are well."""
    if not math.isfinite(metrics["loss"]):
        return f"the loss is {metrics['loss']}"
    if math.isfinite(metrics["grad_norm"]):
        return None
    for name, param in module.named_parameters():
        if param.grad is not None and not torch.isfinite(param.grad).all():
            return f"the gradient norm is {metrics['grad_norm']} (first in '{name}')"
    return f"the gradient norm is {metrics['grad_norm']}"
