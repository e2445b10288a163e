"""Weights in bfloat16 that learn in float32: ``precision: bf16_pure``.

Every weight of the trained module is rounded to bfloat16, and a float32 *master* of it is kept. The
optimizer works on the masters; after each step the bfloat16 weights are rounded from them anew, so
updates that are too small for bfloat16 (8 bits of mantissa) add up instead of being lost.

Layers mark what must stay float32 (decay rates, gates and norms of the memory, routers) with
``_full_precision``; those parameters are their own masters.

Checkpoints hold the masters, so a run may go on in any other precision, and nothing is lost between
stages. Not here: which products autocast computes in bfloat16 (``device.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_NUMBERS = 1 << 23
"""Numbers that one message between processes carries at most (32 MB of float32)."""


class MasterWeights:
    """The float32 masters of a module whose weights become bfloat16."""

    def __init__(self, module: nn.Module) -> None:
        """Round the weights of ``module`` in place; it must be on its device already.

        Masters of frozen weights are kept on the CPU: they are needed only to be saved.
        """
        self._parameters = [
            param
            for param in module.parameters()
            if param.dtype == torch.float32 and not getattr(param, "_full_precision", False)
        ]
        self._masters: dict[int, Tensor] = {}
        for param in self._parameters:
            master = param.detach()
            self._masters[id(param)] = master if param.requires_grad else master.cpu()
            param.data = master.to(torch.bfloat16)

    def of(self, param: Tensor) -> Tensor:
        """Return what the optimizer changes in the place of a parameter."""
        return self._masters.get(id(param), param)

    def kept_on(self, device_type: str) -> list[Tensor]:
        """Return the masters that are kept beside the weights on a device (``cpu``, ``cuda``)."""
        return [item for item in self._masters.values() if item.device.type == device_type]

    def take_gradients(self) -> None:
        """Add the gradients of the weights to those of the masters, in float32, and drop them."""
        for param in self._parameters:
            if param.grad is not None:
                master, gradient = self.of(param), param.grad
                if master.grad is None:
                    master.grad = gradient.float()
                else:
                    master.grad += gradient
                param.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Make the weights those of the masters, rounded; after each step of the optimizer."""
        trained = [param for param in self._parameters if param.requires_grad]
        for param in trained:
            param.copy_(self.of(param))

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Let the module hold the masters themselves for the time of a block.

        Inside, weights can be saved without loss, and loaded: what is in the masters afterwards
        counts.
        """
        rounded = [param.data for param in self._parameters]
        for param in self._parameters:
            param.data = self.of(param)
        try:
            yield
        finally:
            for param, weight in zip(self._parameters, rounded, strict=True):
                weight.copy_(param.data)
                param.data = weight


def broadcast(tensors: list[Tensor]) -> None:
    """Give every process the values of process 0."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def mean_gradients(parameters: list[Tensor], has_gradient: list[list[bool]], size: int) -> None:
    """Average the gradients over the processes, in float32.

    Args:
        parameters: in the same order everywhere.
        has_gradient: of each process, which parameters have one. Where one process has a gradient
            another's missing one counts as zero; where none has, none is made.
        size: number of processes.
    """
    used = [
        param
        for param, flags in zip(parameters, zip(*has_gradient, strict=True), strict=True)
        if any(flags)
    ]
    for param in used:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    for bucket in _buckets([param.grad for param in used if param.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= size
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    count = 0
    for tensor in tensors:
        if bucket and count + tensor.numel() > _BUCKET_NUMBERS:
            yield bucket
            bucket, count = [], 0
        bucket.append(tensor)
        count += tensor.numel()
    if bucket:
        yield bucket
