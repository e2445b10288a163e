"""``LocalMHA`` and decoding: 1,000 steps equal one call, in constant memory, whatever the options.

Shapes: B batch, T tokens, D = 8, H = 2, W window.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn import LocalAttention, LocalMHA
from rxlm.nn.local_cache import LocalCache

OPTIONS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "no positions": {"use_rotary_pos_emb": False},
    "xpos": {"use_xpos": True, "xpos_scale_base": 5.0},
    "qk-norm": {"qk_rmsnorm": True, "qk_scale": 3.0},
    "gates": {"gate_values_per_head": True, "gate_output": True, "prenorm": True},
    "two windows": {"look_backward": 2, "qk_rmsnorm": True, "use_xpos": True},
    "shared": {"shared_qk": True},
}
exactness = pytest.mark.parametrize("exact", [True, False])


def block_of(exact: bool = True, window: int = 6, **named: Any) -> LocalMHA:
    torch.manual_seed(0)
    block = LocalMHA(
        dim=8, window_size=window, dim_head=4, heads=2, causal=True, exact_windowsize=exact, **named
    )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("_scale"):  # Ones would hide a factor that is forgotten.
                parameter.uniform_(0.5, 1.5)
    return block.double().eval()


LONG = {
    "rotary": {},
    "everything": {
        **OPTIONS["qk-norm"], **OPTIONS["xpos"], **OPTIONS["gates"], "look_backward": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "length"),
    [
        *(pytest.param(option, 60, id=name) for name, option in OPTIONS.items()),
        *(pytest.param(option, 1000, id=f"{name}-1000") for name, option in LONG.items()),
    ],
)
@exactness
def test_decode_steps_equal_one_call(option: dict[str, Any], exact: bool, length: int) -> None:
    """Catches keys rotated twice (A10), a forgotten scale of normed queries (A11), windows that
    begin at the wrong token, and a cache that grows: all from the second cached token on."""
    block = block_of(exact, **option)
    x = torch.randn(2, length, 8).double()
    with torch.no_grad():
        expected = block(x)
        cache, steps, sizes = None, [], set()
        for t in range(length):
            y, cache = block(x[:, t : t + 1], cache=cache, return_cache=True)
            steps.append(y)
            sizes.add(cache.num_bytes)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-9, atol=1e-10)
    assert len(sizes) == 1
    assert cache is not None and cache.lengths.tolist() == [length] * 2


@exactness
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_decode_of_padded_pieces_equals_each_row_alone(exact: bool, seed: int) -> None:
    """Catches padding, on either side or in between, that moves positions or windows, and rows of a
    batch whose windows begin at different tokens."""
    draw = random.Random(seed)
    option = draw.choice(list(OPTIONS.values()))
    block = block_of(exact, window=draw.choice([1, 3, 6]), **option)
    lengths = [draw.randint(1, 25) for _ in range(draw.randint(2, 3))]
    rows = [torch.randn(1, length, 8).double() for length in lengths]
    taken, cache = [0] * len(rows), None
    seen: list[list[Tensor]] = [[] for _ in rows]
    while any(count < length for count, length in zip(taken, lengths, strict=True)):
        size = draw.randint(1, 9)
        x = torch.full((len(rows), size, 8), 9.0).double()
        mask = torch.zeros(len(rows), size, dtype=torch.bool)
        for r, row in enumerate(rows):
            wanted = draw.randint(0, size)
            piece = row[0, taken[r] : taken[r] + wanted]
            places = sorted(draw.sample(range(size), len(piece)))
            x[r, places], mask[r, places] = piece, True
            taken[r] += len(piece)
        with torch.no_grad():
            y, cache = block(x, mask, cache=cache, return_cache=True)
        for r in range(len(rows)):
            seen[r].append(y[r, mask[r]])
    for r, row in enumerate(rows):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(seen[r]), block(row)[0], rtol=1e-9, atol=1e-10)


@exactness
def test_decode_with_bias(exact: bool) -> None:
    """Catches a bias that is read at the wrong place of the window once there is a cache."""
    block = block_of(exact)
    x, bias = torch.randn(3, 25, 8).double(), torch.randn(2, 6, 12).double()
    expected = block(x, attn_bias=bias)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :3] = mask[2, 6:] = False  # The rows stand at different places of their windows.
    first, cache = block(x[:, :8], mask, attn_bias=bias, return_cache=True)
    torch.testing.assert_close(first[0], expected[0, :8])
    x = torch.stack([torch.cat((x[r, :8][mask[r]], x[r, 8:20])) for r in range(3)][:1])
    rest, _ = block(x[:, 8:], attn_bias=bias, cache=cache.select([0]), return_cache=True)
    torch.testing.assert_close(rest, block(x, attn_bias=bias)[:, 8:])
    for row, start in ((1, 5), (2, 6)):
        new = torch.randn(1, 9, 8).double()
        past = torch.randn(1, start, 8).double()
        _, own = block(past, attn_bias=bias, return_cache=True)
        _, other = block(torch.randn(1, 3 + row, 8).double(), attn_bias=bias, return_cache=True)
        both = LocalCache(*(torch.cat(parts) for parts in zip(own, other, strict=True)))
        together, _ = block(new.repeat(2, 1, 1), attn_bias=bias, cache=both, return_cache=True)
        whole = block(torch.cat((past, new), dim=1), attn_bias=bias)
        torch.testing.assert_close(together[:1], whole[:, start:])


def test_decode_cache_is_a_value() -> None:
    """Catches a cache that a step changes, rows that cannot be chosen, a size that is not what the
    window says, and a graph that is kept."""
    block = block_of(False, look_backward=2)
    x = torch.randn(3, 20, 8).double()
    _, cache = block(x, return_cache=True)
    assert isinstance(cache, LocalCache)
    copies = [part.clone() for part in cache]
    new = torch.randn(3, 1, 8).double()
    y, _ = block(new, cache=cache, return_cache=True)
    assert all(torch.equal(one, two) for one, two in zip(copies, cache, strict=True))
    chosen, after = block(new[[2, 0, 2]], cache=cache.select([2, 0, 2]), return_cache=True)
    torch.testing.assert_close(chosen, y[[2, 0, 2]])
    assert after.lengths.tolist() == [21] * 3
    # Keys and values of the windows behind and the own one up to the token before: 2 W + W - 1.
    assert cache.key.shape == (3, 2 * 6 + 5, 2, 4)
    assert block_of()(x, return_cache=True)[1].key.shape[1] == 6
    assert cache.num_bytes == 3 * 17 * 2 * 4 * 8 * 2 + 3 * 8
    assert cache.key.requires_grad and not cache.detach().key.requires_grad


@pytest.mark.parametrize("causal", [True, False])
def test_decode_padding_changes_nothing_without_cache(causal: bool) -> None:
    """Catches left padding that shifts windows, and padding that is seen without causality."""
    torch.manual_seed(0)
    block = LocalMHA(
        dim=8, window_size=4, dim_head=4, heads=2, causal=causal, exact_windowsize=False
    ).double()
    x = torch.randn(2, 13, 8).double()
    padded = torch.cat((torch.full((2, 3, 8), 5.0).double(), x, x), dim=1)
    mask = torch.zeros(2, 29, dtype=torch.bool)
    mask[:, 3:16] = True
    torch.testing.assert_close(block(padded, mask)[:, 3:16], block(x))


def test_decode_loads_weights_of_the_package() -> None:
    """Catches renamed parameters."""
    block = block_of(qk_rmsnorm=True, gate_values_per_head=True, prenorm=True)
    names = {
        "norm.weight", "norm.bias", "to_qkv.weight", "q_scale", "k_scale", "to_v_gate.0.weight",
        "to_v_gate.0.bias", "to_out.weight",
    }  # fmt: skip
    assert set(block.state_dict()) == names
    frequencies = {"attn_fn.rel_pos.inv_freq": torch.ones(2)}
    block.load_state_dict({**block.state_dict(), **frequencies})


def test_decode_misuse() -> None:
    """Catches caches where none can be, and shapes that are broadcast."""
    two_ways = LocalMHA(dim=8, window_size=4, heads=2, dim_head=4)
    x = torch.randn(2, 5, 8)
    with pytest.raises(UserError, match="return_cache=True needs causal=True"):
        two_ways(x, return_cache=True)
    _, cache = block_of().float()(x, return_cache=True)
    with pytest.raises(UserError, match="a cache needs causal=True"):
        two_ways(x, cache=cache)
    compat = LocalMHA(
        dim=8, window_size=4, heads=2, dim_head=4, causal=True, compat="local-attention"
    )
    assert compat(x).shape == x.shape
    with pytest.raises(UserError, match="has no cache"):
        compat(x, return_cache=True)
    attention = LocalAttention(4, True)
    with pytest.raises(UserError, match=r"expected \[batch, heads, tokens, dim\]"):
        attention.extend(x, x, x)
    q = torch.randn(2, 2, 5, 4)
    with pytest.raises(UserError, match="mask of 1 rows for a batch of 2"):
        attention.extend(q, q, q, mask=torch.ones(1, 5).bool())
