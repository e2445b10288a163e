"""Products of one row as sums: which are replaced, and that they stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from rxlm.rxt import one_row_products
from rxlm.rxt.one_row_products import sum_small_products

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def traced(function: Function, *arguments: Tensor) -> GraphModule:
    made: GraphModule = make_fx(function, tracing_mode="fake")(*arguments)
    sum_small_products(made.graph)
    made.recompile()
    return made


def products_in(module: GraphModule) -> int:
    aten = torch.ops.aten
    kinds = (aten.mm.default, aten.addmm.default)
    return sum(node.target in kinds for node in module.graph.nodes)


def arguments(rows: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 24), (40, 24), (40,))
    row, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return row, weight, bias


@pytest.mark.parametrize(
    "function",
    [
        lambda row, weight, bias: torch.nn.functional.linear(row, weight) + bias.sum(),
        lambda row, weight, bias: torch.nn.functional.linear(row, weight, bias),
        lambda row, weight, bias: row @ weight.t().contiguous() + bias,
    ],
    ids=["linear", "with a bias", "by columns"],
)
def test_small_products_of_one_row_become_sums(function: Function) -> None:
    """Catches a matrix that is read the wrong way round, and a bias that is lost."""
    given = arguments()
    module = traced(function, *given)
    assert not products_in(module)
    torch.testing.assert_close(module(*given), function(*given), rtol=1e-5, atol=1e-5)


def test_other_products_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sums where they are slow (many rows, large matrices), round differently (bfloat16,
    float64), or leave factors out."""

    def linear(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(row, weight, bias)

    def scaled(row: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias, row, weight.t(), beta=0.5, alpha=2.0)

    for given in (arguments(2), arguments(1, torch.bfloat16), arguments(1, torch.float64)):
        assert products_in(traced(linear, *given)) == 1
    given = arguments()
    assert products_in(traced(scaled, *given)) == 1
    assert products_in(traced(linear, *given)) == 0
    monkeypatch.setattr(one_row_products, "SMALL", 40 * 24 - 1)
    assert products_in(traced(linear, *given)) == 1
