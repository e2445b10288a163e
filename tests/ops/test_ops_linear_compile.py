"""torch.compile takes linear attention whole: one graph, no breaks, the same numbers.

``aot_eager`` traces forward and backward pass as every backend does, but generates no code, so it
is quick; the one that generates code is marked slow.

Shapes: B batch, T tokens, H query/key heads, K/V head dimensions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxlm.ops import linear_attention as ops

OPERATIONS = {
    "gla": ops.gla,
    "deltanet": ops.deltanet,
    "gated_deltanet": ops.gated_deltanet,
    "kda": ops.kda,
}
BATCH, LENGTH, HEADS, KEY, VALUE = 2, 50, 2, 4, 6


def inputs_of(mechanism: str) -> list[Tensor]:
    kind = ops.MECHANISMS[mechanism]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(BATCH, LENGTH, HEADS, *shape, generator=generator)

    inputs = [draw(KEY) - 0.5, ops.l2_normalize(draw(KEY) - 0.5), draw(VALUE) - 0.5]
    if kind.decay is not None:
        inputs.append(-draw(KEY) if kind.decay == "channel" else -draw())
    if kind.delta_rule:
        inputs.append(draw())
    inputs.append(torch.rand(BATCH, HEADS, KEY, VALUE, generator=generator))
    return [tensor.requires_grad_() for tensor in inputs]


def results(function: object, mechanism: str) -> list[Tensor]:
    """Outputs, final state, and the gradients of all inputs, in chunks of 16 with padding."""
    *tokens, state = inputs_of(mechanism)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, :5] = False
    result = function(  # type: ignore[operator]
        *tokens, initial_state=state, key_mask=mask, form="chunk", chunk_size=16
    )
    (result.output.square().sum() + result.final_state.sum()).backward()
    gradients = [tensor.grad for tensor in (*tokens, state)]
    assert all(gradient is not None for gradient in gradients)
    return [result.output, result.final_state, *gradients]


def compare(mechanism: str, backend: str, tolerance: float) -> None:
    torch.compiler.reset()
    operation = OPERATIONS[mechanism]
    # fullgraph makes every graph break an error.
    compiled = torch.compile(operation, fullgraph=True, backend=backend)
    expected, given = results(operation, mechanism), results(compiled, mechanism)
    for one, other in zip(expected, given, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mechanism", OPERATIONS)
def test_the_chunk_form_is_one_graph(mechanism: str) -> None:
    """Catches a logger, a cache, a look at a value or an autograd function that breaks the graph,
    and a traced backward pass that computes something else."""
    compare(mechanism, "aot_eager", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", OPERATIONS)
def test_generated_code_computes_the_same(mechanism: str) -> None:
    """Catches in-place updates of views that generated code reorders."""
    compare(mechanism, "inductor", 2e-5)
