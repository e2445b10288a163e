"""Feature-map attention: the formulas, all forms against each other, other people's loops."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.feature_map_attention import (
    FeatureMapResult,
    FeatureMapState,
    Form,
    feature_map_attention,
)
from rxlm.ops.feature_maps import FEATURE_MAPS, get_feature_map, taylor_features, taylor_size

NAMES = ("elu", "taylor")
MANY: tuple[Form, ...] = ("chunk", "recurrent", "quadratic")
maps = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])


def tensors(length: int, batch: int = 2, heads: int = 3, key: int = 6, value: int = 5) -> Any:
    generator = torch.Generator().manual_seed(length)
    shape = (batch, length, heads)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(*shape, key), draw(*shape, key), draw(*shape, value)


def written_out(name: str, causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula of the paper, a query and a head at a time."""
    rows = torch.zeros_like(value)
    batch, length, heads, width = query.shape
    for b, t, h in itertools.product(range(batch), range(length), range(heads)):
        seen = t + 1 if causal else length
        q, keys = query[b, t, h], key[b, :seen, h]
        if name == "elu":
            weights = (torch.nn.functional.elu(keys) + 1) @ (torch.nn.functional.elu(q) + 1)
        else:
            scores = keys @ q / width**0.5
            weights = 1 + scores + scores**2 / 2
        rows[b, t, h] = weights @ value[b, :seen, h] / weights.sum()
    return rows


@both
@maps
@pytest.mark.parametrize("form", MANY)
def test_elu_formula_and_taylor_formula(form: Form, name: str, causal: bool) -> None:
    """Catches a wrong map, a normaliser that is not the sum of the weights (seed 001 divides by a
    vector), a numerator that is not causal, and heads or batches that mix."""
    query, key, value = tensors(21)
    found = feature_map_attention(
        query, key, value, name, causal=causal, form=form, chunk_size=8
    ).output
    expected = written_out(name, causal, query, key, value)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def with_gradients(arguments: dict[str, Any], form: Form, chunk_size: int = 64) -> list[Tensor]:
    """Output, state, and gradients of a weighted sum of both."""
    given = {
        key: x.detach().clone().requires_grad_()
        for key, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    plain = {key: x for key, x in arguments.items() if key not in given}
    start = FeatureMapState(given.pop("key_value"), given.pop("key_sum"))
    output, final = feature_map_attention(
        **given, **plain, initial_state=start, form=form, chunk_size=chunk_size
    )
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
        for x in (output, *final)
    )
    leaves = [*given.values(), *start]
    return [output, *final, *torch.autograd.grad(loss, leaves)]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70),
    chunk_size=st.integers(1, 80),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    key=st.integers(1, 5),
    value=st.integers(1, 5),
    name=st.sampled_from(NAMES),
    causal=st.booleans(),
    masked=st.booleans(),
    data=st.data(),
)
def test_scan_chunk_and_quadratic_agree_with_gradients(
    length: int,
    chunk_size: int,
    batch: int,
    heads: int,
    key: int,
    value: int,
    name: str,
    causal: bool,
    masked: bool,
    data: st.DataObject,
) -> None:
    """Catches an error at a chunk boundary, a lost state, a wrong mask, in any shape, in outputs,
    states or gradients."""
    torch.manual_seed(length)
    mask = None
    if masked:
        row = st.lists(st.booleans(), min_size=length, max_size=length)
        mask = torch.tensor([data.draw(row) for _ in range(batch)])
    size = get_feature_map(name).size(key)
    # The state is that of tokens that were seen: with any other, weights need not be positive.
    past = FEATURE_MAPS[name].features(torch.randn(batch, heads, key, dtype=torch.float64))
    arguments = {
        "query": torch.randn(batch, length, heads, key, dtype=torch.float64),
        "key": torch.randn(batch, length, heads, key, dtype=torch.float64),
        "value": torch.randn(batch, length, heads, value, dtype=torch.float64),
        "key_value": torch.randn(batch, heads, size, value, dtype=torch.float64),
        "key_sum": past,
        "feature_map": name,
        "causal": causal,
        "key_mask": mask,
    }
    expected = with_gradients(arguments, "recurrent")
    for form in ("chunk", "quadratic"):
        for found, wanted in zip(
            with_gradients(arguments, form, chunk_size), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@maps
@pytest.mark.parametrize("length", [1, 63, 100, 257])
def test_chunk_equals_scan_in_float32(name: str, length: int) -> None:
    """Catches a form that only holds in float64, at lengths around multiples of the chunk."""
    query, key, value = (x.float() for x in tensors(length, key=16, value=32))
    scan, chunk = (
        feature_map_attention(query, key, value, name, form=form) for form in ("recurrent", "chunk")
    )
    exact = feature_map_attention(query.double(), key.double(), value.double(), name)
    torch.testing.assert_close(chunk.output, scan.output, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(chunk.output.double(), exact.output, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(chunk.final_state, scan.final_state, rtol=1e-5, atol=1e-4)


@maps
def test_scan_of_pieces_and_steps_equals_one_call(name: str) -> None:
    """Catches a state that does not carry everything, or that the call changes in place."""
    query, key, value = tensors(40)
    whole = feature_map_attention(query, key, value, name)
    state, pieces = None, []
    for start, end in ((0, 17), (17, 18), (18, 39), (39, 40)):
        part = [x[:, start:end] for x in (query, key, value)]
        form: Form = "step" if end - start == 1 else "chunk"
        before = None if state is None else [x.clone() for x in state]
        result = feature_map_attention(*part, name, initial_state=state, form=form, chunk_size=4)
        if state is not None and before is not None:
            assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = result.final_state
        pieces.append(result.output)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.output, rtol=1e-11, atol=1e-11)
    assert state is not None
    torch.testing.assert_close(state, whole.final_state, rtol=1e-11, atol=1e-11)


@maps
@pytest.mark.parametrize("form", MANY)
def test_causal_gradient_triangle_and_suffix_edits(form: Form, name: str) -> None:
    """Catches a token that reaches an earlier one (seed 001 sums over the whole sequence): by
    gradients that are exactly zero, and by prefixes that stay the same to the last bit."""
    query, key, value = (x.float().requires_grad_() for x in tensors(37))

    def run(*given: Tensor) -> Tensor:
        return feature_map_attention(*given, name, form=form, chunk_size=8).output

    for position in (0, 7, 8, 20, 36):
        output = run(query, key, value)[:, position].sum()
        for gradient in torch.autograd.grad(output, (key, value)):
            assert gradient[:, : position + 1].abs().sum() > 0
            assert gradient[:, position + 1 :].abs().sum() == 0
    with torch.no_grad():
        before = run(query, key, value)
        for position in (1, 8, 21, 36):
            edited = [x.clone() for x in (query, key, value)]
            for x in edited:
                x[:, position:] = 3.0
            after = run(*edited)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position:], before[:, position:])


