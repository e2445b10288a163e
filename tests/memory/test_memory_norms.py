"""Memory norms by themselves. Shapes: L = 2 layers, B = 2, S = 4 slots, D = 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxlm.memory.norms import MemoryNorm


def norm_of(norm_type: Any, *, share: float | None = 40.0, **fields: Any) -> MemoryNorm:
    """Return a norm; ``share`` 40 is the full norm, -40 the identity, None the configured mix."""
    if share is not None:
        fields["init_gate"] = share
    return MemoryNorm(2, 4, 8, norm_type=norm_type, **fields)


def slots_of(size: float = 1.0, seed: int = 0) -> Tensor:
    """Return slots ``[2, 2, 4, 8]`` with entries of about ``size``."""
    return torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(seed)) * size


def rms(slots: Tensor) -> Tensor:
    """Return the root mean square over the width."""
    return slots.square().mean(dim=-1).sqrt()


@pytest.mark.parametrize("size", [0.1, 1.0, 1e3, 1e6])
def test_full_norm_has_size_one(norm_type: str, size: float) -> None:
    """Catches norms that do not normalise (two of the reference's do not): whatever the size of
    the slots, the result has rms one (the adaptive norm: of slots that are equally large)."""
    slots = slots_of(size)
    if norm_type == "adaptive":
        slots = slots.sign() * size
    normed = norm_of(norm_type)(slots)
    torch.testing.assert_close(rms(normed), torch.ones(2, 2, 4), atol=1e-3, rtol=0)


def test_layer_norm_centres() -> None:
    """Catches 'layer' and 'rms' being the same function."""
    slots = slots_of() + 3.0
    assert norm_of("layer")(slots).mean(dim=-1).abs().max() < 1e-5
    assert norm_of("rms")(slots).mean(dim=-1).abs().min() > 0.1


def test_adaptive_mixes_the_mean_over_slots_with_the_slots_own_size() -> None:
    """Catches the decay read the wrong way round, and a mean over the batch."""
    slots = slots_of()
    slots[:, :, 0] *= 10.0
    squares = slots.square().mean(dim=-1, keepdim=True)
    expected = slots / (0.75 * squares.mean(dim=2, keepdim=True) + 0.25 * squares).sqrt()
    torch.testing.assert_close(norm_of("adaptive", decay=0.75)(slots), expected, atol=1e-4, rtol=0)
    assert (rms(expected)[:, :, 0] > rms(expected)[:, :, 1:].amax(dim=2)).all()


@pytest.mark.parametrize("mixed", ["rms", "layer", "adaptive", "positional"])
def test_gate_mixes_norm_and_input(mixed: str) -> None:
    """Catches a gate that scales only, or whose ends are swapped; -2 is mostly the input."""
    slots = slots_of(5.0)
    torch.testing.assert_close(norm_of(mixed, share=-40.0)(slots), slots)
    full = norm_of(mixed)(slots)
    weight = torch.sigmoid(torch.tensor(-2.0))
    expected = weight * full + (1 - weight) * slots
    torch.testing.assert_close(norm_of(mixed, share=None)(slots), expected)


def test_classic_rms_is_pytorchs_rms_norm() -> None:
    """Catches another epsilon, axis or scale than the norm it is named after."""
    norm, theirs = norm_of("classic-rms", eps=1e-2), nn.RMSNorm(8, eps=1e-2)
    nn.init.normal_(theirs.weight)
    with torch.no_grad():
        norm.scale.copy_(theirs.weight.expand_as(norm.scale))
    torch.testing.assert_close(norm(slots_of()), theirs(slots_of()))


@pytest.mark.parametrize("per_dim", [False, True])
def test_what_is_learned(norm_type: str, per_dim: bool) -> None:
    """Catches scales of another granularity than documented, weight decay on them (stacking makes
    them look like matrices), and state kept between calls."""
    norm = norm_of(norm_type, share=None, per_dim_scale=per_dim)
    width = 8 if per_dim or norm_type in ("classic-rms", "layer") else 1
    per_slot = 4 if norm_type == "positional" else 1
    shapes = {"scale": (2, 1, per_slot, width)}
    if norm_type != "classic-rms":
        shapes["gate"] = (2, 1, per_slot, 1)
    assert {name: tuple(p.shape) for name, p in norm.named_parameters()} == shapes
    assert all(getattr(parameter, "_no_weight_decay", False) for parameter in norm.parameters())
    first = norm(slots_of())
    norm(slots_of(100.0, seed=1))
    assert torch.equal(norm(slots_of()), first)
    assert list(norm.buffers()) == []


def test_bf16_is_rounded_once(norm_type: str) -> None:
    """Catches arithmetic in bf16, which loses digits at every step, and a result in another dtype
    than the slots: what comes out is the exact result, rounded at the end."""
    slots = slots_of(300.0).bfloat16()
    norm = norm_of(norm_type, share=None)
    exact = norm(slots.float())
    assert torch.equal(norm.bfloat16()(slots), exact.bfloat16())
