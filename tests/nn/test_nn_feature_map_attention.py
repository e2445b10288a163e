"""Layers of feature-map attention and of Based: formula, both directions, caches, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.based import (
    BasedBlock,
    BasedMixer,
    BasedSettings,
    GatedConvolution,
    based_layers,
    window_of,
)
from rxlm.nn.feature_map_attention import FeatureMapAttention, FeatureMapSettings
from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.nn.window_attention import WindowAttention
from rxlm.ops.feature_map_attention import feature_map_attention

KINDS = ("conv", "taylor", "window", "block", "based", "elu conv")
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, window: int = 5) -> nn.Module:
    torch.manual_seed(0)
    sizes = BasedSettings(dim=16, num_heads=2, window=window, feature_dim=4)
    made: nn.Module
    if kind == "conv":
        made = GatedConvolution(16)
    elif kind == "window":
        made = window_of(sizes)
    elif kind == "block":
        made = BasedBlock(sizes, based_layers(5))
    elif kind == "based":
        made = BasedMixer(sizes)
    else:
        name, conv = ("elu", 4) if kind == "elu conv" else ("taylor", None)
        made = FeatureMapAttention(
            FeatureMapSettings(16, 2, feature_map=name, feature_dim=4, conv_size=conv)
        )
    return made.double().eval()


def some_input(length: int = 23, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_elu_formula_of_the_layer_and_head_merge_order(bidirectional: bool) -> None:
    """Catches heads and time scrambled in the merge, as in seed 001, or a projection that gives a
    head the channels of another: head h is computed alone, from its own rows of the weights."""
    torch.manual_seed(0)
    settings = FeatureMapSettings(12, 3, feature_dim=5, value_dim=7, bidirectional=bidirectional)
    layer = FeatureMapAttention(settings).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    weights = layer.query_key_value.weight
    expected = torch.zeros_like(x)
    for head in range(3):
        rows = [
            slice(start + head * n, start + (head + 1) * n)
            for start, n in ((0, 5), (15, 5), (30, 7))
        ]
        query, key, value = (x @ weights[part].T for part in rows)
        pairs = (nn.functional.elu(query) + 1) @ (nn.functional.elu(key) + 1).mT
        pairs = pairs if bidirectional else pairs.tril()
        heads = pairs @ value / pairs.sum(dim=-1, keepdim=True)
        expected += heads @ layer.output.weight[:, head * 7 : (head + 1) * 7].T
    found, cache = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (cache is None) == bidirectional


def test_in_both_directions_every_token_counts_and_padding_does_not() -> None:
    """Catches a bidirectional layer that is causal, or sees padding; a cache there is an error."""
    torch.manual_seed(0)
    layer = FeatureMapAttention(
        FeatureMapSettings(16, 2, feature_map="taylor", conv_size=3, bidirectional=True)
    ).double()
    x = some_input(7).requires_grad_()
    expected, _ = layer(x)
    (gradient,) = torch.autograd.grad(expected[:, 0].sum(), x)
    assert (gradient.abs().sum(dim=-1) > 0).all()
    padded = torch.cat((torch.full((3, 4, 16), 9.0).double(), x.detach()), dim=1)
    mask = torch.arange(11).expand(3, 11) >= 4
    found, _ = layer(padded, mask)
    torch.testing.assert_close(found[:, 4:], expected, rtol=1e-10, atol=1e-11)
    assert found[:, :4].abs().max() == 0
    _, cache = layer_of("taylor")(x)
    with pytest.raises(UserError, match="no cache"):
        layer(x, cache=cache)


@kinds
def test_causal_layers_by_gradient_and_by_suffix(kind: str) -> None:
    """Catches a later token that reaches an earlier one through any part of the hybrid."""
    layer, x = layer_of(kind), some_input().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0][:, 11].sum(), x)
    assert gradient[:, :12].abs().sum() > 0 and gradient[:, 12:].abs().max() == 0
    edited = x.detach().clone()
    edited[:, 12:] += 1.0
    before, after = layer(x)[0], layer(edited)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


@kinds
@pytest.mark.parametrize("window", [1, 5, 64])
def test_pieces_padded_in_turn_equal_one_call(kind: str, window: int) -> None:
    """Catches a cache that counts padding, forgets, or mixes rows: rows of three lengths, padded
    on alternating sides, cut into pieces, against each row alone."""
    layer, x = layer_of(kind, window), some_input(40)
    lengths = ((9, 3, 6), (1, 0, 1), (12, 20, 2), (1, 1, 1), (2, 0, 9))
    starts, cache = [0, 0, 0], None
    rows: list[list[Tensor]] = [[], [], []]
    for number, counts in enumerate(lengths):
        width = max(counts) + number % 2
        piece, mask = torch.full((3, width, 16), 5.0).double(), torch.zeros(3, width).bool()
        for row, count in enumerate(counts):
            place = slice(0, count) if number % 2 else slice(width - count, width)
            piece[row, place] = x[row, starts[row] : starts[row] + count]
            mask[row, place] = True
            starts[row] += count
        y, cache = layer(piece, mask, cache)
        for row in range(3):
            rows[row].append(y[row, mask[row]])
    for row in range(3):
        expected, alone = layer(x[row : row + 1, : starts[row]])
        torch.testing.assert_close(torch.cat(rows[row]), expected[0], rtol=1e-9, atol=1e-10)
        following, _ = layer(x[row : row + 1, -2:], cache=alone)
        assert cache is not None
        found, _ = layer(x[row : row + 1, -2:], cache=cache.select([row]).detach())
        torch.testing.assert_close(found, following, rtol=1e-9, atol=1e-10)


@kinds
def test_the_decode_state_does_not_grow(kind: str) -> None:
    """Catches a cache that keeps all tokens."""
    layer, x = layer_of(kind), some_input(90)
    sizes = {layer(x[:, :length])[1].num_bytes for length in (1, 17, 90)}
    assert len(sizes) == 1 and 0 < sizes.pop()


@pytest.mark.parametrize("window", [1, 4, 70])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_based_window_is_a_band_of_exact_attention(window: int, length: int) -> None:
    """Catches a window of another width (the published code halves it), or an error between
    blocks of queries."""
    layer, x = layer_of("window", window), some_input(length, batch=1)
    assert isinstance(layer, WindowAttention)
    layer.rope_base = None
    attention = layer.attention
    query, key, value = (
        part(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for part in (attention.query, attention.key, attention.value)
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = (query @ key.mT / 8**0.5).masked_fill(
        (distance < 0) | (distance >= window), -torch.inf
    )
    heads = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(layer(x)[0], attention.output(heads), rtol=1e-10, atol=1e-11)


def test_based_mixer_is_the_sum_of_its_branches() -> None:
    """Catches a branch that is left out, or reads something else than the convolved input."""
    layer, x = layer_of("based"), some_input()
    assert isinstance(layer, BasedMixer)
    mixed = x + layer.short_convolution(x)[0]
    expected = layer.taylor(mixed)[0] + layer.window(mixed)[0]
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_based_layers_are_those_of_the_paper() -> None:
    """Catches another order than that of the published 360M model: 5, 5 and 17 layers."""
    kinds_of = based_layers(27)
    assert [i for i, kind in enumerate(kinds_of) if kind == "taylor"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds_of) if kind == "window"] == [2, 7, 12, 17, 22]
    assert kinds_of.count("conv") == 17
    assert based_layers(3) == ("conv", "taylor", "window")


# --- generation -----------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A language model of two mixers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        sizes = MixerSettings(dim=32, num_heads=2, window=16)
        self.embedding = nn.Embedding(50, 32)
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(2))
        self.mixers = nn.ModuleList(build_mixer(name, sizes) for _ in range(2))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor, caches: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        x, after = self.embedding(ids), []
        for number, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            y, cache = mixer(norm(x), cache=None if caches is None else caches[number])
            x = x + y
            after.append(cache)
        return self.head(x), after


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [
        (torch.float32, 1e-3, 3e-4),
        (torch.float16, 1e-2, 5e-4),
        (torch.bfloat16, 5e-2, 1e-2),
    ],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("prompt", [1, 128])
@pytest.mark.parametrize("name", ["elu", "taylor", "based"])
@torch.no_grad()
def test_generate_equals_full_forwards(
    name: str, prompt: int, dtype: torch.dtype, atol: float, rtol: float
) -> None:
    """Catches a decode step that is not the forward pass: 64 greedy tokens after a prompt, against
    full forwards of the tokens so far (the recipe and bounds of Based's own test, which leaves
    linear attention out). All steps against one forward, every eighth against its own."""
    torch.manual_seed(0)
    model = Tiny(name).to(dtype).eval()
    ids = torch.randint(0, 50, (2, prompt))
    scores, caches = model(ids)
    steps = []
    for step in range(64):
        if step % 8 == 0:
            full, _ = model(ids)
            torch.testing.assert_close(scores[:, -1], full[:, -1], rtol=rtol, atol=atol)
        steps.append(scores[:, -1])
        ids = torch.cat((ids, scores[:, -1:].argmax(dim=-1)), dim=1)
        scores, caches = model(ids[:, -1:], caches)
    full, _ = model(ids)
    found = torch.stack(steps, dim=1)
    torch.testing.assert_close(found, full[:, prompt - 1 : -1], rtol=rtol, atol=atol)


# --- misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "relu"}, "'relu' does not exist"),
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"dim": 0}, "dim=0 must be positive"),
        ({"feature_dim": -1}, "feature_dim=-1 must be positive"),
        ({"conv_size": 0}, "conv_size=0 must be positive"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
        ({"mode": "scan"}, "mode='scan' does not exist"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    """Catches sizes that would only fail in a forward pass."""
    with pytest.raises(UserError, match=message):
        FeatureMapSettings(**({"dim": 16, "num_heads": 2} | change))


def test_wrong_use_of_based_is_refused() -> None:
    """Catches the same for the hybrids."""
    for change, message in (
        ({"window": 0}, "window=0 must be positive"),
        ({"num_heads": 3}, "not divisible by num_heads=3"),
        ({"num_heads": 16}, "use an even width, or rope_base=None"),
    ):
        with pytest.raises(UserError, match=message):
            BasedSettings(**({"dim": 16, "num_heads": 2} | change))
    sizes = BasedSettings(16, 2)
    for wrong in ((), ("mamba",)):
        with pytest.raises(UserError, match="one of conv, taylor, window"):
            BasedBlock(sizes, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="num_layers=0"):
        based_layers(0)
    for name in ("based", "gated_conv"):
        with pytest.raises(UserError, match="set conv_size"):
            build_mixer(name, MixerSettings(16, 2, conv_size=None))
    with pytest.raises(UserError, match="taylor: expand_v x dim=16 is 9"):
        build_mixer("taylor", MixerSettings(16, 2, expand_v=9 / 16))


@kinds
def test_a_mask_that_does_not_fit_is_refused(kind: str) -> None:
    """Catches a mask that broadcasts, or numbers in place of booleans."""
    for mask in (torch.ones(3, 22).bool(), torch.ones(3, 23)):
        with pytest.raises(UserError, match=r"key_mask is .* expected torch.bool \[3, 23\]"):
            layer_of(kind)(some_input(), mask)


def test_expansion_and_modes_of_the_mixer() -> None:
    """Catches a setting of the table that the mixer ignores, or a mode that changes the result."""
    x = some_input()
    torch.manual_seed(0)
    chunk = build_mixer("taylor", MixerSettings(16, 2, expand_k=0.5, expand_v=2.0)).double()
    fused = build_mixer("taylor", MixerSettings(16, 2, expand_k=0.5, expand_v=2.0, mode="fused"))
    fused.double().load_state_dict(chunk.state_dict())
    y, cache = chunk(x)
    torch.testing.assert_close(fused(x)[0], y, rtol=1e-10, atol=1e-11)
    assert cache.key_value.shape == (3, 2, 15, 16)
    plain = build_mixer("elu", MixerSettings(16, 2, conv_size=None)).double()
    query, key, value = (
        part.unflatten(-1, (2, 8)) for part in plain.query_key_value(x).chunk(3, dim=-1)
    )
    heads = feature_map_attention(query, key, value).output.flatten(-2)
    torch.testing.assert_close(plain(x)[0], plain.output(heads), rtol=0, atol=0)
