"""The blocked solver against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlm.ops.linear_attention.triangular import solve_unit_lower


@given(st.integers(0, 7), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_solution_and_gradients_equal_torchs(
    power: int, systems: int, columns: int, seed: int
) -> None:
    """Catches blocks that are merged in a wrong place, and gradients above the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    size = 2**power
    system = torch.randn(systems, size, size, generator=generator, dtype=torch.float64) / size
    right = torch.randn(systems, size, columns, generator=generator, dtype=torch.float64)
    wanted = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    inputs = [(system.clone().requires_grad_(), right.clone().requires_grad_()) for _ in range(2)]
    found = solve_unit_lower(*inputs[0])
    expected = torch.linalg.solve_triangular(*inputs[1], upper=False, unitriangular=True)
    torch.testing.assert_close(found, expected)
    for solution in (found, expected):
        (solution * wanted).sum().backward()
    for mine, theirs in zip(*inputs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_what_is_above_the_diagonal_is_not_read() -> None:
    """Catches a diagonal that is taken for something other than ones."""
    system = torch.randn(2, 64, 64, dtype=torch.float64).tril(-1) / 8
    right = torch.randn(2, 64, 3, dtype=torch.float64)
    other = system + torch.full_like(system, 1e30).triu()
    assert torch.equal(solve_unit_lower(other, right), solve_unit_lower(system, right))


@pytest.mark.parametrize(("strength", "bound"), [(1.0, 1e-6), (2.0, 5e-5)])
def test_equal_keys_keep_their_digits(strength: float, bound: float) -> None:
    """Catches an inverse by a power series: with the same key 64 times it loses all digits."""
    keys = torch.nn.functional.normalize(torch.ones(4, 64, 8) + 0.02 * torch.randn(4, 64, 8), dim=2)
    system, right = strength * keys @ keys.mT, torch.randn(4, 64, 5)
    exact = torch.linalg.solve_triangular(
        system.double(), right.double(), upper=False, unitriangular=True
    )
    error = (solve_unit_lower(system, right).double() - exact).abs().max() / exact.abs().max()
    assert error <= bound
