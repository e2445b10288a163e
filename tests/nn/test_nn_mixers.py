"""The table of mixers: every entry keeps the contract that models and benchmarks build on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn import mixers
from rxlm.nn.mixers import MIXERS, MixerSettings, build_mixer, register_mixer

SETTINGS = MixerSettings(dim=16, num_heads=2, window=5)
names = pytest.mark.parametrize("name", list(MIXERS))


def mixer_and_input(name: str, length: int = 23) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build_mixer(name, SETTINGS).double().eval(), torch.randn(3, length, 16).double()


@names
def test_cached_pieces_equal_one_call(name: str) -> None:
    """Catches a cache that forgets, counts positions wrongly, or is changed in place."""
    mixer, x = mixer_and_input(name)
    expected, _ = mixer(x)
    first, cache = mixer(x[:, :9])
    pieces = [first]
    for start, end in ((9, 10), (10, 17), (17, 18), (18, 23)):
        again, _ = mixer(x[:, start:end], cache=cache)
        piece, cache = mixer(x[:, start:end], cache=cache)
        torch.testing.assert_close(piece, again, rtol=0, atol=0)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-9, atol=1e-10)


@names
def test_is_causal(name: str) -> None:
    """Catches a mixer through which a later token reaches an earlier one."""
    mixer, x = mixer_and_input(name)
    x.requires_grad_()
    mixer(x)[0][:, 11].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :12].abs().sum() > 0
    assert x.grad[:, 12:].abs().max() == 0


@names
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    """Catches a padded token that is attended to, written, convolved or counted."""
    mixer, x = mixer_and_input(name)
    expected, _ = mixer(x)
    junk = torch.full((3, 4, 16), 7.0).double()
    parts = (junk, x) if side == "left" else (x, junk)
    real = torch.tensor([[True] * x.shape[1]] * 3)
    pads = torch.zeros(3, 4, dtype=torch.bool)
    mask = torch.cat((pads, real) if side == "left" else (real, pads), dim=1)
    padded, cache = mixer(torch.cat(parts, dim=1), mask)
    torch.testing.assert_close(padded[mask].view_as(expected), expected, rtol=1e-9, atol=1e-10)
    after, _ = mixer(x[:, :3], cache=cache)
    _, plain_cache = mixer(x)
    plain, _ = mixer(x[:, :3], cache=plain_cache)
    torch.testing.assert_close(after, plain, rtol=1e-9, atol=1e-10)


def test_a_user_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table that only this package can extend, and a name taken twice."""
    monkeypatch.setattr(mixers, "MIXERS", dict(MIXERS))

    @register_mixer("nothing", cost="linear", summary="for a test")
    def _build(settings: MixerSettings) -> nn.Module:
        return nn.Linear(settings.dim, settings.dim)

    assert isinstance(build_mixer("nothing", SETTINGS), nn.Linear)
    with pytest.raises(UserError, match="'nothing' exists"):
        register_mixer("nothing", cost="linear", summary="twice")(_build)


def test_unknown_name_and_sizes() -> None:
    """Catches a misspelt mixer that fails deep inside, and heads that do not divide."""
    with pytest.raises(UserError, match=r"kdaa.*softmax, gla"):
        build_mixer("kdaa", SETTINGS)
    with pytest.raises(UserError, match="dim=15 is not divisible by num_heads=2"):
        build_mixer("softmax", MixerSettings(dim=15, num_heads=2))
    with pytest.raises(UserError, match="gla: expand_k"):
        build_mixer("gla", MixerSettings(dim=18, num_heads=2))
