"""The linear attention module against its equations written out, token by token.

The equations read weights under the names that fla gives them, so the translation of fla's layers
is tested by the same comparisons. Not here: padding, caches and both directions
(test_nn_linear_padding), the mechanisms themselves (tests/ops).

Shapes: B batch, T tokens, D width, H query/key heads, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.fla_weights import from_fla
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings

MECHANISMS = ("gla", "deltanet", "gated_deltanet", "kda")
SIZES: dict[str, Any] = {"dim": 12, "num_heads": 2, "key_dim": 3, "value_dim": 5}


def settings_of(mechanism: str, **fields: Any) -> LinearAttentionSettings:
    return LinearAttentionSettings(mechanism, **{**SIZES, **fields})


def fla_weights(settings: LinearAttentionSettings) -> dict[str, Tensor]:
    """Random float64 weights of the corresponding fla layer."""
    kind, dim, rank = settings.mechanism, settings.dim, settings.value_dim
    keys, values = settings.num_heads * settings.key_dim, settings.value_heads * settings.value_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (keys, dim), "k_proj.weight": (keys, dim), "v_proj.weight": (values, dim),
        "o_proj.weight": (dim, values),
    }  # fmt: skip
    if settings.conv_size is not None:
        for part, width in (("q", keys), ("k", keys), ("v", values)):
            shapes[f"{part}_conv1d.weight"] = (width, 1, settings.conv_size)
    norm = "o_norm.weight"
    if kind == "gla":
        norm = "g_norm_swish_gate.weight" if settings.gated else "g_norm.weight"
        shapes |= {
            "gk_proj.0.weight": (16, dim), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)
        }  # fmt: skip
    else:
        shapes["b_proj.weight"] = (settings.value_heads, dim)
    shapes[norm] = (settings.value_dim,)
    if kind == "gated_deltanet":
        shapes["a_proj.weight"] = (settings.value_heads, dim)
        shapes["dt_bias"] = (settings.value_heads,)
    if kind == "kda":
        channels = settings.value_heads * settings.key_dim
        shapes |= {"f_proj.0.weight": (rank, dim), "f_proj.1.weight": (channels, rank)}
        shapes["dt_bias"] = (channels,)
    if kind in ("gated_deltanet", "kda"):
        shapes["A_log"] = (settings.value_heads,)
    if settings.gated and kind == "kda":
        shapes |= {
            "g_proj.0.weight": (rank, dim), "g_proj.1.weight": (values, rank),
            "g_proj.1.bias": (values,),
        }  # fmt: skip
    elif settings.gated:
        shapes["g_proj.weight"] = (values, dim)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.6
        for name, shape in shapes.items()
    }


def module_of(settings: LinearAttentionSettings) -> LinearSelfAttention:
    module = LinearSelfAttention(settings).double()
    module.load_state_dict(from_fla(settings, fla_weights(settings)))
    return module


def written_out(settings: LinearAttentionSettings, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return ``[T, D]`` for one sequence ``[T, D]``: the equations of the papers."""
    kind = settings.mechanism

    def linear(name: str, source: Tensor) -> Tensor:
        return source @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def activated(part: str) -> Tensor:
        y = linear(f"{part}_proj", x)
        if settings.conv_size is None:
            return y if kind == "gla" else F.silu(y)
        early = F.pad(y.T, (settings.conv_size - 1, 0))
        return F.silu(F.conv1d(early, weights[f"{part}_conv1d.weight"], groups=y.shape[1]).T)

    heads, value_heads = settings.num_heads, settings.value_heads
    query, key = (activated(part).view(len(x), heads, -1) for part in "qk")
    value = activated("v").view(len(x), value_heads, -1)
    if kind != "gla":
        query, key = (
            part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key)
        )
    decay = torch.ones(len(x), value_heads, settings.key_dim, dtype=x.dtype)
    if kind == "gla":
        logits = linear("gk_proj.1", linear("gk_proj.0", x)).view(len(x), value_heads, -1)
        decay = torch.sigmoid(logits) ** (1 / 16)
    elif kind != "deltanet":
        name = "a_proj" if kind == "gated_deltanet" else "f_proj.1"
        logits = linear(name, x if kind == "gated_deltanet" else linear("f_proj.0", x))
        steps = torch.log1p(torch.exp(logits + weights["dt_bias"])).view(len(x), value_heads, -1)
        decay = torch.exp(-weights["A_log"].exp()[:, None] * steps).expand_as(decay)
    decay = (decay * math.exp(settings.decay_shrinkage)).clamp(max=1.0)
    outputs = []
    for head in range(value_heads):
        shared = head * heads // value_heads
        state = torch.zeros(settings.key_dim, settings.value_dim, dtype=x.dtype)
        read = []
        for t in range(len(x)):
            state = decay[t, head, :, None] * state
            written = value[t, head]
            if kind != "gla":
                strength = torch.sigmoid(linear("b_proj", x))[t, head]
                stretched = strength + settings.write_stretch * (2 * strength - 1)
                strength = stretched.clamp(min=0, max=1)
                written = strength * (written - state.T @ key[t, shared])
            state = state + torch.outer(key[t, shared], written)
            read.append(settings.key_dim**-0.5 * state.T @ query[t, shared])
        outputs.append(torch.stack(read))
    mixed = torch.stack(outputs, dim=1)
    norm = next(tensor for name, tensor in weights.items() if "norm" in name)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + settings.norm_eps).sqrt() * norm
    mixed = mixed.flatten(1)
    if settings.gated and kind == "kda":
        mixed = mixed * torch.sigmoid(linear("g_proj.1", linear("g_proj.0", x)))
    elif settings.gated:
        gate = linear("g_proj", x)
        mixed = mixed * gate * torch.sigmoid(gate)
    return linear("o_proj", mixed)


