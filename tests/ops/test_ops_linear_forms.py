"""The forms agree with each other, padding and splits leave no trace, extremes stay exact."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention import (
    LinearAttentionResult,
    chunk,
    deltanet,
    gated_deltanet,
    gla,
    kda,
    l2_normalize,
)

FUNCTIONS = {"gla": gla, "deltanet": deltanet, "gated_deltanet": gated_deltanet, "kda": kda}
NAMES = tuple(FUNCTIONS)

Arguments = dict[str, Tensor]


def make_arguments(
    name: str,
    length: int,
    *,
    seed: int = 0,
    batch: int = 2,
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (4, 6),
    strongest_gate: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> Arguments:
    """Random arguments of a mechanism, with an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    key_dim, value_dim = dims
    per_head = (batch, length, heads[1])
    arguments = {
        "query": l2_normalize(normal(batch, length, heads[0], key_dim)),
        "key": l2_normalize(normal(batch, length, heads[0], key_dim)),
        "value": normal(*per_head, value_dim),
        "initial_state": normal(batch, heads[1], key_dim, value_dim),
    }
    if name != "deltanet":
        channels = () if name == "gated_deltanet" else (key_dim,)
        arguments["log_decay"] = -strongest_gate * uniform(*per_head, *channels)
    if name != "gla":
        arguments["write_strength"] = 2 * uniform(*per_head)
    return {key: tensor.to(dtype) for key, tensor in arguments.items()}


def tokens(arguments: Arguments, start: int, stop: int) -> Arguments:
    """The same arguments for some of the tokens; the state is left out."""
    return {key: x[:, start:stop] for key, x in arguments.items() if key != "initial_state"}


