"""Linear attention in pieces, in padded batches and in both directions.

Not here: what one sequence gives (test_nn_linear_attention).

Shapes: B batch, T tokens, D = 12, W width of the short convolution.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.nn.recurrent_cache import RecurrentCache

MECHANISMS = ("gla", "deltanet", "gated_deltanet", "kda")
DIM = 12


def module_of(mechanism: str, **fields: Any) -> LinearSelfAttention:
    """Return a float64 module, so that equal means equal."""
    torch.manual_seed(0)
    sizes = {"dim": DIM, "num_heads": 2, "key_dim": 3, "value_dim": 4}
    return LinearSelfAttention(LinearAttentionSettings(mechanism, **{**sizes, **fields})).double()


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)


def assert_same_cache(one: RecurrentCache | None, other: RecurrentCache | None) -> None:
    assert one is not None and other is not None
    assert_same(one.state, other.state)
    assert_same(one.recent, other.recent)


@given(
    mechanism=st.sampled_from(MECHANISMS),
    conv_size=st.sampled_from([None, 1, 2, 4]),
    mode=st.sampled_from(["chunk", "fused"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_padded_batches_in_pieces_equal_each_row_at_once(
    mechanism: str, conv_size: int | None, mode: str, data: st.DataObject
) -> None:
    """Catches padding that decays the state or enters the convolution, on either side or inside,
    before or after other tokens, and a cache that loses what a split leaves behind."""
    module = module_of(mechanism, conv_size=conv_size, mode=mode)
    num_pieces = data.draw(st.integers(1, 4))
    seen: list[list[Tensor]] = [[], []]
    outputs: list[list[Tensor]] = [[], []]
    cache = None
    for _ in range(num_pieces):
        length = data.draw(st.sampled_from([1, 1, 3, 6]))
        flags = st.lists(st.booleans(), min_size=length, max_size=length)
        mask = torch.tensor([data.draw(flags), data.draw(flags)])
        x = torch.randn(2, length, DIM, dtype=torch.float64)
        y, cache = module(x, mask, cache)
        assert not y[~mask].any()
        for row in range(2):
            seen[row].append(x[row, mask[row]])
            outputs[row].append(y[row, mask[row]])
    for row in range(2):
        whole, alone = module(torch.cat(seen[row])[None])
        assert_same(torch.cat(outputs[row]), whole[0])
        assert_same_cache(cache.select([row]), alone)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients_do_not_see_padding(mechanism: str) -> None:
    """Catches padding that changes a gradient: of weights, of real tokens, of the carried state."""
    module = module_of(mechanism)
    real = torch.randn(1, 7, DIM, dtype=torch.float64)
    weights = torch.randn(1, 7, DIM, dtype=torch.float64)
    start = module(torch.randn(1, 5, DIM, dtype=torch.float64))[1].detach()
    results = []
    for before, after in ((0, 0), (3, 0), (0, 3), (2, 2)):
        junk = [torch.randn(1, n, DIM, dtype=torch.float64) for n in (before, after)]
        x = torch.cat((junk[0], real, junk[1]), dim=1).requires_grad_()
        mask = torch.zeros(1, x.shape[1], dtype=torch.bool)
        mask[:, before : before + 7] = True
        carried = RecurrentCache(*(part.clone().requires_grad_() for part in start))
        y, cache = module(x, mask, carried)
        loss = (y[:, before : before + 7] * weights).sum() + cache.state.square().sum()
        inputs = [*module.parameters(), carried.state, carried.recent, x]
        *gradients, of_x = torch.autograd.grad(loss, inputs)
        assert not of_x[~mask].any()
        results.append([*gradients, of_x[:, before : before + 7]])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("conv_size", [None, 4])
def test_a_cache_is_a_value_of_constant_size(conv_size: int | None) -> None:
    """Catches a cache that a step changes, that grows, or that keeps the prompt alive."""
    module = module_of("kda", conv_size=conv_size)
    with torch.no_grad():
        _, cache = module(torch.randn(2, 50, DIM, dtype=torch.float64))
        kept = [part.clone() for part in cache]
        size, later = cache.num_bytes, cache
        for _ in range(200):
            _, later = module(torch.randn(2, 1, DIM, dtype=torch.float64), None, later)
    assert later.num_bytes == size == 8 * 2 * (2 * 3 * 4 + (0 if conv_size is None else 3 * 20))
    for part in (*cache, *later):
        assert part.untyped_storage().nbytes() == part.numel() * 8
    assert all(torch.equal(one, two) for one, two in zip(kept, cache, strict=True))
    swapped = later.select([1, 0, 1])
    assert torch.equal(swapped.state[0], swapped.state[2])
    assert torch.equal(swapped.state[:2], later.state.flip(0))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("mode", ["chunk", "fused"])
def test_what_a_token_sees(mechanism: str, mode: str) -> None:
    """Catches a causal layer that sees the future, and an encoder layer that does not."""
    for bidirectional in (False, True):
        module = module_of(mechanism, bidirectional=bidirectional, mode=mode)
        x = torch.randn(1, 9, DIM, dtype=torch.float64, requires_grad=True)
        y, _ = module(x)
        scores = (y[0] * torch.randn(9, DIM, dtype=torch.float64)).sum(-1)
        reached = torch.stack(
            [torch.autograd.grad(s, x, retain_graph=True)[0][0].abs().sum(-1) for s in scores]
        )
        expected = torch.ones(9, 9, dtype=torch.bool)
        assert torch.equal(reached > 0, expected if bidirectional else expected.tril())


@given(mechanism=st.sampled_from(MECHANISMS), conv_size=st.sampled_from([None, 3, 4]),
       data=st.data())  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_both_directions_do_not_see_padding(
    mechanism: str, conv_size: int | None, data: st.DataObject
) -> None:
    """Catches a reversed row that starts in its padding with a decay, or a delayed query that
    reads across it."""
    module = module_of(mechanism, conv_size=conv_size, bidirectional=True)
    length = data.draw(st.integers(1, 7))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(flags) for _ in range(3)])
    x = torch.randn(3, length, DIM, dtype=torch.float64)
    y, cache = module(x, mask)
    assert cache is None and not y[~mask].any()
    for row in range(3):
        if mask[row].any():
            assert_same(y[row, mask[row]], module(x[row : row + 1, mask[row]])[0][0])


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_each_token_counts_once_in_both_directions(mechanism: str) -> None:
    """Catches a token that is read by both scans, or by none: forward over the sequence, plus
    forward over the reversed sequence read one step earlier, is the definition."""
    module = module_of(mechanism, bidirectional=True, conv_size=None)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    query, key, value, _ = module._project(x, None, None)
    expected = module._operate(query, key, value, module.gates(x), None, None).output
    for t in range(5):
        # Read the state of the tokens after t with the query of t.
        after = slice(t + 1, None)
        asked = torch.zeros_like(query[:, after])
        asked[:, -1] = query[:, t]
        gates = module.backward_gates(x)
        flipped = type(gates)(*(None if gate is None else gate[:, after].flip(1) for gate in gates))
        read = module._operate(
            asked, key[:, after].flip(1), value[:, after].flip(1), flipped, None, None
        ).output[:, -1]
        expected = expected.clone()
        expected[:, t] += read
    assert_same(module(x)[0], module._finish(x, expected))


@pytest.mark.parametrize(
    ("mechanism", "key_dim", "count"),
    [("gla", 32, 25_088), ("deltanet", 64, 16_384), ("gated_deltanet", 64, 32_800),
     ("kda", 64, 148_496)],
)  # fmt: skip
def test_the_second_direction_costs_a_set_of_gates(
    mechanism: str, key_dim: int, count: int
) -> None:
    """Catches a second direction with projections of its own (the counts of the documentation)."""
    sizes = []
    for bidirectional in (False, True):
        with torch.device("meta"):
            module = LinearSelfAttention(
                LinearAttentionSettings(
                    mechanism, 1024, 16, key_dim, 64, bidirectional=bidirectional
                )
            )
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
    assert sizes[1] - sizes[0] == count


def test_both_directions_have_no_cache() -> None:
    """Catches decoding with a layer that has to see what is not written yet."""
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    cache = module_of("kda")(x)[1]
    with pytest.raises(UserError, match="both directions has no cache"):
        module_of("kda", bidirectional=True)(x, None, cache)
