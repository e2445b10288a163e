"""One matrix product a group: rows sorted by group, each multiplied by the matrix of its group.

Four ways to the same numbers; which one runs is chosen by :func:`grouped_backend` and named, never
silently replaced. Not here: who sorts, and what the groups are (:mod:`rxlm.nn.moe`).

Shapes: M rows, E groups, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GroupedBackend = Literal["segments", "gather", "grouped_mm"]
"""``segments``: a matrix product for every group that has rows. ``gather``: every row brings a copy
of its matrix; static shapes, no transfer from the device, made for few rows. ``grouped_mm``: one
kernel of PyTorch for all groups."""

_FEW_ROWS = 64


def grouped_backend(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], *, kernel: bool
) -> GroupedBackend:
    """Return the fastest way that is available.

    Args:
        device: where the rows are.
        dtype: in which the products are computed.
        sizes: M, E, I, O.
        kernel: whether PyTorch's grouped kernel may be used.
    """
    rows, groups, inputs, outputs = sizes
    if device.type == "meta" or (device.type == "cuda" and rows <= min(groups, _FEW_ROWS)):
        return "gather"
    # The kernel takes bfloat16 whose rows are multiples of 16 bytes.
    aligned = dtype == torch.bfloat16 and inputs % 8 == 0 and outputs % 8 == 0
    if kernel and device.type == "cuda" and aligned and hasattr(F, "grouped_mm"):
        return "grouped_mm"
    return "segments"


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of ``x`` are computed: autocast's, or its own."""
    # There is no autocast on the meta device, not even to ask for.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, backend: GroupedBackend) -> Tensor:
    """Multiply each row by the transposed matrix of its group.

    Args:
        x: ``[M, I]``, the rows of group 0 first, then those of group 1, and so on.
        weight: ``[E, O, I]``.
        counts: int64 ``[E]``, rows of each group; they sum to M.
        backend: see :data:`GroupedBackend`.

    Returns:
        ``[M, O]``.
    """
    if backend == "gather":
        groups = torch.arange(len(counts), device=x.device)
        group = groups.repeat_interleave(counts, output_size=len(x))
        return torch.bmm(weight[group], x[:, :, None]).squeeze(-1)
    if backend == "grouped_mm":
        dtype = product_dtype(x)
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(-2, -1), offs=ends)
    dtype = product_dtype(x)
    output: Tensor = _Segments.apply(x.to(dtype), weight.to(dtype), counts.tolist())
    return output


class _Segments(torch.autograd.Function):
    """One product a group, written into its rows of one result; so are the gradients.

    Written by hand because automatic gradients of many slices cost more than the products: those
    of the matrices would be made one by one and copied together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        output = x.new_empty(len(x), weight.shape[1])
        for group, rows in _spans(sizes):
            torch.mm(x[rows], weight[group].t(), out=output[rows])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if for_weight is not None:
            for group, size in enumerate(ctx.sizes):
                if not size:
                    for_weight[group].zero_()
        for group, rows in _spans(ctx.sizes):
            if for_x is not None:
                torch.mm(gradient[rows], weight[group], out=for_x[rows])
            if for_weight is not None:
                torch.mm(gradient[rows].t(), x[rows], out=for_weight[group])
        return for_x, for_weight, None


def _spans(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    """Return the groups that have rows, and which rows."""
    start = 0
    for group, size in enumerate(sizes):
        if size:
            yield group, slice(start, start + size)
        start += size
