"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864); interleaved pairs unless said.

Angles are always computed and applied in fp32: in bf16 the angles of positions above 256 lose
whole radians and distinct positions alias.

Shapes: B batch, T tokens, H heads, K head dimension (even).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_phases(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the unit complex phases ``exp(i * position * base**(-2j/K))``.

    Args:
        positions: token positions, integer or float, ``[..., T]``.
        head_dim: K, even.
        base: the wavelength base of eq. 15.

    Returns:
        complex64 ``[..., T, K/2]``.

    Raises:
        ValueError: if ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary embedding rotates pairs: use even.")
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-exponents / head_dim)
    angles = positions.to(torch.float32)[..., None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x: Tensor, phases: Tensor) -> Tensor:
    """Rotate the pairs ``(x[2j], x[2j+1])`` of every head.

    Args:
        x: queries or keys ``[B, T, H, K]``.
        phases: from :func:`rotary_phases`, ``[T, K/2]`` or ``[B, T, K/2]``; or their real and
            imaginary parts, ``[..., K/2, 2]`` (compilers make no kernels for complex numbers).

    Returns:
        the rotated tensor, same shape and dtype as ``x``.
    """
    # Float64 stays: gradients of float64 models are checked numerically.
    exact = x if x.dtype == torch.float64 else x.float()
    if not phases.is_complex():
        even, odd = exact.unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = phases.unsqueeze(-3).unbind(-1)
        turned = (even * cosine - odd * sine, even * sine + odd * cosine)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(exact.reshape(*x.shape[:-1], x.shape[-1] // 2, 2))
    rotated = torch.view_as_real(pairs * phases.unsqueeze(-2))
    return rotated.reshape(x.shape).to(x.dtype)


def token_positions(key_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Number the real tokens of each row, so that padding on either side moves nothing.

    Args:
        key_mask: ``[B, T]`` bool, True at real tokens; None = all are real.
        length: T.
        device: where to count.

    Returns:
        positions ``[T]`` without a mask, else ``[B, T]`` (padded tokens repeat a neighbour's).
    """
    if key_mask is None:
        return torch.arange(length, device=device)
    return (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def rotate_halves(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate the pairs ``(x[j], x[j + K/2])``, the other layout of the same embedding.

    Angles are computed in float64 (a position of 100,000 is exact in float32, its angle is not),
    the rotation in float32 or float64.

    Args:
        x: queries or keys ``[..., T, K]``, K even.
        positions: ``[T]``, or broadcastable to ``[..., T]``.
        base: the wavelength base of eq. 15.

    Returns:
        the rotated tensor, same shape and dtype as ``x``.
    """
    width = x.shape[-1]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
    angles = positions.to(x.device, torch.float64)[..., None] * base**-exponents
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(x.dtype)
