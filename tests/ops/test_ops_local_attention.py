"""Backends of local attention agree, and blocks are cut as they should be.

Shapes: B batch, T queries, P keys, H query heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.local_attention import block_size, local_attention
from rxlm.ops.local_attention_flex import flex_local_attention
from rxlm.ops.local_pattern import Decay, LocalPattern, ScoreChanges

PATTERNS = [
    LocalPattern.sliding(1),
    LocalPattern.sliding(7),
    LocalPattern.sliding(90),
    LocalPattern.sliding(9, causal=False),
    LocalPattern(5, 5, 5, causal=False, exact=False),
    LocalPattern(16, 32, 0, causal=True, exact=False),
    LocalPattern(100, 100, 0, causal=True, exact=False),
    LocalPattern(100, 0, 100, causal=False, exact=False),
]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def tensors(batch: int, queries: int, keys: int, heads: int = 4, groups: int = 2) -> list[Tensor]:
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    made = [torch.randn(batch, *shape, 6, dtype=torch.float64) for shape in shapes]
    return [part.requires_grad_() for part in made]


def changes_of(data: st.DataObject, pattern: LocalPattern, queries: int, keys: int) -> ScoreChanges:
    width = pattern.window + pattern.back + pattern.forward
    with_bias = data.draw(st.booleans())
    return ScoreChanges(
        torch.rand(2, keys) > 0.3 if data.draw(st.booleans()) else None,
        torch.rand(queries, keys) > 0.2 if data.draw(st.booleans()) else None,
        torch.randn(4, pattern.window, width, dtype=torch.float64) if with_bias else None,
    )


def results(function: Any, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    out = function(q, k, v)
    return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), (q, k, v))]


@patterns
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_backends_blocks_and_sdpa_agree(pattern: LocalPattern, data: st.DataObject) -> None:
    """Catches blocks that miss or repeat keys, with earlier keys, grouped heads, masks, biases and
    rows whose windows begin at different tokens; outputs and gradients."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    queries = data.draw(st.sampled_from([1, 2, 63, 100, 257]))
    past = data.draw(st.sampled_from([0, 0, 1, 30]))
    changes = changes_of(data, pattern, queries, queries + past)
    if data.draw(st.booleans()):
        changes = changes._replace(hide_self=True, decay=Decay(torch.rand(6) * 0.05))
    start = torch.tensor([past + 3, past]) if data.draw(st.booleans()) else None
    groups = data.draw(st.sampled_from([1, 2, 4]))
    parts = tensors(2, queries, queries + past, groups=groups)
    found, expected = (
        results(
            lambda q, k, v, name=name: local_attention(
                q, k, v, pattern, changes, start=start, backend=name
            ),
            *parts,
        )
        for name in ("blocks", "sdpa")
    )
    tolerance = 1e-6 if changes.decay is not None else 1e-10
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", PATTERNS[1::2], ids=str)
def test_backends_flex_rules(pattern: LocalPattern) -> None:
    """Catches masks of FlexAttention that say something else; run without its compiler."""
    torch.manual_seed(0)
    queries, past = 70, 20
    q, k, v = (part.detach().float() for part in tensors(2, queries, queries + past))
    width = pattern.window + pattern.back + pattern.forward
    key_mask = torch.rand(2, queries + past) > 0.2
    key_mask[0, :40] = False
    changes = ScoreChanges(
        key_mask, torch.rand(queries, queries + past) > 0.2, torch.randn(4, pattern.window, width)
    )
    start = torch.tensor([23, 20])
    found = flex_local_attention(q, k, v, pattern, changes, start=start, compiled=False)
    expected = local_attention(q, k, v, pattern, changes, start=start)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@patterns
def test_backends_flex_on_gpu(pattern: LocalPattern) -> None:
    """Catches a compiled kernel that disagrees with blocks; forward and gradients."""
    if not torch.cuda.is_available():
        pytest.skip("FlexAttention is compiled for CUDA, and this PyTorch sees no CUDA device")
    parts = [torch.randn(2, 300, 4, 64, device="cuda", requires_grad=True) for _ in range(3)]
    flex, blocks = (
        results(lambda q, k, v, name=name: local_attention(q, k, v, pattern, backend=name), *parts)
        for name in ("flex", "blocks")
    )
    for one, two in zip(flex, blocks, strict=True):
        torch.testing.assert_close(one, two, atol=5e-3, rtol=5e-3)


def test_backends_never_replace_one_another() -> None:
    """Catches a backend that is silently another."""
    q, k, v = tensors(1, 4, 4)
    pattern = LocalPattern.sliding(2)
    with pytest.raises(UserError, match="built for CUDA; use backend='blocks'"):
        local_attention(q, k, v, pattern, backend="flex")
    with pytest.raises(UserError, match="backend 'fast' does not exist"):
        local_attention(q, k, v, pattern, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no decay"):
        flex_local_attention(q, k, v, pattern, ScoreChanges(decay=Decay(torch.ones(6))))
    with pytest.raises(UserError, match="no shared_qk"):
        flex_local_attention(q, k, v, pattern, ScoreChanges(hide_self=True))
    with pytest.raises(UserError, match="multiple of the key heads"):
        flex_local_attention(q[:, :, :1], k, v, pattern, ScoreChanges())


@pytest.mark.parametrize("causal", [True, False])
def test_sliding_window_counts_the_token_itself(causal: bool) -> None:
    """Catches a window of one token too many."""
    seen = LocalPattern.sliding(3, causal=causal).visible(torch.arange(9), torch.arange(9))
    assert seen[4].nonzero().flatten().tolist() == ([2, 3, 4] if causal else [2, 3, 4, 5, 6])


def test_steep_decay_makes_blocks_short() -> None:
    """Catches factors that overflow within a block: the largest is bounded by exp(40)."""
    pattern = LocalPattern.sliding(256)
    assert block_size(pattern) == 64
    assert block_size(pattern, Decay(torch.tensor([0.0, 4.0]))) == 10
    assert block_size(pattern, Decay(torch.tensor([1e9]))) == 1


def test_decay_is_that_of_the_distance() -> None:
    """Catches decay relative to the wrong key when there are keys before the first query, and
    factors that overflow where the product does not."""
    pattern = LocalPattern.sliding(256)
    q, k, v = (part.detach().float() for part in tensors(1, 400, 600, groups=4))
    rate = torch.tensor([0.0, 0.1, 1.0, 4.0, 20.0, 80.0])
    found = local_attention(q, k, v, pattern, ScoreChanges(decay=Decay(rate)))
    places = torch.arange(600)
    distance = (places[200:, None] - places).clamp(min=0)
    factor = torch.exp(-rate * distance[..., None])
    scores = torch.einsum("thk,phk,tpk->htp", q[0], k[0], factor) * 6**-0.5
    scores = scores.masked_fill(~pattern.visible(places[200:], places), -torch.inf)
    expected = torch.einsum("htp,phk->thk", scores.softmax(dim=-1), v[0])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
