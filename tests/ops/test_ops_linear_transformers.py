"""Gated DeltaNet and KDA against the torch functions of transformers, an implementation of others.

They compute in float32 and round as we do: the bound is that of two roundings. Ours is held to
1e-5 in float32 and 1e-10 in float64 by those of fla (test_ops_linear_oracle).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rxlm.ops.linear_attention import gated_deltanet, kda, l2_normalize

pytest.importorskip("transformers")
BOUND = 3e-5
FUNCTIONS = {
    "gated_deltanet": (
        gated_deltanet,
        "transformers.models.qwen3_next.modeling_qwen3_next",
        "torch_{form}_gated_delta_rule",
    ),
    "kda": (
        kda,
        "transformers.models.kimi_linear.modeling_kimi_linear",
        "{form}_kimi_delta_attention",
    ),
}


def theirs(name: str, form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function; if transformers renames it, this fails: the oracle would be lost."""
    _, module, function = FUNCTIONS[name]
    found: Callable[..., tuple[Tensor, Tensor]] = getattr(
        importlib.import_module(module), function.format(form=form)
    )
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 257])
def test_outputs_states_and_gradients_equal_theirs(name: str, form: str, length: int) -> None:
    """Catches an order of decay, erase, write and read, a scale or a gate that is ours alone."""
    generator = torch.Generator().manual_seed(length)
    heads, key_dim, value_dim = 2, 8, 12

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels = (key_dim,) if name == "kda" else ()
    uniform = torch.rand(2, length, heads, *channels, generator=generator)
    given = {
        "query": l2_normalize(normal(2, length, heads, key_dim)),
        "key": l2_normalize(normal(2, length, heads, key_dim)),
        "value": normal(2, length, heads, value_dim),
        # From -1e-3 to -50, a few strong ones among many weak ones.
        "log_decay": -(10.0 ** (-3 + 4.7 * uniform**3)),
        "write_strength": torch.rand(2, length, heads, generator=generator),
        "initial_state": normal(2, heads, key_dim, value_dim),
    }
    given = {key: tensor.requires_grad_() for key, tensor in given.items()}
    ours = FUNCTIONS[name][0](**given)
    expected = theirs(name, form)(
        given["query"],
        given["key"],
        given["value"],
        g=given["log_decay"],
        beta=given["write_strength"],
        initial_state=given["initial_state"],
        output_final_state=True,
    )
    weights = [normal(*tensor.shape) for tensor in ours]
    gradients = [
        torch.autograd.grad(
            sum((tensor * weight).sum() for tensor, weight in zip(results, weights, strict=True)),
            list(given.values()),
        )
        for results in (ours, expected)
    ]
    for label, found, wanted in zip(
        ("output", "state", *given), (*ours, *gradients[0]), (*expected, *gradients[1]), strict=True
    ):
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error < BOUND, f"{label}: {error:.1e}"