def test_a_stretched_write_may_leave_the_state_alone() -> None:
    """Catches a token that erases a little although its write is closed: of a state that
    conversations carry, a thousand of them would leave nothing."""
    gates = module_of(settings_of("deltanet", write_stretch=0.02)).gates
    assert gates.write is not None
    with torch.no_grad():
        gates.write.weight.zero_()
    offsets = (torch.zeros(1), torch.tensor([-4.0, 4.0]))
    strength = gates(torch.randn(1, 7, 12, dtype=torch.float64), offsets).write_strength
    assert strength is not None
    assert torch.equal(strength, torch.tensor([0.0, 1.0], dtype=strength.dtype).expand(1, 7, 2))


@pytest.mark.parametrize("mechanism", ["gla", "gated_deltanet", "kda"])
def test_slow_decays_are_none_where_decays_shrink(mechanism: str) -> None:
    """Catches a channel that fades although it should be kept, one that grows, and a decay that is
    shrunk in the wrong place (of the logits, or of the factor)."""
    x = torch.randn(2, 50, 12, dtype=torch.float64)
    gates = module_of(settings_of(mechanism)).gates
    decays = gates(x).log_decay
    assert decays is not None
    middle = -decays.median().item()
    gates.decay_shrinkage = middle
    shrunk = gates(x).log_decay
    assert shrunk is not None
    slow = decays > -middle
    assert 0.3 < slow.double().mean() < 0.7
    assert (shrunk[slow] == 0).all()
    torch.testing.assert_close(shrunk[~slow], decays[~slow] + middle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"conv_size": None},
        {"gated": False, "norm_eps": 0.1},
        {"mode": "fused", "conv_size": 2, "num_heads": 3},
        {"write_stretch": 0.5},
        {"decay_shrinkage": 0.3},
    ],
    ids=["default", "no convolution", "no gate", "fused", "stretched writes", "shrunk decays"],
)
def test_equals_the_published_equations(mechanism: str, fields: dict[str, Any]) -> None:
    """Catches a wrong activation, norm, order of steps or gate, and a weight of an fla layer that
    lands in the wrong place."""
    settings = settings_of(mechanism, **fields)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    y, _ = module_of(settings)(x)
    weights = fla_weights(settings)
    expected = torch.stack([written_out(settings, weights, row) for row in x])
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("mechanism", ["gated_deltanet", "kda"])
def test_more_value_heads_than_query_heads(mechanism: str) -> None:
    """Catches query heads that serve the wrong value heads, and gates per query head."""
    settings = settings_of(mechanism, num_value_heads=4)
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    y, cache = module_of(settings)(x)
    expected = written_out(settings, fla_weights(settings), x[0])
    torch.testing.assert_close(y[0], expected, atol=1e-10, rtol=1e-9)
    assert cache is not None and cache.state.shape == (1, 4, 3, 5)


@pytest.mark.parametrize(
    ("mechanism", "heads", "key_dim", "value_dim", "conv_size", "gated", "count"),
    [
        ("gla", 4, 128, 256, None, True, 4_219_648),
        ("gla", 16, 32, 64, None, True, 4_219_456),
        ("deltanet", 4, 256, 256, 4, False, 4_210_944),
        ("deltanet", 16, 64, 64, 4, True, 5_271_616),
        ("gated_deltanet", 3, 256, 512, 4, True, 6_310_406),
        ("gated_deltanet", 16, 64, 64, 4, True, 5_288_032),
        ("gated_deltanet", 12, 64, 128, 4, True, 6_328_472),
        ("kda", 16, 64, 64, 4, True, 4_487_248),
        ("kda", 8, 128, 128, 4, True, 4_741_256),
    ],
)
def test_parameter_counts(
    mechanism: str,
    heads: int,
    key_dim: int,
    value_dim: int,
    conv_size: int | None,
    gated: bool,
    count: int,
) -> None:
    """Catches a projection, bias or rank that differs from fla 0.6's layers at width 1024."""
    settings = LinearAttentionSettings(
        mechanism, 1024, heads, key_dim, value_dim, conv_size=conv_size, gated=gated
    )
    with torch.device("meta"):
        module = LinearSelfAttention(settings)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize(("mechanism", "lowest"), [("gated_deltanet", 0.0), ("kda", 1.0)])
