"""The delta rule with gates per value channel: chunks against the loop, the loop against fla."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention import deltanet, gated_deltanet
from rxlm.ops.linear_attention.value_gates import value_gated_delta_rule

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 5, 6
Arguments = dict[str, Any]


@functools.cache
def naive(operation: str, function: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Load a function of ``fla/ops/<operation>/naive.py``, computing in float64."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs fla's reference files: pip install --no-deps fla-core einops")
    path = Path(spec.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    source = path.read_text()
    source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    namespace: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace[function]


def make(length: int, updates: int, gates: int, *, decays: bool = True, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    per_update = (BATCH, length, updates, HEADS)
    return {
        "query": normal(BATCH, length, HEADS, KEY_DIM),
        "key": torch.nn.functional.normalize(normal(*per_update, KEY_DIM), dim=-1),
        "value": normal(*per_update, VALUE_DIM),
        # From decays next to 1 to decays that leave nothing.
        "log_decay": -(10 ** (uniform(BATCH, length, HEADS, gates) * 4.5 - 3)) if decays else None,
        "write_strength": uniform(*per_update, gates),
        "initial_state": normal(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    }


def with_gradients(arguments: Arguments, key_mask: Tensor | None, **form: Any) -> list[Tensor]:
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in arguments.items()
        if tensor is not None
    }
    result = value_gated_delta_rule(**{**arguments, **leaves}, key_mask=key_mask, **form)
    loss = result.output.sin().sum() + result.final_state.cos().sum()
    return [*result, *torch.autograd.grad(loss, list(leaves.values()))]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    chunk_size=st.sampled_from([1, 2, 3, 16, 64]),
    updates=st.integers(1, 3),
    gates=st.sampled_from([1, VALUE_DIM]),
    decays=st.booleans(),
    padded=st.booleans(),
    recompute=st.booleans(),
)
def test_chunks_equal_the_loop_with_gradients(
    length: int,
    chunk_size: int,
    updates: int,
    gates: int,
    decays: bool,
    padded: bool,
    recompute: bool,
) -> None:
    """A wrong triangle, decay, order of updates or gate axis at any chunk boundary would show."""
    arguments = make(length, updates, gates, decays=decays, seed=length)
    key_mask = torch.rand(BATCH, length) > 0.3 if padded else None
    expected = with_gradients(arguments, key_mask, form="recurrent")
    actual = with_gradients(arguments, key_mask, chunk_size=chunk_size, recompute=recompute)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_vector_strength_equals_flas_delta_rule() -> None:
    """A strength that acts on channels of the key instead of the value would show: fla's loop takes
    a vector, too."""
    case = make(37, 1, VALUE_DIM, decays=False)
    heads_first = [tensor.squeeze(2).transpose(1, 2) for tensor in (case["key"], case["value"])]
    output, state = naive("delta_rule", "delta_rule_recurrence")(
        case["query"].transpose(1, 2),
        *heads_first,
        case["write_strength"].squeeze(2).transpose(1, 2),
        initial_state=case["initial_state"],
    )
    actual = value_gated_delta_rule(**{**case, "query": case["query"] * KEY_DIM**-0.5})
    torch.testing.assert_close(actual.output, output.transpose(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.final_state, state, rtol=1e-10, atol=1e-10)


def test_one_gate_per_head_equals_flas_gated_delta_rule() -> None:
    """A decay after the write, or another order of erasing and decaying, would show."""
    case = make(37, 1, 1)
    output, state = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(
        case["query"],
        case["key"].squeeze(2),
        case["value"].squeeze(2),
        case["write_strength"].squeeze(2).squeeze(-1),
        case["log_decay"].squeeze(-1),
        scale=1.0,
        initial_state=case["initial_state"],
        output_final_state=True,
    )
    actual = value_gated_delta_rule(**case)
    torch.testing.assert_close(actual.output, output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.final_state, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("decays", [False, True])
def test_products_equal_flas_gated_delta_product(updates: int, decays: bool) -> None:
    """A decay at every update instead of every token, or a read before the last, would show."""
    case = make(29, updates, 1, decays=decays)
    output, state = naive("gated_delta_product", "naive_recurrent_gated_delta_product")(
        case["query"],
        case["key"].flatten(1, 2),
        case["value"].flatten(1, 2),
        case["log_decay"].squeeze(-1) if decays else None,
        case["write_strength"].flatten(1, 2).squeeze(-1),
        scale=1.0,
        initial_state=case["initial_state"],
        num_householder=updates,
    )
    actual = value_gated_delta_rule(**case, chunk_size=16)
    torch.testing.assert_close(actual.output, output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.final_state, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decays", [False, True])
def test_one_gate_per_head_equals_the_mechanisms(decays: bool) -> None:
    """Two definitions of one recurrence in this package that drift apart would show."""
    case = make(45, 1, 1, decays=decays)
    shared = [case["query"], case["key"].squeeze(2), case["value"].squeeze(2)]
    strength = case["write_strength"].squeeze(2).squeeze(-1)
    options = {"initial_state": case["initial_state"], "scale": 1.0}
    if decays:
        expected = gated_deltanet(*shared, case["log_decay"].squeeze(-1), strength, **options)
    else:
        expected = deltanet(*shared, strength, **options)
    actual = value_gated_delta_rule(**case)
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(actual.final_state, expected.final_state, rtol=1e-10, atol=1e-10)


def test_each_value_channel_is_a_recurrence_of_its_own() -> None:
    """Channels that leak into each other would show: a gate of one changes the others nothing."""
    case = make(40, 2, VALUE_DIM)
    before = value_gated_delta_rule(**case).output
    changed = {**case, "write_strength": case["write_strength"].clone()}
    changed["write_strength"][..., 3] *= 0.1
    different = (value_gated_delta_rule(**changed).output != before).flatten(0, 2).any(dim=0)
    assert different.tolist() == [channel == 3 for channel in range(VALUE_DIM)]


def test_state_never_grows_without_writing() -> None:
    """Gates that make the state grow would show: erasing is a contraction, channel by channel."""
    case = make(200, 2, VALUE_DIM)
    case["value"] = torch.zeros_like(case["value"])
    final = value_gated_delta_rule(**case).final_state
    assert (final.norm(dim=-2) <= case["initial_state"].norm(dim=-2) + 1e-12).all()


def test_activation_runs_once_a_token_and_skips_padding() -> None:
    """A nonlinearity per update, or one that padding triggers, would show."""
    case = make(6, 2, 1)
    key_mask = torch.tensor([[True] * 6, [True, False, False, True, True, False]])
    calls = []

    def halve(state: Tensor) -> Tensor:
        calls.append(state)
        return state / 2

    options = {"form": "recurrent", "state_activation": halve}
    padded = value_gated_delta_rule(**case, key_mask=key_mask, **options)
    assert len(calls) == 6
    alone = {k: v[1:, key_mask[1]] if k != "initial_state" else v[1:] for k, v in case.items()}
    single = value_gated_delta_rule(**alone, **options)
    torch.testing.assert_close(padded.final_state[1:], single.final_state)
    torch.testing.assert_close(padded.output[1, key_mask[1]], single.output[0])


def test_misuse_is_one_clear_error() -> None:
    """A shape that broadcasts by accident, or a chunked nonlinearity, would pass silently."""
    case = make(4, 1, VALUE_DIM)
    with pytest.raises(UserError, match="write_strength has shape"):
        value_gated_delta_rule(**{**case, "write_strength": case["write_strength"][:1]})
    with pytest.raises(UserError, match="gates of"):
        value_gated_delta_rule(**{**case, "log_decay": case["log_decay"][..., :2]})
    with pytest.raises(UserError, match="expected \\[B, T, H, K\\]"):
        value_gated_delta_rule(**{**case, "key": case["key"].squeeze(2)})
    with pytest.raises(UserError, match="recurrent"):
        value_gated_delta_rule(**case, state_activation=torch.tanh)
    with pytest.raises(UserError, match="chunk_size=0"):
        value_gated_delta_rule(**case, chunk_size=0)