@both
@maps
@pytest.mark.parametrize("form", MANY)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_is_an_identity_step(side: str, form: Form, name: str, causal: bool) -> None:
    """Catches padding that is written (phi(0) is not 0), read, or let through as NaN."""
    query, key, value = tensors(20)
    junk = [torch.full_like(x[:, :5], float("nan")) for x in (query, key, value)]
    cut = {"left": 0, "right": 20, "middle": 9}[side]
    padded = [
        torch.cat((x[:, :cut], pad, x[:, cut:]), dim=1)
        for x, pad in zip((query, key, value), junk, strict=True)
    ]
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[:, cut : cut + 5] = False
    run = functools.partial(
        feature_map_attention, feature_map=name, causal=causal, form=form, chunk_size=8
    )
    expected, found = run(query, key, value), run(*padded, key_mask=mask)
    torch.testing.assert_close(
        found.output[mask].view_as(expected.output), expected.output, rtol=1e-11, atol=1e-11
    )
    assert found.output[~mask].abs().max() == 0
    torch.testing.assert_close(found.final_state, expected.final_state, rtol=1e-11, atol=1e-11)


@both
@maps
@pytest.mark.parametrize("form", MANY)
def test_rows_without_a_token_are_zeros(form: Form, name: str, causal: bool) -> None:
    """Catches 0 / 0 in a row of padding, forward or backward."""
    query, key, value = (x.requires_grad_() for x in tensors(9))
    mask = torch.tensor([[True] * 9, [False] * 9])
    output, state = feature_map_attention(
        query, key, value, name, causal=causal, key_mask=mask, form=form
    )
    assert output[1].abs().max() == 0 and state.key_value[1].abs().max() == 0
    for gradient in torch.autograd.grad(output.sum(), (query, key, value)):
        assert gradient.isfinite().all() and gradient[1].abs().max() == 0


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_based_taylor_kernel_identity(width: int) -> None:
    """Catches a wrong scale or packing of the products: the kernel is 1 + s + s^2 / 2, at least
    1/2, from 153 features for 16."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(50, width, generator=generator).double() for _ in range(2))
    scores = query @ key.T / width**0.5
    found = taylor_features(query) @ taylor_features(key).T
    torch.testing.assert_close(found, 1 + scores + scores**2 / 2, rtol=1e-12, atol=1e-12)
    cheap = FEATURE_MAPS["taylor"].kernel
    assert cheap is not None
    torch.testing.assert_close(cheap(query, key), found, rtol=1e-12, atol=1e-12)
    assert found.min() >= 0.5 - 1e-12
    assert taylor_features(query).shape[-1] == taylor_size(width)
    assert taylor_size(16) == 153


def test_elu_map_keeps_small_features_and_one_slope() -> None:
    """Catches elu(x) + 1 computed as such, which is 0 in float32 below -17, and a double gradient
    at 0."""
    x = torch.tensor([-60.0, -20.0, -1.0, 0.0, 2.0], requires_grad=True)
    features = FEATURE_MAPS["elu"].features(x)
    expected = torch.tensor([-60.0, -20.0, -1.0, 0.0]).exp()
    torch.testing.assert_close(features[:4].detach(), expected, rtol=1e-6, atol=0)
    assert features[4] == 3
    (slope,) = torch.autograd.grad(features.sum(), x)
    torch.testing.assert_close(slope, torch.cat((expected, torch.ones(1))), rtol=1e-6, atol=0)


# --- other people's code --------------------------------------------------------------------------


@functools.cache
def naive(operation: str, function: str) -> Callable[..., Any]:
    """Load a function of ``fla/ops/<operation>/naive.py`` by path; importing fla needs triton."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs fla's reference files: pip install --no-deps fla-core einops")
    pytest.importorskip("einops")
    path = Path(spec.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    source = path.read_text().replace("torch.float32", "torch.float64")
    namespace: dict[str, Callable[..., Any]] = {}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace[function]


@pytest.mark.parametrize("normalize", [True, False])
def test_based_equals_fla(normalize: bool) -> None:
    """Catches a reading of Based that its implementers do not share. fla adds 1e-6 to the sum."""
    query, key, value = tensors(100, key=16, value=8)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    expected = naive("based", "naive_parallel_based")(*heads_first, use_norm=normalize)
    found = feature_map_attention(query, key, value, "taylor", normalize=normalize)
    torch.testing.assert_close(
        found.output, expected.transpose(1, 2), rtol=1e-5, atol=1e-5 if normalize else 1e-10
    )
    same_eps = feature_map_attention(query, key, value, "taylor", normalize=normalize, eps=1e-6)
    torch.testing.assert_close(same_eps.output, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_elu_formula_equals_fla(normalize: bool) -> None:
    """Catches a state or normaliser that others understand differently, carried over included.
    fla's scale multiplies numerator and sum alike, so 1 makes its epsilon ours."""
    query, key, value = tensors(50)
    features = [FEATURE_MAPS["elu"].features(x) for x in (query, key)]
    loop = naive("linear_attn", "naive_recurrent_linear_attn")
    first: FeatureMapResult | None = None
    state = None
    for part in (slice(0, 23), slice(23, 50)):
        expected, state = loop(
            *(x[:, part] for x in (*features, value)),
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            normalize=normalize,
        )
        first = feature_map_attention(
            *(x[:, part] for x in (query, key, value)),
            initial_state=None if first is None else first.final_state,
            normalize=normalize,
            eps=1e-10,
        )
        torch.testing.assert_close(first.output, expected, rtol=1e-11, atol=1e-11)
    assert first is not None
    sums = state[0] if normalize else state
    torch.testing.assert_close(first.final_state.key_value, sums, rtol=1e-11, atol=1e-11)


# --- misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "relu"}, "'relu' does not exist: use one of elu, taylor"),
        ({"form": "scan"}, "'scan' does not exist"),
        ({"form": "step"}, "takes one token, not 4"),
        ({"key": torch.zeros(2, 4, 3, 5)}, r"key has shape \[2, 4, 3, 5\], expected"),
        ({"value": torch.zeros(2, 4, 3)}, "expected four dimensions"),
        ({"query": torch.zeros(2, 4, 3, 0)}, "the last two not 0"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, r"key_mask has shape \[2, 5\]"),
        ({"key_mask": torch.ones(2, 4)}, r"pass key_mask.bool\(\)"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0 must be positive"),
        (
            {"initial_state": FeatureMapState(torch.zeros(2, 3, 6, 5), torch.zeros(2, 3, 7))},
            "key_sum has shape",
        ),
        (
            # What the published code stores after a prompt: keys that were not mapped.
            {
                "feature_map": "taylor",
                "initial_state": FeatureMapState(torch.zeros(2, 3, 6, 5), torch.zeros(2, 3, 6)),
            },
            r"key_value has shape \[2, 3, 6, 5\], expected \[2, 3, 28, 5\]",
        ),
    ],
)
def test_misuse_is_refused(change: dict[str, Any], message: str) -> None:
    """Catches sizes that only fail deep inside, or broadcast to a wrong result."""
    query, key, value = (x.float() for x in tensors(4))
    arguments = {"query": query, "key": key, "value": value} | change
    with pytest.raises(UserError, match=message):
        feature_map_attention(**arguments)


@maps
def test_no_token_and_low_precision(name: str) -> None:
    """Catches a crash on empty pieces, and sums that are kept in bfloat16."""
    query, key, value = (x.bfloat16() for x in tensors(300))
    empty = feature_map_attention(*(x[:, :0] for x in (query, key, value)), name)
    assert empty.output.shape == (2, 0, 3, 5) and empty.final_state.key_sum.abs().max() == 0
    exact = feature_map_attention(query.double(), key.double(), value.double(), name)
    found = feature_map_attention(query, key, value, name)
    assert found.output.dtype == torch.bfloat16
    assert found.final_state.key_value.dtype == torch.float32
    torch.testing.assert_close(found.output.double(), exact.output, rtol=5e-3, atol=1e-5)
