"""Masked grouped attention against softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxlm.ops.attention import attend, visible_keys


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention in float64 with explicit loops over rows and heads (the oracle)."""
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    count = max(heads, groups)
    output = torch.zeros(batch, length, count, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(count):
            q = query[b, :, h * heads // count].double()
            k, v = (x[b, :, h * groups // count].double() for x in (key, value))
            scores = q @ k.T / width**0.5
            if mask is not None:
                full = mask.expand(batch, 1, length, key.shape[1])[b, 0]
                scores = scores.masked_fill(~full, float("-inf"))
            weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
            output[b, :, h] = weights @ v
    return output


@given(
    length=st.integers(1, 7),
    keys=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (2, 4), (1, 4)]),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_match_softmax_written_out(
    length: int, keys: int, heads: tuple[int, int], causal: bool, padded: bool, seed: int
) -> None:
    """Wrong head grouping, scale, causal offset or padding would show in outputs or gradients."""
    keys = max(length, keys)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, length, heads[0], 6, generator=generator, requires_grad=True)
    key = torch.randn(2, keys, heads[1], 6, generator=generator, requires_grad=True)
    value = torch.randn(2, keys, heads[1], 6, generator=generator, requires_grad=True)
    key_mask = torch.rand(2, keys, generator=generator) < 0.6 if padded else None
    mask = visible_keys(key_mask, length, keys, causal=causal, device=query.device)
    actual = attend(query, key, value, mask)
    expected = written_out(query, key, value, mask)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(actual.shape, generator=generator)
    inputs = (query, key, value)
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    oracle = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(gradients, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blind_queries_get_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    """A query that sees no key is NaN in some kernels and poisons every parameter's gradient."""
    query = torch.randn(1, 3, 2, 4, dtype=dtype, requires_grad=True)
    key = torch.randn(1, 5, 2, 4, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[:, :, 1] = False
    output = attend(query, key, key, mask)
    assert output[:, 1].abs().max() == 0
    output.sum().backward()
    assert query.grad is not None and torch.isfinite(query.grad).all()
    assert query.grad[:, 1].abs().max() == 0


def test_decode_step_sees_what_the_full_forward_sees() -> None:
    """An off-by-one of the causal triangle with a cache lets a step see too much or too little."""
    full = visible_keys(None, 5, 5, causal=True, device=torch.device("cpu"))
    step = visible_keys(None, 2, 5, causal=True, device=torch.device("cpu"))
    assert full is not None and step is not None
    assert torch.equal(full[:, :, 3:], step)
    assert visible_keys(None, 1, 5, causal=True, device=torch.device("cpu")) is None


def test_head_counts_that_do_not_divide_are_refused() -> None:
    """Broadcasting would otherwise pair heads arbitrarily."""
    with pytest.raises(ValueError, match="3 query heads and 2 key/value heads"):
        attend(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))
