"""Inputs of mean 0 and variance 1, in torch alone: the formula of sklearn's ``StandardScaler``.

For series and tables (per feature) and images (per channel). Embeddings of a trained model need
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxlm.errors import UserError


@dataclass(frozen=True)
class StandardScaler:
    """Mean and standard deviation of training data, as a value.

    Attributes:
        mean: broadcasts over the data.
        scale: the same shape; population standard deviation, 1 where the data does not vary.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor, dims: Sequence[int] | None = None) -> StandardScaler:
        """Measure.

        Args:
            x: floating point, any shape.
            dims: averaged dimensions. None: all but the last, so one mean per feature. Images
                ``[B, C, H, W]`` per channel: ``(0, 2, 3)``.

        Raises:
            UserError: without numbers, or with some that are not finite.
        """
        if not x.is_floating_point() or not x.numel() or not bool(x.isfinite().all()):
            raise UserError(
                f"StandardScaler: data of type {x.dtype} and shape {list(x.shape)} must be finite "
                "floating point numbers, at least one: drop or fill missing values first."
            )
        averaged = tuple(range(x.ndim - 1)) if dims is None else tuple(dims)
        exact = x.double()
        mean = exact.mean(averaged, keepdim=True) if averaged else exact
        variance = (exact - mean).square()
        variance = variance.mean(averaged, keepdim=True) if averaged else variance
        # Rounding makes constant data vary a little; sklearn has the same bound.
        count, eps = x.numel() // mean.numel(), torch.finfo(x.dtype).eps
        constant = variance <= count * eps * variance + (count * mean * eps).square()
        scale = variance.sqrt().masked_fill(constant, 1.0)
        return cls(mean.to(x.dtype), scale.to(x.dtype))

    def transform(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / scale``."""
        return (x - self.mean) / self.scale

    def inverse_transform(self, x: Tensor) -> Tensor:
        """Return ``x * scale + mean``."""
        return x * self.scale + self.mean