def test_gates_start_in_the_published_ranges(mechanism: str, lowest: float) -> None:
    """Catches gates that start by forgetting everything or nothing, and that weight decay pulls."""
    torch.manual_seed(0)
    gates = LinearSelfAttention(settings_of(mechanism, num_heads=512, dim=8)).gates
    rates, steps = gates.A_log.detach().exp(), F.softplus(gates.dt_bias.detach())
    assert lowest <= float(rates.min()) < lowest + 3 and 13 < float(rates.max()) <= 16.001
    assert 0.999e-3 <= float(steps.min()) < 2e-3 and 0.05 < float(steps.max()) <= 0.1001
    assert 0.007 < float(steps.median()) < 0.014  # log-uniform, not uniform
    assert gates.A_log._no_weight_decay and gates.dt_bias._no_weight_decay


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_parameter_learns(mechanism: str, bidirectional: bool) -> None:
    """Catches parameters that nothing reads (they break distributed training), gradients that are
    not finite, and a gradient that stops at a carried cache."""
    torch.manual_seed(0)
    module = LinearSelfAttention(settings_of(mechanism, bidirectional=bidirectional))
    x = torch.randn(2, 8, 12, requires_grad=True)
    if bidirectional:
        y, _ = module(x)
    else:
        _, cache = module(x[:, :5])
        y, _ = module(x[:, 5:], None, cache)
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (x.grad.abs().sum(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_bfloat16_autocast_keeps_gates_and_state_exact(mechanism: str) -> None:
    """Catches a state that is accumulated in bfloat16, and a dtype clash under autocast."""
    torch.manual_seed(0)
    module = LinearSelfAttention(settings_of(mechanism))
    x = torch.randn(2, 9, 12)
    exact, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cache = module(x)
        y, cache = module(x[:, :1], None, cache)
        y, cache = module(x)
        assert all(
            gate is None or gate.dtype == torch.float32 for gate in module.gates(x.bfloat16())
        )
    assert cache is not None and cache.state.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, atol=0.06, rtol=0.1)


def test_modes_choose_the_form() -> None:
    """Catches a mode without effect, and a report of the backend that asks about another form."""
    x = torch.randn(1, 6, 12)
    for mode, form in (("chunk", "chunk"), ("fused", "recurrent")):
        module = LinearSelfAttention(settings_of("kda", mode=mode))
        assert module._form(6) == form and module._form(1) == "step"
        choice = module.backend(x)
        assert choice.name == "torch" and "cpu" in choice.reason
    chunk, fused = (module_of(settings_of("kda", mode=mode)) for mode in ("chunk", "fused"))
    torch.testing.assert_close(chunk(x.double())[0], fused(x.double())[0], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mechanism": "mamba"}, "mechanism='mamba'.*gla, deltanet, gated_deltanet, kda"),
        ({"mode": "fused_chunk"}, "mode='fused_chunk'.*chunk, fused"),
        ({"key_dim": 0}, "key_dim=0 must be positive"),
        ({"conv_size": 0}, "conv_size=0 must be positive"),
        ({"num_value_heads": 3}, "num_value_heads=3 is not a multiple of num_heads=2"),
        ({"mechanism": "gla", "num_value_heads": 4}, "gla has as many value heads.*kda"),
        ({"mechanism": "deltanet", "num_value_heads": 4}, "deltanet has as many value heads"),
    ],
)
def test_settings_that_cannot_be_built(fields: dict[str, Any], named: str) -> None:
    """Catches a wrong setting that surfaces as a shape error in the middle of a forward pass."""
    with pytest.raises(UserError, match=named):
        LinearAttentionSettings(**{"mechanism": "kda", **SIZES, **fields})


def test_misuse_is_refused() -> None:
    """Catches masks of another shape that broadcast, and fla weights of another layer."""
    module = LinearSelfAttention(settings_of("kda"))
    x = torch.randn(2, 4, 12)
    with pytest.raises(UserError, match=r"key_mask is torch.bool \[2, 3\], expected .*\[2, 4\]"):
        module(x, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match=r"key_mask is torch.float32 \[2, 4\], expected torch.bool"):
        module(x, torch.ones(2, 4))
    weights = fla_weights(settings_of("kda"))
    with pytest.raises(UserError, match=r"without a place.*q_conv1d\.weight"):
        from_fla(settings_of("kda", conv_size=None), weights)
    del weights["k_proj.weight"]
    with pytest.raises(UserError, match=r"missing .*k_proj\.weight"):
        from_fla(settings_of("kda"), weights)
