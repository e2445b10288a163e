"""Choice of the normalisation over the width. Shapes: D width."""

from __future__ import annotations

from torch import nn


def make_norm(dim: int, *, rms: bool, eps: float) -> nn.Module:
    """Return RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last axis of width ``dim``."""
    return nn.RMSNorm(dim, eps=eps) if rms else nn.LayerNorm(dim, eps=eps)