def gradients(result: LinearAttentionResult, arguments: Arguments) -> Arguments:
    """Of a weighted sum of outputs and state: every element counts differently."""
    generator = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in result:
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        loss = loss + (tensor * weight).sum()
    found = torch.autograd.grad(loss, list(arguments.values()))
    return dict(zip(arguments, found, strict=True))


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(
    name=st.sampled_from(NAMES),
    length=st.integers(1, 40),
    chunk_size=st.sampled_from([1, 2, 4, 8, 16, 64]),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    dims=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strongest_gate=st.sampled_from([0.0, 0.1, 5.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_chunks_equal_the_definition_in_any_shape(
    name: str,
    length: int,
    chunk_size: int,
    batch: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    strongest_gate: float,
    seed: int,
) -> None:
    """A reshape, padding or gradient that is only right for convenient shapes would show."""
    arguments = make_arguments(
        name,
        length,
        seed=seed,
        batch=batch,
        heads=heads,
        dims=dims,
        strongest_gate=strongest_gate,
    )
    for tensor in arguments.values():
        tensor.requires_grad_()
    expected = FUNCTIONS[name](**arguments, form="recurrent")
    actual = FUNCTIONS[name](**arguments, form="chunk", chunk_size=chunk_size)
    assert_same(actual, expected)
    assert_same(gradients(actual, arguments), gradients(expected, arguments))


@pytest.mark.parametrize("name", NAMES)
def test_segments_that_fit_the_cache_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state lost or a token doubled where one cache-sized segment meets the next would show."""
    arguments = make_arguments(name, 53)
    for tensor in arguments.values():
        tensor.requires_grad_()
    whole = FUNCTIONS[name](**arguments, chunk_size=8)
    monkeypatch.setattr(chunk, "CPU_SEGMENT_ELEMENTS", 1)
    parts = FUNCTIONS[name](**arguments, chunk_size=8)
    assert_same(parts, whole)
    assert_same(gradients(parts, arguments), gradients(whole, arguments))


@given(
    name=st.sampled_from(NAMES),
    length=st.integers(1, 30),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_splitting_anywhere_and_carrying_the_state_changes_nothing(
    name: str, length: int, fraction: float, seed: int
) -> None:
    """A state that misses the last chunk, or is cut off from the gradient, would show."""
    split = round(fraction * length)
    arguments = make_arguments(name, length, seed=seed)
    for tensor in arguments.values():
        tensor.requires_grad_()
    function = functools.partial(FUNCTIONS[name], chunk_size=8)
    whole = function(**arguments)
    state = arguments["initial_state"]
    first = function(**tokens(arguments, 0, split), initial_state=state)
    second = function(**tokens(arguments, split, length), initial_state=first.final_state)
    output = torch.cat([first.output, second.output], dim=1)
    joined = LinearAttentionResult(output, second.final_state)
    assert_same(joined, whole)
    assert_same(gradients(joined, arguments), gradients(whole, arguments))


@pytest.mark.parametrize("name", NAMES)
def test_steps_continue_a_prompt_read_by_chunks(name: str) -> None:
    """Decoding that disagrees with training would show; so would a state changed in place."""
    arguments = make_arguments(name, 24)
    function = FUNCTIONS[name]
    whole = function(**arguments, chunk_size=8)
    prompt = tokens(arguments, 0, 13)
    output, state = function(**prompt, initial_state=arguments["initial_state"], chunk_size=8)
    outputs = [output]
    for position in range(13, 24):
        before = state.clone()
        token = tokens(arguments, position, position + 1)
        output, new_state = function(**token, initial_state=state, form="step")
        assert torch.equal(state, before)
        outputs.append(output)
        state = new_state
    assert_same((torch.cat(outputs, dim=1), state), tuple(whole))


@given(
    name=st.sampled_from(NAMES),
    form=st.sampled_from(["chunk", "recurrent"]),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
    hole=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_padding_leaves_no_trace_wherever_it_stands(
    name: str, form: Any, before: int, after: int, hole: int, seed: int
) -> None:
    """Decay that goes on at padding, or garbage there that is written or read, would show."""
    length = 11
    arguments = make_arguments(name, length, seed=seed, dtype=torch.float32)
    for tensor in arguments.values():
        tensor.requires_grad_()
    function = functools.partial(FUNCTIONS[name], form=form, chunk_size=4)
    plain = function(**arguments)
    real = torch.ones(length, dtype=torch.bool)
    empty = torch.zeros(0, dtype=torch.bool)
    mask = torch.cat(
        [empty.new_zeros(before), real[:5], empty.new_zeros(hole), real[5:], empty.new_zeros(after)]
    )
    padded = {}
    for key, tensor in arguments.items():
        if key == "initial_state":
            padded[key] = tensor
            continue
        garbage = torch.full((2, len(mask), *tensor.shape[2:]), float("nan"))
        padded[key] = garbage.index_copy(1, mask.nonzero()[:, 0], tensor)
    result = function(**padded, key_mask=mask.expand(2, -1))
    assert not result.output[:, ~mask].any()
    compact = LinearAttentionResult(result.output[:, mask], result.final_state)
    assert_same(compact, plain, 1e-5)
    assert_same(gradients(compact, arguments), gradients(plain, arguments), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_nothing_but_padding_keeps_its_state(name: str) -> None:
    """A state that fades while a row waits for the others in its batch would show."""
    arguments = make_arguments(name, 7)
    mask = torch.tensor([[True] * 7, [False] * 7])
    result = FUNCTIONS[name](**arguments, key_mask=mask, chunk_size=4)
    assert torch.equal(result.final_state[1], arguments["initial_state"][1])
    assert not result.output[1].any()
    alone = FUNCTIONS[name](**{key: x[:1] for key, x in arguments.items()}, chunk_size=4)
    assert_same(result.output[:1], alone.output)


@pytest.mark.parametrize("name", NAMES)
def test_no_initial_state_is_an_empty_one(name: str) -> None:
    """A state with leftovers, or of another type, would show."""
    arguments = make_arguments(name, 9, dtype=torch.float32)
    arguments["initial_state"] = torch.zeros_like(arguments["initial_state"])
    expected = FUNCTIONS[name](**arguments)
    del arguments["initial_state"]
    result = FUNCTIONS[name](**arguments)
    assert torch.equal(result.output, expected.output)
    assert result.final_state.dtype == torch.float32


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
@pytest.mark.parametrize(("strength", "bound"), [(1.0, 2e-6), (2.0, 5e-5)])
def test_repeated_keys_keep_their_digits_in_float32(
    name: str, strength: float, bound: float
) -> None:
    """Inverting a chunk's system by a power series is wrong by many orders of magnitude here.

    At strength 2 every step mirrors the state, and the system itself costs two digits.
    """
    length = 64
    arguments = make_arguments(name, length, dims=(16, 16), heads=(1, 1), strongest_gate=1e-3)
    shared = arguments["key"][:, :1]
    arguments["key"] = l2_normalize(shared + 0.02 * arguments["key"])
    arguments["write_strength"] = torch.full_like(arguments["write_strength"], strength)
    exact = FUNCTIONS[name](**arguments, form="recurrent")
    single = {key: tensor.float() for key, tensor in arguments.items()}
    result = FUNCTIONS[name](**single)
    for actual, expected in zip(result, exact, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= bound, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "kda"])
@pytest.mark.parametrize("gates", ["none", "weak after strong", "forget all"])
@pytest.mark.parametrize("seed", range(4))
def test_extreme_gates_are_exact_in_float32(name: str, gates: str, seed: int) -> None:
    """Overflow, clamped exponents, or differences of large sums of gates would show.

    Entries of a gradient are sums of terms as large as the largest one: it is the measure.
    """
    arguments = make_arguments(name, 64, seed=seed)
    decay = torch.full_like(arguments["log_decay"], -1e-3)
    if gates == "none":
        decay.zero_()
    elif gates == "weak after strong":
        decay[:, :40] = -5000.0
    else:
        decay[:, ::9] = float("-inf")
    arguments["log_decay"] = decay
    single = {key: tensor.float().requires_grad_() for key, tensor in arguments.items()}
    exact = {key: tensor.requires_grad_() for key, tensor in arguments.items()}
    result, expected = FUNCTIONS[name](**single), FUNCTIONS[name](**exact, form="recurrent")
    for actual, reference in zip(result, expected, strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=1e-5, atol=2e-5)
    found, oracle = gradients(result, single), gradients(expected, exact)
    for what, reference in oracle.items():
        error = (found[what].double() - reference).abs().max() / reference.abs().max().clamp(min=1)
        assert error <= 6e-6, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_a_query_head_serves_a_run_of_value_heads(name: str) -> None:
    """Heads dealt out in turn instead of in runs would show."""
    arguments = make_arguments(name, 9, heads=(2, 4))
    whole = FUNCTIONS[name](**arguments)
    second = {key: x[:, :, 2:] for key, x in arguments.items() if key != "initial_state"}
    second.update({key: arguments[key][:, :, 1:] for key in ("query", "key")})
    alone = FUNCTIONS[name](**second, initial_state=arguments["initial_state"][:, 2:])
    assert_same((whole.output[:, :, 2:], whole.final_state[:, 2:]), tuple(alone))


def test_equal_gates_in_all_channels_make_kda_gated_deltanet() -> None:
    """Two mechanisms that read the same decay differently would show."""
    arguments = make_arguments("gated_deltanet", 21)
    expected = gated_deltanet(**arguments, chunk_size=8)
    arguments["log_decay"] = arguments["log_decay"].unsqueeze(-1).expand(-1, -1, -1, 4)
    assert_same(kda(**arguments, chunk_size=8), expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast_compute_in_float32(name: str) -> None:
    """A state or a triangular system in bfloat16, silently chosen by autocast, would show."""
    arguments = make_arguments(name, 40, dtype=torch.bfloat16)
    arguments["initial_state"] = arguments["initial_state"].float()
    expected = FUNCTIONS[name](**{key: x.float() for key, x in arguments.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = FUNCTIONS[name](**arguments)
    assert result.output.dtype == torch.bfloat16
    assert torch.equal(result.output, expected.output.to(torch.bfloat16))
    assert torch.equal(result.final_state, expected.final_state)


def test_normalised_vectors_have_length_one_and_zeros_stay_zeros() -> None:
    """A gradient that is not finite at padding (all zeros) would show."""
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    normalised = l2_normalize(vectors)
    torch.testing.assert_close(normalised, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    normalised.sum().backward()
    assert vectors.grad is not None and bool(vectors.grad.isfinite().all())
    half = l2_normalize(torch.full((64,), 300.0, dtype=torch.float16))
    assert half.dtype == torch.float16 and bool((half == 0.125).all())


def test_an_empty_sequence_returns_the_state() -> None:
    """A turn without tokens must not lose what earlier turns stored."""
    arguments = make_arguments("kda", 0)
    for form in ("chunk", "recurrent"):
        result = kda(**arguments, form=form)
        assert result.output.shape == (2, 0, 2, 6)
        assert torch.equal(result.final_state, arguments["initial_state"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 5, 4)}, "query has shape .* expected four dimensions"),
        ({"key": torch.zeros(2, 5, 1, 3)}, "key has shape .* expected \\[2, 5, 1, 4\\]"),
        ({"value": torch.zeros(2, 4, 2, 6)}, "value has shape"),
        ({"log_decay": torch.zeros(2, 5, 2)}, "log_decay has shape .* expected \\[2, 5, 2, 4\\]"),
        ({"log_decay": torch.full((2, 5, 2, 4), 0.5)}, "log_decay reaches 0.5, expected natural"),
        ({"write_strength": torch.zeros(2, 5, 1)}, "write_strength has shape"),
        ({"initial_state": torch.zeros(2, 2, 6, 4)}, "initial_state has shape"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, "key_mask has shape"),
        ({"key_mask": torch.ones(2, 5)}, "key_mask has type torch.float32"),
        ({"form": "fused"}, "form 'fused' does not exist; choose one of chunk, recurrent, step"),
        ({"form": "step"}, "form 'step' takes one token, not 5"),
        ({"chunk_size": 48}, "chunk_size 48 is not a power of two"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist; choose one of auto, torch, fla"),
    ],
)
def test_unusable_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    """A bad argument that is broadcast, ignored or reported by a kernel would show."""
    arguments: dict[str, Any] = make_arguments("kda", 5, dtype=torch.float32)
    with pytest.raises(UserError, match=f"(?:kda: )?{message}"):
        kda(**{**arguments, **changes})


def test_head_counts_that_do_not_divide_are_named() -> None:
    """Value heads without a query head of their own would show."""
    arguments = make_arguments("deltanet", 5, heads=(2, 3))
    with pytest.raises(UserError, match="value has 3 heads and query 2"):
        deltanet(**arguments)
