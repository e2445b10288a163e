"""The network: every mixer and every kind of positions keeps the contract of a language model."""

from __future__ import annotations

import pytest
import torch

from rxlm.errors import UserError
from rxlm.lm import LMConfig
from rxlm.lm.model import LMNetwork, sinusoids
from rxlm.nn.mixers import MIXERS
from rxlm.ops.alibi import alibi_bias, alibi_slopes

POSITIONS = ("none", "learned", "sinusoidal", "rotary", "alibi")


def network(attention: object = "softmax", positions: str = "rotary", **fields: object):
    torch.manual_seed(0)
    config = {"vocab_size": 50, "dim": 16, "depth": 2, "num_heads": 2, "max_seq_len": 60}
    config |= {"window": 5, "attention": attention, "positions": positions, **fields}
    return LMNetwork(config).double().eval()


def token_ids(rows: int = 2, length: int = 23) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


VARIANTS = [
    *[(name, "rotary") for name in MIXERS],
    *[("softmax", positions) for positions in POSITIONS],
    *[("gated_deltanet", positions) for positions in POSITIONS if positions != "alibi"],
    (("gated_deltanet", "softmax"), "none"),
]
variants = pytest.mark.parametrize(("attention", "positions"), list(dict.fromkeys(VARIANTS)))


@variants
def test_swappable_attention_and_positions_keep_the_contract(attention, positions) -> None:
    """Catches a cache that forgets or miscounts, padding that is read, and a look ahead."""
    model, ids = network(attention, positions), token_ids()
    expected, whole = model(ids)
    first, cache = model(ids[:, :9])
    pieces = [first]
    for start, end in ((9, 10), (10, 22), (22, 23)):
        piece, cache = model(ids[:, start:end], cache=cache)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-8, atol=1e-9)
    assert cache.lengths.tolist() == whole.lengths.tolist() == [23, 23]
    for left, right in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(ids, (left, right), value=7)
        mask = torch.zeros_like(padded, dtype=torch.bool)
        mask[:, left : left + 23] = True
        found, _ = model(padded, mask)
        torch.testing.assert_close(found[mask].view_as(expected), expected, rtol=1e-8, atol=1e-9)
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 50
    torch.testing.assert_close(model(changed)[0][:, :15], expected[:, :15], rtol=1e-9, atol=1e-10)
    selected, _ = model(ids[[1]], cache=whole.select([1]))
    torch.testing.assert_close(selected, model(ids, cache=whole)[0][[1]], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("positions", POSITIONS[1:])
def test_positions_tell_equal_tokens_apart(positions: str) -> None:
    """Catches positions that are configured but never reach the attention. Without them a second
    softmax layer of one repeated token sees the same everywhere."""
    ids = torch.full((1, 6), 3)
    ids[0, 0] = 4
    states = network("softmax", positions)(ids)[0][0]
    plain = network("softmax", "none")(ids)[0][0]
    assert (states - plain).abs().max() > 1e-6


def test_alibi_is_that_of_the_paper() -> None:
    """Catches wrong slopes, a bias towards far keys, and an error of one position."""
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    at = torch.arange(5)[None]
    bias = alibi_bias(at, at, 8)[0, 1]
    assert bias[4].tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0]


def test_sinusoids_are_those_of_the_paper() -> None:
    """Catches frequencies that are off by one pair."""
    table = sinusoids(torch.tensor([[3]]), 4)[0, 0]
    expected = torch.tensor([3.0, 0.03, 3.0, 0.03])
    expected = torch.cat((expected[:2].sin(), expected[2:].cos()))
    torch.testing.assert_close(table, expected)


def test_what_cannot_be_is_refused() -> None:
    """Catches ALiBi silently ignored by a recurrence, a misspelt mixer, and lost positions."""
    with pytest.raises(UserError, match=r"alibi.*gated_deltanet does not have.*softmax"):
        LMConfig.parse({"attention": ["softmax", "gated_deltanet"], "positions": "alibi"})
    with pytest.raises(UserError, match=r"sofmax.*expected one or a list of softmax"):
        LMConfig.parse({"attention": "sofmax"})
    with pytest.raises(UserError, match="at most one a layer"):
        LMConfig.parse({"attention": ["softmax"] * 3, "depth": 2})
    with pytest.raises(UserError, match=r"41 tokens.*max_seq_len=40"):
        network(positions="learned", max_seq_len=40)(token_ids(1, 41))


def test_parts_begin_alike_whatever_the_mixer() -> None:
    """Catches baselines that differ in their random weights, not only in their mixers."""
    one, other = network("softmax"), network("gla")
    torch.testing.assert_close(one.embedding.weight, other.embedding.weight, rtol=0, atol=0)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(
            mine.feed_forward.up.weight, theirs.feed_forward.up.weight, rtol=0, atol=0
        )
    assert (one.layers[0].feed_forward.up.weight != one.layers[1].feed_forward.up.weight).any()
    torch.manual_seed(1)
    third = LMNetwork(one.config)
    assert (third.embedding.weight != one.embedding.weight).any()


def test_untied_head_and_layer_list() -> None:
    """Catches a head that is tied all the same, and a list of mixers in the wrong order."""
    model = network(["gla", "softmax"], depth=4, tie_embeddings=False)
    assert model.head.weight is not model.embedding.weight
    assert model.config.layers == ("gla", "softmax", "gla", "softmax")
    assert [type(layer.mixer).__name__ for layer in model.layers][1::2] == ["SoftmaxMixer"] * 2
