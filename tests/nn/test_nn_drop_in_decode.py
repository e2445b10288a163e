"""Padding and decoding of the drop-in layer: neither changes a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.drop_in.delta_rule import DeltaRuleCache
from rxlm.nn.drop_in.layer import LinearAttention
from rxlm.nn.drop_in.masks import real_tokens
from rxlm.nn.drop_in.operator_modes import OPERATOR_MODES

DIM = 12
MODES = tuple(OPERATOR_MODES)
MIN = torch.finfo(torch.float32).min


def make(**options: Any) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(DIM, 4, num_key_value_heads=2, **options).eval()


def inputs(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


def additive(mask: Tensor, *, causal: bool) -> Tensor:
    """What transformers makes of a mask over tokens: ``[B, 1, T, T]``, 0 where visible."""
    length = mask.shape[1]
    visible = mask[:, None, None, :].expand(-1, 1, length, -1).bool()
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(visible.shape).masked_fill(~visible, MIN)


FORMS = {
    "bool": lambda mask: mask.bool(),
    "int": lambda mask: mask,
    "uint8": lambda mask: mask.to(torch.uint8),
    "float": lambda mask: mask.float(),
    "float over one dimension more": lambda mask: mask.float()[:, None],
    "negative float": lambda mask: torch.zeros(mask.shape).masked_fill(mask == 0, -1e9),
    "additive, causal": lambda mask: additive(mask, causal=True),
    "additive": lambda mask: additive(mask, causal=False),
    "additive over keys": lambda mask: additive(mask, causal=False)[:, :, :1],
    "visible pairs": lambda mask: additive(mask, causal=True) == 0,
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_every_form_is_neutral(form: str, side: str) -> None:
    """Float masks that are ignored (T5), or left padding that reaches the keys (T6), would show."""
    for bidirectional in (False, True):
        layer = make(operator_mode="gated_delta_product", bidirectional=bidirectional)
        x = inputs(11)
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[1, slice(0, 4) if side == "left" else slice(7, 11)] = 0
        x[mask == 0] = 1e4  # padding may hold anything
        y = layer(x, attn_mask=FORMS[form](mask))
        torch.testing.assert_close(y[:1], layer(x[:1]), rtol=0, atol=1e-5)
        real = mask[1].bool()
        torch.testing.assert_close(y[1:, real], layer(x[1:, real]), rtol=0, atol=1e-5)
        assert not y[1, ~real].any()


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(mode=st.sampled_from(MODES), bidirectional=st.booleans(), seed=st.integers(0, 99))
def test_padding_anywhere_is_neutral(mode: str, bidirectional: bool, seed: int) -> None:
    """Gates, differences or a nonlinear state that look across holes would show, in any mode."""
    layer = make(operator_mode=mode, bidirectional=bidirectional)
    x = inputs(17, batch=3)
    mask = torch.rand(3, 17, generator=torch.Generator().manual_seed(seed)) > 0.4
    x[~mask] = float("nan")
    y = layer(x, attn_mask=mask)
    assert y.isfinite().all()
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(y[row, mask[row]], alone, rtol=0, atol=1e-5)


def test_padding_gets_no_gradient() -> None:
    """Padding that trains the weights would show."""
    layer = make()
    x = inputs(9).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    (gradient,) = torch.autograd.grad(layer(x, mask).square().sum(), [x])
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)


def test_masks_of_the_wrong_shape_or_value_are_one_clear_error() -> None:
    """A mask that broadcasts by accident, or of dropped tokens instead of real ones, would pass."""
    layer, x = make(), inputs(5)
    for shape in ((2, 4), (3, 5), (5,), (2, 1, 4, 5), (2, 4, 5, 5), (2, 5, 5)):
        with pytest.raises(UserError, match="attn_mask has shape"):
            layer(x, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(UserError, match="contains 2, expected 0 and 1"):
        layer(x, torch.full((2, 5), 2))
    with pytest.raises(UserError, match="contains 0\\.5"):
        layer(x, torch.full((2, 5), 0.5))
    with pytest.raises(UserError, match="contains 1, expected 0 where visible"):
        layer(x, torch.ones(2, 1, 1, 5))


# --- decoding ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_decode_token_by_token_equals_prefill(mode: str) -> None:
    """A state that is dropped between steps (T3), or lost neighbours of gates and differences (T4),
    would show; also after a prefill of any length."""
    layer, x = make(operator_mode=mode), inputs(20)
    expected = layer(x)
    for prefill in (0, 1, 2, 7):
        outputs, cache = [], None
        if prefill:
            y, cache = layer(x[:, :prefill], return_cache=True)
            outputs.append(y)
        for token in range(prefill, 20):
            y, cache = layer(x[:, token : token + 1], cache=cache, return_cache=True)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(MODES), cuts=st.lists(st.integers(0, 25), max_size=4), padded=st.booleans()
)
def test_decode_in_ragged_pieces_equals_prefill(mode: str, cuts: list[int], padded: bool) -> None:
    """Pieces of which some are empty, short, or padded differently per row would show."""
    layer, x = make(operator_mode=mode), inputs(25)
    mask = torch.rand(2, 25, generator=torch.Generator().manual_seed(len(cuts))) > 0.3
    mask = mask if padded else torch.ones_like(mask)
    expected = layer(x, attn_mask=mask)
    ends = sorted(cuts)
    outputs, cache = [], None
    for start, end in zip([0, *ends], [*ends, 25], strict=True):
        y, cache = layer(
            x[:, start:end],
            attn_mask=mask[:, start:end] if padded else None,
            cache=cache,
            return_cache=True,
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)
    assert cache is not None and torch.equal(cache.num_tokens, mask.sum(1))


@torch.no_grad()
def test_decode_with_a_mask_over_the_past_reads_its_end() -> None:
    """A mask over all tokens so far, as loops over generate keep it, that is read from the start
    would show."""
    layer, x = make(), inputs(6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    _, cache = layer(x[:, :4], attn_mask=mask[:, :4], return_cache=True)
    expected = layer(x, attn_mask=mask)[:, 4:]
    for late in (mask, additive(mask, causal=True)[:, :, 4:]):
        y = layer(x[:, 4:], attn_mask=late, cache=cache)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_decode_reorders_resets_and_leaves_the_cache_alone() -> None:
    """A cache that the layer keeps or changes, as a beam search would notice, would show."""
    layer, x = make(operator_mode="delta_product"), inputs(9, batch=3)
    _, cache = layer(x[:, :5], return_cache=True)
    copies = [tensor.clone() for tensor in cache]
    rows = [2, 0, 0]
    chosen = layer(x[rows, 5:], cache=cache.select(rows))
    torch.testing.assert_close(chosen, layer(x[rows])[:, 5:], rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(cache, copies, strict=True))
    assert torch.equal(layer(x[:, 5:]), layer(x[:, 5:]))  # without a cache: from the start
    assert not torch.allclose(layer(x[:, 5:]), layer(x[:, 5:], cache=cache))
    _, longer = layer(x[:, 5:], cache=cache, return_cache=True)
    assert longer.num_bytes == cache.num_bytes


def test_decode_passes_gradients_through_the_cache() -> None:
    """Detached states, which cut training over pieces (T3), would show."""
    layer, x = make(), inputs(8).requires_grad_()
    _, cache = layer(x[:, :5], return_cache=True)
    (pieces,) = torch.autograd.grad(layer(x[:, 5:], cache=cache).sum(), [x])
    (whole,) = torch.autograd.grad(layer(x)[:, 5:].sum(), [x])
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert not any(tensor.requires_grad for tensor in cache.detach())


def test_bad_caches_are_one_clear_error() -> None:
    """A cache of another layer or batch that broadcasts would show."""
    layer, x = make(), inputs(3)
    _, cache = layer(x, return_cache=True)
    with pytest.raises(UserError, match="belongs to another layer"):
        layer(x[:1], cache=cache)
    with pytest.raises(UserError, match="belongs to another layer"):
        make(order=5)(x, cache=cache)
    both = make(bidirectional=True)
    for options in ({"cache": cache}, {"return_cache": True}):
        with pytest.raises(UserError, match="both directions"):
            both(x, **options)
    assert isinstance(cache, DeltaRuleCache)


def test_no_mask_stays_no_mask() -> None:
    """A mask made of nothing, which costs a sort of the tokens, would show."""
    assert real_tokens(None, 2, 3) is None
