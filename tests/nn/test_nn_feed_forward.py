"""Feed-forward networks and norms against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rxlm.nn.feed_forward import ACTIVATIONS, FeedForward
from rxlm.nn.norms import make_norm

FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "swish": lambda x: x / (1 + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "linear": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_formula(activation: str, gated: bool) -> None:
    """Catches an activation on the wrong half of a gated network, a swapped gate, a stray bias."""
    torch.manual_seed(0)
    module = FeedForward(6, 10, activation=activation, gated=gated, dropout=0.0)
    x = torch.randn(2, 3, 6)
    act = FORMULAS[activation]
    if gated:
        gate_weight, up_weight = module.up.weight[:10], module.up.weight[10:]
        hidden = act(x @ gate_weight.T) * (x @ up_weight.T)
    else:
        hidden = act(x @ module.up.weight.T)
    torch.testing.assert_close(module(x), hidden @ module.down.weight.T, atol=1e-5, rtol=1e-5)
    expected = 6 * 10 * (3 if gated else 2)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_every_activation_has_a_formula_here() -> None:
    """Catches an activation that is added without a test of what it computes."""
    assert set(ACTIVATIONS) == set(FORMULAS)


def test_dropout_acts_on_the_inner_activations_in_training_only() -> None:
    """Catches dropout on the output (whole features lost) and in evaluation mode."""
    module = FeedForward(4, 4, activation="linear", gated=False, dropout=0.5)
    with torch.no_grad():
        module.up.weight.copy_(torch.eye(4))
        module.down.weight.copy_(torch.ones(4, 4))
    output = module(torch.ones(64, 1, 4))
    # Every output sums the same surviving inner units, each doubled.
    assert torch.equal(output, output[..., :1].expand_as(output))
    assert set(output.unique().tolist()) <= {0.0, 2.0, 4.0, 6.0, 8.0}
    assert len(output.unique()) > 2
    module.eval()
    assert torch.equal(module(torch.ones(1, 1, 4)), torch.full((1, 1, 4), 4.0))


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_norms(rms: bool, size: float) -> None:
    """Catches RMSNorm and LayerNorm swapped, over the wrong axis, or with another epsilon."""
    torch.manual_seed(0)
    x: Tensor = torch.randn(2, 5, 8) * size + size
    norm = make_norm(8, rms=rms, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 8))
    centred = x if rms else x - x.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight, atol=1e-5, rtol=1e-4)
