"""Decayed inner products inside a chunk: exact for every gate <= 0, at two products per entry.

The chunk form of a decaying recurrence needs ``sum_c x_ic y_jc exp(G_ic - G_jc)`` for j <= i, with
G the cumulative log decay. Splitting the exponential into ``exp(G_i)`` and ``exp(-G_j)``
overflows, keeping it whole needs a C x C x K tensor, and ``G_i - G_j`` itself loses digits where
strong and weak gates meet. Here the chunk is put together from single tokens by doubling: rows
carry the decay since the start of their block, keys the decay up to the end of theirs, and each
merge of two neighbouring blocks multiplies them by the other block's total. Every factor is a
product of numbers in [0, 1]: nothing overflows, nothing cancels, and one exponential is taken per
gate. One gate for all channels of a head needs less (:func:`decay_factors`). Not for whole
sequences: the cost per token grows with the chunk.

Shapes: M chunks (of all rows and heads), C tokens of a chunk, K head dimension, R kinds of rows,
P pairs of neighbouring blocks, S tokens of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_LOG_DECAY = -1000.0
"""Decays below e to this power are zero in every floating point type."""


class DecayedPairs(NamedTuple):
    """What one chunk contributes, with every decay applied.

    Attributes:
        matrix: ``[M, R, C, C]``, the decayed inner products of rows i and keys j <= i; without
            decay between i and itself. Zero above the diagonal.
        rows: ``[M, R, C, K]``, each row decayed since before the first token: what meets the state
            that enters the chunk.
        keys: ``[M, C, K]``, each key decayed to after the last token: what stays in the state.
        total: ``[M, K or 1]``, decay of the whole chunk; None if nothing decays.
    """

    matrix: Tensor
    rows: Tensor
    keys: Tensor
    total: Tensor | None


def decayed_pairs(rows: Tensor, keys: Tensor, log_decay: Tensor | None) -> DecayedPairs:
    """Inner products of every row with the keys at or before it, decayed in between.

    Args:
        rows: ``[M, R, C, K]``; C a power of two.
        keys: ``[M, C, K]``.
        log_decay: ``[M, C, K]`` per channel or ``[M, C, 1]`` per token, natural logarithms <= 0 of
            the decay from the previous token to this one; None for no decay.

    Returns:
        See :class:`DecayedPairs`.
    """
    if log_decay is not None and log_decay.shape[-1] == keys.shape[-1]:
        return DecayedPairs(*_DecayedPairs.apply(rows, keys, log_decay))
    matrix = (rows.flatten(1, 2) @ keys.mT).unflatten(1, rows.shape[1:3])
    if log_decay is None:
        return DecayedPairs(matrix.tril(), rows, keys, None)
    between, since_start, until_end, total = decay_factors(log_decay)
    return DecayedPairs(
        matrix * between.unsqueeze(1), rows * since_start.unsqueeze(1), keys * until_end, total
    )


class DeltaPairs(NamedTuple):
    """What one chunk of the delta rule consists of, with every decay applied.

    Attributes:
        seen: ``[M, C, C]``, what each query sees of each key at or before it; zero above the
            diagonal.
        system: ``[M, C, C]``, what each token erases of each key before it. On and above the
            diagonal it may hold anything: it is the matrix of a unit lower triangular system.
        reads: ``[M, C, K]``, queries that meet the state which enters the chunk.
        erases: ``[M, C, K]``, keys that erase from that state.
        keys: ``[M, C, K]``, as of :class:`DecayedPairs`.
        total: ``[M, K or 1]``, decay of the whole chunk; None if nothing decays.
    """

    seen: Tensor
    system: Tensor
    reads: Tensor
    erases: Tensor
    keys: Tensor
    total: Tensor | None


def delta_pairs(query: Tensor, erase: Tensor, keys: Tensor, log_decay: Tensor | None) -> DeltaPairs:
    """Inner products for the delta rule: :func:`decayed_pairs` of two rows, without copies.

    Args:
        query: ``[M, C, K]``; C a power of two.
        erase: ``[M, C, K]``, keys times write strength.
        keys: ``[M, C, K]``.
        log_decay: as for :func:`decayed_pairs`.
    """
    if log_decay is not None and log_decay.shape[-1] == keys.shape[-1]:
        pairs = decayed_pairs(torch.stack([query, erase], dim=1), keys, log_decay)
        seen, system = pairs.matrix.unbind(1)
        reads, erases = pairs.rows.unbind(1)
        # The solver is slower on strided batches.
        return DeltaPairs(seen, system.contiguous(), reads, erases, pairs.keys, pairs.total)
    seen, system = query @ keys.mT, erase @ keys.mT
    if log_decay is None:
        return DeltaPairs(seen.tril(), system, query, erase, keys, None)
    between, since_start, until_end, total = decay_factors(log_decay)
    return DeltaPairs(
        seen * between,
        system * between,
        query * since_start,
        erase * since_start,
        keys * until_end,
        total,
    )


def decay_factors(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what one gate ``[M, C, 1]`` for all channels multiplies products with.

    Between two tokens ``[M, C, C]`` (zero above the diagonal), since before the first ``[M, C,
    1]``, until after the last ``[M, C, 1]``, and of the whole chunk ``[M, 1]``; for any C.

    There is one C x C matrix for all channels, so it is made whole, of differences of sums. They
    are sums in double precision: there, what cancels where strong and weak gates meet is far
    below a digit of the result.
    """
    sums = log_decay.double().clamp(min=LEAST_LOG_DECAY).cumsum(1)
    between = _Between.apply(sums, log_decay.dtype)
    last = sums[:, -1:]
    since_start = sums.to(log_decay.dtype).exp()
    until_end = (last - sums).to(log_decay.dtype).exp()
    return between, since_start, until_end, since_start[:, -1]


