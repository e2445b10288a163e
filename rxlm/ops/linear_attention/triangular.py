"""Unit lower triangular systems, by substitution in blocks.

Libraries solve many small systems one after the other, a row at a time. Here the inverse of the
whole is put together from those of its halves,

    [ A   ]^-1   [  A^-1               ]
    [ B  D]    = [ -D^-1 B A^-1   D^-1 ],

down to blocks of 16 that a library substitutes in: products of matrices do the rest, and the
backward pass needs no second solve. It is substitution, not a power series: what cancels there
(float32 loses every digit when keys repeat) is never summed up here.

Shapes: M systems, C unknowns each, X right-hand sides, P pairs of neighbouring blocks, S rows of a
block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 16
"""Rows of the blocks that are inverted row by row."""


def solve_unit_lower(system: Tensor, right: Tensor) -> Tensor:
    """Solve ``(I + strictly lower part of system) x = right``.

    Args:
        system: ``[M, C, C]``, C a power of two; what is on and above the diagonal is not read.
        right: ``[M, C, X]``.

    Returns:
        ``[M, C, X]``.
    """
    solution: Tensor = _Solve.apply(system, right)
    return solution


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:
        inverse = _inverse(system)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_solution: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solution = ctx.saved_tensors
        grad_right = inverse.mT @ grad_solution
        return (grad_right @ solution.mT).tril_(-1).neg_(), grad_right


def _inverse(system: Tensor) -> Tensor:
    """Return the inverse of the unit lower triangular matrices ``[M, C, C]``."""
    batch, length, _ = system.shape
    size = min(BLOCK, length)
    blocks = system.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    identity = torch.eye(size, dtype=system.dtype, device=system.device)
    inverse = torch.linalg.solve_triangular(
        blocks.reshape(-1, size, size),
        identity.expand(batch * length // size, size, size),
        upper=False,
        unitriangular=True,
    ).unflatten(0, (batch, -1))
    while size < length:
        earlier, later = inverse.unflatten(1, (-1, 2)).unbind(2)
        below = system.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))[:, :, 1, :, :, 0]
        below = below.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        # [M, P, 2 S, 2 S] of [M, P, S, S]
        inverse = inverse.new_zeros(*earlier.shape[:2], 2 * size, 2 * size)
        inverse[..., :size, :size] = earlier
        inverse[..., size:, size:] = later
        torch.neg(later @ below @ earlier, out=inverse[..., size:, :size])
        size *= 2
    return inverse.squeeze(1)
