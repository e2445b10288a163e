"""The int8 layer beside its plain form, its error bound, and what it refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rxlm.nn.int8_linear as int8
from rxlm.errors import UserError
from rxlm.nn.int8_linear import (
    Int8Linear,
    exact_product,
    integer_product,
    is_int8,
    quantize_rows,
    require_trainable,
)


@given(
    st.integers(1, 9), st.integers(1, 300), st.integers(1, 70), st.sampled_from(["max", "draws"])
)
def test_products_are_exact(rows: int, inputs: int, outputs: int, kind: str) -> None:
    """Catches sums that overflow or are rounded, and a kernel that writes nothing (one input)."""
    if kind == "max":
        a, b = (torch.full((n, inputs), 127, dtype=torch.int8) for n in (rows, outputs))
    else:
        a, b = (torch.randint(-127, 128, (n, inputs), dtype=torch.int8) for n in (rows, outputs))
    expected = a.long() @ b.long().T
    assert torch.equal(integer_product()(a, b).long(), expected)
    assert torch.equal(exact_product(a, b).long(), expected)


def test_the_plain_form_is_exact_for_wide_layers() -> None:
    """Catches float32 sums beyond 2**24."""
    a = torch.full((1, 5001), 127, dtype=torch.int8)
    assert exact_product(a, a).item() == 5001 * 127 * 127


def test_a_kernel_that_overflows_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches silent nonsense on processors without VNNI (pairs saturate in int16 there)."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # oneDNN on AVX2: inputs moved to 0 .. 255, pairs added in int16, the move taken back.
        pairs = ((a.int() + 128)[:, None] * b.int()[None]).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).int() - 128 * b.int().sum(-1)

    monkeypatch.setattr(int8, "_kernel_product", saturating)
    with caplog.at_level(logging.WARNING):
        assert integer_product.__wrapped__() is exact_product
    assert "no VNNI" in caplog.text


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_its_oracle_and_near_the_float_layer(bias: bool) -> None:
    """Catches swapped scales, a lost bias, and an error beyond what rounding explains."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 20, bias=bias)
    linear.weight.data *= torch.logspace(-3, 1, 20).unsqueeze(1)  # channels of unlike size
    layer, x = Int8Linear.of(linear), torch.randn(2, 5, 48) * torch.logspace(-2, 2, 5)[:, None]
    with torch.no_grad():
        got, wanted = layer(x), linear(x)
        rows, scale = quantize_rows(x.reshape(-1, 48))
        oracle = (rows.double() * scale) @ layer.dequantized().double().T
        oracle = (oracle + (linear.bias if bias else 0)).view_as(got)
    torch.testing.assert_close(got, oracle.float(), rtol=1e-5, atol=1e-6)
    # |x - q(x)| <= sx / 2 and |w - q(w)| <= sw / 2, element by element.
    sx, sw = scale.view(2, 5, 1), layer.scale
    ones = x.abs().sum(-1, keepdim=True) * sw / 2 + layer.dequantized().abs().sum(1) * sx / 2
    assert bool(((got - wanted).abs() <= ones * 1.001 + 1e-6).all())
    assert (linear.weight.dtype, layer.weight.dtype) == (torch.float32, torch.int8)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Catches a scale of the whole batch: answers would change with who else is served."""
    torch.manual_seed(1)
    layer, x = Int8Linear.of(nn.Linear(64, 33)), torch.randn(7, 64)
    x[3] *= 1000
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_rows_of_zeros_and_of_no_number() -> None:
    """Catches 0 / 0, and a NaN that is hidden by int8."""
    layer = Int8Linear.of(nn.Linear(8, 4))
    layer.bias.data.zero_()
    x = torch.zeros(2, 8)
    x[1, 3] = torch.nan
    y = layer(x)
    assert torch.equal(y[0], torch.zeros(4)) and bool(y[1].isnan().all())
    assert layer(torch.zeros(0, 8)).shape == (0, 4)


def test_other_types_and_gradients_are_refused() -> None:
    """Catches an int8 layer that computes something without being told what."""
    layer = Int8Linear.of(nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"float32 on a CPU, not in torch.bfloat16"):
        layer(torch.zeros(1, 8, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="float32 on a CPU"):
        layer.to(torch.bfloat16)(torch.zeros(1, 8))
    with pytest.raises(UserError, match="cannot be trained"):
        Int8Linear.of(nn.Linear(8, 4))(torch.zeros(1, 8, requires_grad=True))
    assert is_int8(nn.Sequential(layer)) and not is_int8(nn.Linear(2, 2))
    with pytest.raises(UserError, match="cannot be trained"):
        require_trainable(layer)
