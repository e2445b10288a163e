"""Memory as gate: how much of an output comes from linear attention, and how that changes.

    o = (1 - mu) * softmax + mu * linear  [+ (1 - mu) * softmax * mu * linear, the cross gate]

The gate is in the state dict, whatever its kind (arXiv:2506.17671, section 3.4).

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rxlm.errors import UserError

GateMode = Literal["constant", "learnable", "dynamic"]


class MemoryAsGate(nn.Module):
    """mu: a number that a schedule sets, a learned one, or a learned function of the token."""

    mu: Tensor

    def __init__(self, mu: float = 0.5, mode: GateMode = "constant", dim: int | None = None):
        """Make a gate.

        Args:
            mu: from 0 to 1; strictly between where it is learned.
            mode: ``constant`` (see :meth:`set_mu`), ``learnable`` (one logit), or ``dynamic`` (a
                linear function of each token, then sigmoid; starts at ``mu`` for every token).
            dim: D, for ``dynamic``.

        Raises:
            UserError: for another mode or mu.
        """
        super().__init__()
        if mode not in ("constant", "learnable", "dynamic"):
            raise UserError(
                f"memory gate mode={mode!r} does not exist: use constant, learnable or dynamic."
            )
        self.mode = mode
        if mode == "constant":
            self.register_buffer("mu", torch.tensor(_checked(mu)))
            return
        if not 0 < mu < 1:
            raise UserError(
                f"mu={mu} cannot be learned: the sigmoid of a {mode} gate lies strictly between 0 "
                "and 1. Start in between, such as 0.01, or use a constant gate."
            )
        logit = torch.tensor(mu).logit()
        if mode == "learnable":
            self.mu_logit = nn.Parameter(logit)
            return
        if dim is None:
            raise UserError("a dynamic memory gate needs dim, the width of the tokens.")
        self.project = nn.Linear(dim, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.constant_(self.project.bias, float(logit))

    def forward(self, x: Tensor) -> Tensor:
        """Return mu for the tokens ``[B, T, D]``: a number, or ``[B, T, 1]`` if dynamic."""
        if self.mode == "constant":
            return self.mu.to(x.dtype)
        if self.mode == "learnable":
            return self.mu_logit.sigmoid().to(x.dtype)
        logits: Tensor = self.project(x.to(self.project.weight.dtype))
        return logits.sigmoid().to(x.dtype)

    def set_mu(self, mu: float) -> None:
        """Set a constant gate.

        Raises:
            UserError: for a learned gate, or a number that is not between 0 and 1.
        """
        if self.mode != "constant":
            raise UserError(f"the memory gate is {self.mode}: its mu is learned, not set.")
        self.mu.fill_(_checked(mu))


def mix(softmax: Tensor, linear: Tensor, mu: Tensor, *, cross_gate: bool = False) -> Tensor:
    """Mix two outputs ``[B, T, D]``; mu = 0 gives ``softmax`` to the last bit."""
    softmax, linear = (1 - mu) * softmax, mu * linear
    mixed = softmax + linear
    return mixed + softmax * linear if cross_gate else mixed


@dataclass(frozen=True)
class MuSchedule:
    """mu as a function of the training step.

    Attributes:
        kind: ``constant`` (``final``), ``gradual`` (a line from ``initial`` to ``final``, then
            ``final``), ``cyclic`` (``values`` one after the other), or ``switch`` (``initial`` and
            ``final`` by turns).
        initial: mu at step 0.
        final: mu in the end.
        steps: length of the line.
        values: of ``cyclic``.
        period: steps that ``cyclic`` and ``switch`` stay at one number.
    """

    kind: Literal["constant", "gradual", "cyclic", "switch"] = "gradual"
    initial: float = 0.0
    final: float = 0.5
    steps: int = 100
    values: tuple[float, ...] = (0.0, 0.5)
    period: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "gradual", "cyclic", "switch"):
            raise UserError(
                f"mu schedule {self.kind!r} does not exist: use constant, gradual, cyclic or "
                "switch."
            )
        for mu in (self.initial, self.final, *self.values):
            _checked(mu)
        if self.steps < 1 or self.period < 1 or not self.values:
            raise UserError(
                f"mu schedule: steps={self.steps}, period={self.period} and the number of "
                f"values={len(self.values)} must be positive."
            )

    def at(self, step: int) -> float:
        """Return mu at a step, from 0."""
        if self.kind == "constant":
            return self.final
        if self.kind == "gradual":
            return self.initial + (self.final - self.initial) * min(step / self.steps, 1.0)
        if self.kind == "cyclic":
            return self.values[step // self.period % len(self.values)]
        return (self.initial, self.final)[step // self.period % 2]


def set_mu(model: nn.Module, mu: float) -> int:
    """Set every memory gate of a model.

    Args:
        model: with constant gates.
        mu: from 0 to 1.

    Returns:
        How many were set.

    Raises:
        UserError: if there are none, or one is learned.
    """
    gates = [module for module in model.modules() if isinstance(module, MemoryAsGate)]
    if not gates:
        raise UserError("the model has no memory gates: put them in with inject_linear_attention.")
    for gate in gates:
        gate.set_mu(mu)
    return len(gates)


def _checked(mu: float) -> float:
    if not 0 <= mu <= 1:
        raise UserError(f"mu={mu} must lie between 0 (softmax) and 1 (linear).")
    return float(mu)