class _Between(torch.autograd.Function):
    """``exp(sums_i - sums_j)`` for j <= i, zero elsewhere, with few tensors of this size."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, dtype: torch.dtype) -> Tensor:
        # Above the diagonal differences are positive: zero before they are exponents, and after.
        between = (sums - sums.mT).to(dtype).tril_().exp_().tril_()
        ctx.save_for_backward(between)
        return between

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_between: Tensor) -> tuple[Tensor, None]:
        (between,) = ctx.saved_tensors
        grad = grad_between * between
        grad_sums = grad.sum(2, dtype=torch.float64) - grad.sum(1, dtype=torch.float64)
        return grad_sums.unsqueeze(-1), None


class _DecayedPairs(torch.autograd.Function):
    """Doubling with in-place updates; the backward pass recomputes instead of storing levels."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, keys: Tensor, log_decay: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, keys, log_decay)
        decay = log_decay.exp()
        matrix = rows.new_zeros(*rows.shape[:3], keys.shape[1])
        matrix.diagonal(dim1=-2, dim2=-1).copy_((rows * keys.unsqueeze(1)).sum(-1))
        rows, keys, total = rows * decay.unsqueeze(1), keys.clone(), decay
        size = 1
        while size < keys.shape[1]:
            later_rows, earlier_keys = _later_rows(rows, size), _earlier_keys(keys, size)
            earlier, later = total.unflatten(1, (-1, 2)).unbind(2)
            cross = later_rows @ earlier_keys.mT.unsqueeze(1)
            _below_diagonal(matrix, size).copy_(cross.movedim(2, -1))
            later_rows.mul_(earlier[:, None, :, None])
            earlier_keys.mul_(later[:, :, None])
            total = earlier * later
            size *= 2
        return matrix, rows, keys, total.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_matrix: Tensor, grad_rows: Tensor, grad_keys: Tensor, grad_total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        first_rows, first_keys, log_decay = ctx.saved_tensors
        decay = log_decay.exp()
        last_keys = first_keys.clone()
        levels, last_total = _recompute(first_rows * decay.unsqueeze(1), last_keys, decay)
        # The chunk's end: where the keys are decayed to, and what `total` decays.
        grad_end = (grad_keys * last_keys).sum(1, keepdim=True) + (grad_total * last_total)[:, None]
        grad_rows = grad_rows.clone(memory_format=torch.contiguous_format)
        grad_keys = grad_keys.clone(memory_format=torch.contiguous_format)
        grad_matrix = grad_matrix.contiguous()
        for size, later_rows, earlier_keys, total in reversed(levels):
            earlier, later = total.unflatten(1, (-1, 2)).unbind(2)
            grad_cross = _below_diagonal(grad_matrix, size).movedim(-1, 2).contiguous()
            grad_later, grad_earlier = _later_rows(grad_rows, size), _earlier_keys(grad_keys, size)
            grad_later.mul_(earlier[:, None, :, None]).add_(grad_cross @ earlier_keys.unsqueeze(1))
            grad_earlier.mul_(later[:, :, None]).add_((grad_cross.mT @ later_rows).sum(1))
        grad_rows.mul_(decay.unsqueeze(1))
        # Every result is a product of a row or key and decays exp(G_i) or exp(-G_j), so the
        # gradient of G is that of the factor beside it, times the factor; that of a single gate is
        # the sum from its token on. The diagonal, which nothing decays, is added afterwards.
        grad_sums = (grad_rows * first_rows).sum(1).sub_(grad_keys * first_keys)
        grad_gates = grad_end + grad_sums.flip(1).cumsum(1).flip(1)
        grad_diagonal = grad_matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        grad_keys.add_((grad_diagonal * first_rows).sum(1))
        grad_rows.add_(grad_diagonal * first_keys.unsqueeze(1))
        return grad_rows, grad_keys, grad_gates


def _recompute(
    rows: Tensor, keys: Tensor, total: Tensor
) -> tuple[list[tuple[int, Tensor, Tensor, Tensor]], Tensor]:
    """Return, for each level, the block size and the operands before the level changes them.

    And the decay of the whole chunk ``[M, K or 1]``; rows and keys are left as after all levels.
    """
    levels = []
    size = 1
    while size < keys.shape[1]:
        later_rows, earlier_keys = _later_rows(rows, size), _earlier_keys(keys, size)
        levels.append((size, later_rows.clone(), earlier_keys.clone(), total))
        earlier, later = total.unflatten(1, (-1, 2)).unbind(2)
        later_rows.mul_(earlier[:, None, :, None])
        earlier_keys.mul_(later[:, :, None])
        total = earlier * later
        size *= 2
    return levels, total.squeeze(1)


def _later_rows(rows: Tensor, size: int) -> Tensor:
    """View of ``[M, R, C, K]`` with the second block of each pair: ``[M, R, P, S, K]``."""
    return rows.unflatten(2, (-1, 2, size))[:, :, :, 1]


def _earlier_keys(keys: Tensor, size: int) -> Tensor:
    """View of ``[M, C, K]`` with the first block of each pair: ``[M, P, S, K]``."""
    return keys.unflatten(1, (-1, 2, size))[:, :, 0]


def _below_diagonal(matrix: Tensor, size: int) -> Tensor:
    """View of ``[M, R, C, C]``: the block under the diagonal of each pair, ``[M, R, S, S, P]``."""
    blocks = matrix.unflatten(3, (-1, 2, size)).unflatten(2, (-1, 2, size))
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4)
