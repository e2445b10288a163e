"""Positive feature maps: kernels ``phi(q) . phi(k)`` that stand in for ``exp(q . k)``.

A kernel that factorises turns attention into sums over the past, which is what makes it linear
(:mod:`rxlm.ops.feature_map_attention`). A new map is one more entry of ``FEATURE_MAPS``.

Not here: maps with learned weights, and the attention itself.

Shapes: K head dimension before the map, F after it, C tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rxlm.errors import UserError


@dataclass(frozen=True)
class FeatureMap:
    """One kernel.

    Attributes:
        name: as users write it.
        size: K to F.
        features: ``[..., K]`` to ``[..., F]``.
        kernel: queries and keys ``[..., C, K]`` to ``[..., C, C]``, equal to the product of their
            features but computed without them; None where that would not be cheaper.
    """

    name: str
    size: Callable[[int], int]
    features: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor, Tensor], Tensor] | None = None


def elu_features(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1`` (Katharopoulos et al., arXiv:2006.16236, equation 7).

    That is ``x + 1`` for x > 0 and ``exp(x)`` below, which is what is computed here: adding 1 to
    ``exp(x) - 1`` would lose every digit of small features.

    Args:
        x: ``[..., K]``.

    Returns:
        ``[..., K]``, positive.
    """
    return torch.relu(x) + x.clamp(max=0).exp()


def taylor_features(x: Tensor) -> Tensor:
    """Return features whose product is ``1 + s + s^2 / 2`` with ``s = q . k / sqrt(K)``.

    The second-order Taylor series of exp (Based, arXiv:2402.18668, section 3.2). It is never below
    1/2, so that the weights of attention are positive. The products ``x_i x_j`` are stored once
    for i < j, with weight sqrt(2): 153 features for K = 16 instead of 273.

    Args:
        x: ``[..., K]``.

    Returns:
        ``[..., 1 + K + K (K + 1) / 2]``: 1, the entries, then the products in the order
        (0, 0), (0, 1) ... (1, 1) ...; all scaled.
    """
    width = x.shape[-1]
    x = x * width**-0.25
    # The diagonal is halved in the kernel: its factor goes into one of the two factors.
    halved = x * math.sqrt(0.5)
    parts = [torch.ones_like(x[..., :1]), x]
    for index in range(width):
        left = x[..., index : index + 1]
        parts.append(left * halved[..., index : index + 1])
        parts.append(left * x[..., index + 1 :])
    return torch.cat(parts, dim=-1)


def taylor_kernel(query: Tensor, key: Tensor) -> Tensor:
    """Return ``1 + s + s^2 / 2`` of all pairs, in K instead of F multiplications each.

    Args:
        query: ``[..., C, K]``.
        key: ``[..., C, K]``.

    Returns:
        ``[..., C, C]``, queries in rows.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return torch.addcmul(1 + scores, scores, scores, value=0.5)


def taylor_size(width: int) -> int:
    """Return F for a head dimension K."""
    return 1 + width + width * (width + 1) // 2


FEATURE_MAPS: dict[str, FeatureMap] = {
    one.name: one
    for one in (
        FeatureMap("elu", lambda width: width, elu_features),
        FeatureMap("taylor", taylor_size, taylor_features, taylor_kernel),
    )
}
"""Name -> feature map."""


def get_feature_map(name: str) -> FeatureMap:
    """Return the feature map of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in FEATURE_MAPS:
        raise UserError(
            f"feature map {name!r} does not exist: use one of {', '.join(FEATURE_MAPS)}."
        )
    return FEATURE_MAPS[name]
