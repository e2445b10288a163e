"""Decayed inner products and their hand-written gradient against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxlm.ops.linear_attention.decay import decayed_pairs


def make_inputs(num_tokens: int, channels: int, decays: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[2, 2, C, K]``, keys ``[2, C, K]``, gates ``[2, C, decays]``, with gradients."""
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(2, 2, num_tokens, channels, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, num_tokens, channels, generator=generator, dtype=torch.float64)
    gates = -2 * torch.rand(2, num_tokens, decays, generator=generator, dtype=torch.float64)
    return rows.requires_grad_(), keys.requires_grad_(), gates.requires_grad_()


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 16])
@pytest.mark.parametrize("decays", [1, 3])
def test_all_results_equal_the_formula(num_tokens: int, decays: int) -> None:
    """A block decayed once too often or not at all would show."""
    rows, keys, gates = make_inputs(num_tokens, 3, decays)
    summed = gates.cumsum(1).expand(-1, -1, 3)
    between = (summed[:, :, None] - summed[:, None]).exp()  # [M, C, C, K]
    matrix = torch.einsum("mric,mjc,mijc->mrij", rows, keys, between).tril()
    pairs = decayed_pairs(rows, keys, gates)
    assert pairs.total is not None
    for actual, expected in (
        (pairs.matrix, matrix),
        (pairs.rows, rows * summed.exp().unsqueeze(1)),
        (pairs.keys, keys * (summed[:, -1:] - summed).exp()),
        (pairs.total.expand(-1, 3), summed[:, -1].exp()),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_gates_nothing_decays() -> None:
    """Entries above the diagonal, or a total that later code would multiply by, would show."""
    rows, keys, _ = make_inputs(4, 3, 3)
    pairs = decayed_pairs(rows, keys, None)
    torch.testing.assert_close(pairs.matrix, torch.einsum("mric,mjc->mrij", rows, keys).tril())
    assert pairs.total is None


@pytest.mark.parametrize("num_tokens", [1, 2, 8])
@pytest.mark.parametrize("decays", [1, 3])
def test_the_written_gradient_equals_finite_differences(num_tokens: int, decays: int) -> None:
    """A missing or doubled term of the hand-written backward pass would show."""
    inputs = make_inputs(num_tokens, 3, decays)
    assert torch.autograd.gradcheck(lambda *x: tuple(decayed_pairs(*x)), inputs)


def test_inputs_and_incoming_gradients_are_left_alone() -> None:
    """In-place work on a caller's tensor would change results far away from here."""
    inputs = make_inputs(8, 3, 3)
    copies = [tensor.detach().clone() for tensor in inputs]
    pairs = decayed_pairs(*inputs)
    incoming = [torch.ones_like(tensor) for tensor in pairs if tensor is not None]
    torch.autograd.grad([x for x in pairs if x is not None], inputs, incoming)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert all(bool((gradient == 1).all()) for gradient in incoming)
