"""Every mechanism and form against the naive reference files of fla: outputs, states, gradients.

The reference files are read by path (they need torch and einops only; importing fla needs triton)
and compiled in float64, so that the bounds below measure this package and not the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rxlm.ops.linear_attention import deltanet, gated_deltanet, gla, kda, l2_normalize

BATCH, KEY_DIM, VALUE_DIM = 2, 8, 12
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = (1, 2, 63, 64, 65, 100, 257)
NAMES = ("gla", "deltanet", "gated_deltanet", "kda")
FUNCTIONS = {"gla": gla, "deltanet": deltanet, "gated_deltanet": gated_deltanet, "kda": kda}

Case = dict[str, Tensor]
Results = dict[str, Tensor]


@functools.cache
def naive(operation: str, function: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Load a function of ``fla/ops/<operation>/naive.py``, computing in float64."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs fla's reference files: pip install --no-deps fla-core einops")
    pytest.importorskip("einops")
    path = Path(spec.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    source = path.read_text()
    for single, double in (
        ("torch.float32", "torch.float64"),
        ("torch.float)", "torch.float64)"),
        ("torch.float,", "torch.float64,"),
        (".float()", ".double()"),
    ):
        source = source.replace(single, double)
    namespace: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace[function]


def make_case(length: int, num_heads: int, num_value_heads: int, seed: int = 0) -> Case:
    """Random float64 tensors: gates from -1e-3 to -50 side by side, a state that is not empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gates(*shape: int) -> Tensor:
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return -torch.exp(math.log(1e-3) + uniform * math.log(50 / 1e-3))

    per_head = (BATCH, length, num_value_heads)
    return {
        "query": l2_normalize(normal(BATCH, length, num_heads, KEY_DIM)),
        "key": l2_normalize(normal(BATCH, length, num_heads, KEY_DIM)),
        "value": normal(*per_head, VALUE_DIM),
        "head_decay": gates(*per_head),
        "channel_decay": gates(*per_head, KEY_DIM),
        "write_strength": torch.rand(*per_head, generator=generator, dtype=torch.float64),
        "initial_state": normal(BATCH, num_value_heads, KEY_DIM, VALUE_DIM),
        "output_weight": normal(*per_head, VALUE_DIM),
        "state_weight": normal(BATCH, num_value_heads, KEY_DIM, VALUE_DIM),
    }


def arguments_of(name: str, case: Case) -> dict[str, Tensor]:
    """Pick what a mechanism takes, under the names of its arguments."""
    arguments = {key: case[key] for key in ("query", "key", "value", "initial_state")}
    if name in ("gla", "kda"):
        arguments["log_decay"] = case["channel_decay"]
    if name == "gated_deltanet":
        arguments["log_decay"] = case["head_decay"]
    if name != "gla":
        arguments["write_strength"] = case["write_strength"]
    return arguments


def reference(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial_state: Tensor,
    log_decay: Tensor | None = None,
    write_strength: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call fla's token-by-token loop, in its own order of arguments and dimensions."""
    if name != "kda":  # only this one knows that values may have more heads
        repeats = value.shape[2] // query.shape[2]
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
    state = {"initial_state": initial_state, "output_final_state": True}
    if name == "gla":
        return naive("gla", "naive_recurrent_gla")(query, key, value, gk=log_decay, **state)
    if name == "kda":
        loop = naive("kda", "naive_recurrent_kda")
        return loop(query, key, value, g=log_decay, beta=write_strength, **state)
    if name == "gated_deltanet":
        loop = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
        return loop(query, key, value, g=log_decay, beta=write_strength, **state)
    assert write_strength is not None
    heads_first = (x.transpose(1, 2) for x in (query, key, value, write_strength))
    output, final_state = naive("delta_rule", "delta_rule_recurrence")(*heads_first, **state)
    return output.transpose(1, 2), final_state


def with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], name: str, case: Case, dtype: torch.dtype
) -> Results:
    """Output, final state, and the gradients of a weighted sum of both."""
    arguments = {
        key: tensor.to(dtype).requires_grad_() for key, tensor in arguments_of(name, case).items()
    }
    output, final_state = function(**arguments)
    loss = (output * case["output_weight"].to(dtype)).sum()
    loss = loss + (final_state * case["state_weight"].to(dtype)).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    named = {f"gradient of {key}": g for key, g in zip(arguments, gradients, strict=True)}
    return {"output": output.detach(), "final state": final_state.detach(), **named}


def assert_close(actual: Results, expected: Results, bound: float, where: str) -> None:
    for key, tensor in expected.items():
        error = (actual[key].double() - tensor).abs().max() / tensor.abs().max()
        assert error <= bound, f"{where}: relative error of {key} is {error:.2e}, over {bound:.0e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_chunk_size_equals_the_reference_in_both_precisions(name: str, length: int) -> None:
    """A wrong decay, triangle, scale, head order or gradient at any chunk boundary would show."""
    case = make_case(length, num_heads=1, num_value_heads=2)
    expected = with_gradients(functools.partial(reference, name), name, case, torch.float64)
    for dtype, bound in BOUNDS.items():
        for chunk_size in (16, 32, 64):
            function = functools.partial(FUNCTIONS[name], chunk_size=chunk_size)
            actual = with_gradients(function, name, case, dtype)
            assert_close(actual, expected, bound, f"{dtype}, chunks of {chunk_size}")


@pytest.mark.parametrize("name", NAMES)
def test_the_readable_form_equals_the_reference(name: str) -> None:
    """The yardstick of the other tests must itself be right, with several heads of both kinds."""
    case = make_case(33, num_heads=2, num_value_heads=4, seed=1)
    expected = with_gradients(functools.partial(reference, name), name, case, torch.float64)
    for dtype, bound in BOUNDS.items():
        function = functools.partial(FUNCTIONS[name], form="recurrent")
        assert_close(with_gradients(function, name, case, dtype), expected, bound, str(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_tokens_equal_the_reference(name: str) -> None:
    """Errors that grow with the number of chunks, or lie between segments, would show."""
    case = make_case(1000, num_heads=1, num_value_heads=1, seed=2)
    loop = functools.partial(reference, name)
    with torch.no_grad():
        expected = dict(zip(("output", "state"), loop(**arguments_of(name, case)), strict=True))
        for dtype, bound in BOUNDS.items():
            arguments = {key: x.to(dtype) for key, x in arguments_of(name, case).items()}
            result = FUNCTIONS[name](**arguments)
            actual = {"output": result.output, "state": result.final_state}
            assert_close(actual, expected, bound, str(dtype))


@pytest.mark.parametrize("name", ["gated_deltanet", "kda"])
def test_the_reference_by_chunks_agrees_too(name: str) -> None:
    """A reading of the reference loop that its authors do not share would show."""
    case = make_case(64, num_heads=2, num_value_heads=2, seed=3)
    case["head_decay"], case["channel_decay"] = (
        case[key].clamp(min=-0.5) for key in ("head_decay", "channel_decay")
    )
    arguments = arguments_of(name, case)
    operation = "gated_delta_rule" if name == "gated_deltanet" else "kda"
    output, final_state = naive(operation, f"naive_chunk_{operation}")(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        g=arguments["log_decay"],
        beta=arguments["write_strength"],
        initial_state=arguments["initial_state"],
        output_final_state=True,
        chunk_size=32,
    )
    result = FUNCTIONS[name](**arguments, chunk_size=16)
    torch.testing.assert_close(result.output, output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.final_state, final_state, rtol=1e-10, atol=1e-10)
