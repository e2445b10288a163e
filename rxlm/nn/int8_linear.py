"""A linear layer with int8 weights that quantises its input row by row, for inference on a CPU.

    y = (xq @ wq.T) * (xs * ws) + bias        xq, wq int8; products and sums in int32, exact

Weights have one scale per output channel, inputs one per row, both symmetric (W8A8 "dynamic", Wu et
al. 2020, arXiv 2004.09602). The sums are integers, so a row's result does not depend on the other
rows of its batch. Not here: which layers of a model are quantised (:mod:`rxlm.rxt.int8`).

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rxlm.errors import UserError

logger = logging.getLogger(__name__)

LARGEST = 127
"""Values are in -127 .. 127; -128 is left out, so that the range is symmetric."""
_TINIEST = 1e-30  # A row of zeros keeps a scale that can be divided by.
_EXACT_COLUMNS = 1024  # 1024 * 127 * 127 < 2**24: such a sum is an exact float32.


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` ``[M, K]`` as int8 and the scale of each row, ``[M, 1]``: x ~ int8 * scale.

    The error of an element is at most half of its row's scale, which is max|x| / 127.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_TINIEST)
    return (x * (LARGEST / largest)).round().to(torch.int8), largest / LARGEST


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T`` in int32 of int8 ``[M, K]`` and ``[N, K]``: exact on every processor.

    The plain form, which tests compare with; a copy of the weights in float32 at every call.
    """
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    for start in range(0, a.shape[1], _EXACT_COLUMNS):
        columns = slice(start, start + _EXACT_COLUMNS)
        total += (a[:, columns].float() @ b[:, columns].float().T).to(torch.int32)
    return total


def _kernel_product(a: Tensor, b: Tensor) -> Tensor:
    # Of matrices with one column, torch 2.13 returns memory that nobody has written.
    return exact_product(a, b) if a.shape[1] == 1 else torch._int_mm(a, b.T)


@functools.cache
def integer_product() -> Callable[[Tensor, Tensor], Tensor]:
    """Return what multiplies int8 matrices here: PyTorch's kernel if it is exact, else the plain
    form.

    On processors without VNNI the kernel adds pairs of products in int16, which overflows and
    says nothing: it is tried out with the largest values.
    """
    for rows in (1, 4):
        a, b = (torch.full((n, 64), LARGEST, dtype=torch.int8) for n in (rows, 64))
        if not torch.equal(_kernel_product(a, b), exact_product(a, b)):
            logger.warning(
                "this processor has no exact int8 products (no VNNI): int8 models give the same "
                "answers here, slower than in float32"
            )
            return exact_product
    return _kernel_product


class Int8Linear(nn.Module):
    """``nn.Linear`` with int8 weights; takes and gives float32 on a CPU, and is never trained."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        """Build a layer of zeros, to be loaded; :meth:`of` makes one from trained weights.

        Args:
            in_features: K.
            out_features: N.
            bias: whether a float32 bias is added.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Parameters, so that they are counted and saved as those of nn.Linear are.
        self.weight = _fixed(torch.zeros(out_features, in_features, dtype=torch.int8))
        self.scale = _fixed(torch.ones(out_features))
        self.bias = _fixed(torch.zeros(out_features)) if bias else None
        self._product = integer_product()

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Return the quantised form of ``linear``, which is not changed."""
        layer = cls.like(linear)
        weight, scale = quantize_rows(linear.weight.detach().float())
        layer.weight.copy_(weight)
        layer.scale.copy_(scale.squeeze(1))
        if layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer

    @classmethod
    def like(cls, linear: nn.Linear) -> Int8Linear:
        """Return a layer of zeros in the sizes of ``linear``."""
        return cls(linear.in_features, linear.out_features, linear.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``.

        Raises:
            UserError: for a GPU, another type than float32, or an input that needs a gradient.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu" or self.scale.dtype != torch.float32:
            raise UserError(
                f"an int8 model computes in float32 on a CPU, not in {x.dtype} on {x.device}: use "
                "the model that it was exported from."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(_NOT_TRAINED)
        rows, row_scale = quantize_rows(x.reshape(-1, self.in_features))
        y = self._product(rows, self.weight) * (row_scale * self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def dequantized(self) -> Tensor:
        """Return the weights that the layer stands for, ``[N, K]`` in float32."""
        return self.weight.float() * self.scale.unsqueeze(1)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` says of the layer."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


_NOT_TRAINED = (
    "an int8 model cannot be trained: int8 weights have no gradient. Train the model that it was "
    "exported from, then export it again."
)


def is_int8(module: nn.Module) -> bool:
    """Return whether any layer of ``module`` is an :class:`Int8Linear`."""
    return any(isinstance(part, Int8Linear) for part in module.modules())


def require_trainable(module: nn.Module) -> None:
    """Raise ``UserError`` if ``module`` has int8 weights."""
    if is_int8(module):
        raise UserError(_NOT_TRAINED)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
