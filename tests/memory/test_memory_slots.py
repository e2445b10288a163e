"""The memory that conversations start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxlm.memory.slots import InitialMemory

DRAWN = ("normal", "standard", "uniform")


def initial_of(init_type: Any, num_slots: int = 3, dim: int = 4) -> InitialMemory:
    """Return the initial memory of two layers."""
    return InitialMemory(2, num_slots, dim, init_type=init_type, std=0.1)


@pytest.mark.parametrize("init_type", ["learned", "zeros", "ones", *DRAWN])
def test_shape_and_purity(init_type: str) -> None:
    """Catches another axis order, and draws from the global generator: a conversation's start
    would then depend on what ran before, and change what runs after."""
    initial = initial_of(init_type)
    before = torch.get_rng_state()
    slots = initial(5, seed=7)
    assert slots.shape == (2, 5, 3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(initial(5, seed=7), slots)


def test_learned_start_is_the_same_for_every_row_and_is_trained_by_all() -> None:
    """Catches a start that is copied (no gradient), redrawn, or decayed towards zero."""
    initial = initial_of("learned")
    slots = initial(3, seed=1)
    assert torch.equal(slots[:, 0], initial.start) and torch.equal(slots[:, 2], initial.start)
    assert torch.equal(initial(3, seed=2), slots)
    slots.sum().backward()
    assert initial.start.grad is not None
    assert torch.equal(initial.start.grad, torch.full_like(initial.start, 3.0))
    assert getattr(initial.start, "_no_weight_decay", False)
    assert 0.05 < initial.start.std().item() < 0.2


def test_constants() -> None:
    """Catches zeros and ones swapped, or filled with noise."""
    assert torch.equal(initial_of("zeros")(2), torch.zeros(2, 2, 3, 4))
    assert torch.equal(initial_of("ones")(2), torch.ones(2, 2, 3, 4))
    assert list(initial_of("zeros").parameters()) == []


@pytest.mark.parametrize("init_type", DRAWN)
def test_a_seed_means_a_start(init_type: str) -> None:
    """Catches rows that are alike or depend on their place: row b of a batch must start like the
    single conversation with seed + b."""
    initial = initial_of(init_type)
    batch = initial(3, seed=5)
    for row in range(3):
        assert torch.equal(batch[:, row : row + 1], initial(1, seed=5 + row))
    assert not torch.equal(batch[:, 0], batch[:, 1])
    assert not torch.equal(batch[0, 0], batch[1, 0])
    assert list(initial.parameters()) == []


def test_sizes_of_the_drawn_kinds() -> None:
    """Catches a standard deviation or range off by a factor."""
    normal, standard, uniform = (initial_of(kind, 200, 50)(1) for kind in DRAWN)
    assert abs(normal.std().item() - 0.01) < 2e-4 and abs(normal.mean().item()) < 1e-3
    assert abs(standard.std().item() - 1.0) < 2e-2 and abs(standard.mean().item()) < 3e-2
    assert 0.0 <= uniform.min().item() < 1e-4 and 0.0099 < uniform.max().item() <= 0.01
    assert abs(uniform.mean().item() - 0.005) < 1e-4


@pytest.mark.parametrize("init_type", ["zeros", "ones", *DRAWN])
def test_device_and_dtype(init_type: str) -> None:
    """Catches a start on the CPU or in fp32 for a model that lives elsewhere."""
    slots = initial_of(init_type)(2, device="meta", dtype=torch.bfloat16)
    assert slots.device.type == "meta" and slots.dtype == torch.bfloat16
    rounded = initial_of(init_type)(2, dtype=torch.bfloat16)
    assert torch.equal(rounded, initial_of(init_type)(2).bfloat16())


def test_learned_start_follows_the_module() -> None:
    """Catches a learned start that stays in fp32 when the model is converted."""
    assert initial_of("learned").bfloat16()(2).dtype == torch.bfloat16
