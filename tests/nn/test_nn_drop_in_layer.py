"""The drop-in layer against its definition, written out once more token by token in float64."""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn import LinearAttention
from rxlm.nn.drop_in.operator_modes import OPERATOR_MODES, virtual_tokens
from rxlm.nn.drop_in.pooling import CausalAvgPool1d
from rxlm.nn.drop_in.scaler import StandardScaler

MODES = tuple(OPERATOR_MODES)


def make(
    hidden_dim: int = 12, num_heads: int = 2, seed: int = 0, **options: Any
) -> LinearAttention:
    """A layer in float64 throughout."""
    torch.manual_seed(seed)
    options = {"linear_precision": torch.float64, **options}
    return LinearAttention(hidden_dim, num_heads, **options).double().eval()


def inputs(length: int, hidden_dim: int = 12, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, hidden_dim, generator=generator, dtype=torch.float64)


# --- the definition ---------------------------------------------------------------------------


def virtual(history: list[Tensor], n: int, trick: str) -> list[Tensor]:
    """The n vectors that one token makes of itself and the tokens before it."""
    now = history[-1]
    past = [*([torch.zeros_like(now)] * (n - 1)), *history][-n:][::-1]
    differences = [
        sum((-1) ** i * math.comb(m, i) * past[i] for i in range(m + 1)) / 2**m for m in range(n)
    ]
    turned = []
    for m in range(n):
        c, s, y = math.cos(2 * math.pi * m / n), math.sin(2 * math.pi * m / n), now.clone()
        for i in range(0, now.shape[-1] - 1, 2):
            y[i], y[i + 1] = c * now[i] - s * now[i + 1], s * now[i] + c * now[i + 1]
        turned.append(y)
    if trick == "copy":
        return [now] * n
    if trick == "combined":
        return [(d + r) / 2 for d, r in zip(differences, turned, strict=True)]
    return differences if trick == "derivative" else turned


def one_head(q: Tensor, k: Tensor, v: Tensor, parts: Any) -> Tensor:
    """The recurrence of one head of one sequence: ``[T, D]`` each, as projected."""
    dim = q.shape[-1]

    def unit(x: Tensor) -> Tensor:
        x = x * torch.sigmoid(x)
        return x / (x.square().sum() + 1e-6).sqrt()

    def gate(letters: str, t: int, constant: float) -> Tensor:
        window = [max(t - i, 0) for i in range(3)]
        k_gate, v_gate = (torch.sigmoid(sum(x[i] for i in window) / 3) for x in (k, v))
        return {
            "c": torch.full((dim,), constant, dtype=q.dtype),
            "k": k_gate,
            "v": v_gate,
            "kv": k_gate * v_gate,
        }[letters]

    keys, values = [unit(x) for x in k], [x / math.sqrt(dim) for x in v]
    state, outputs = torch.zeros(dim, dim, dtype=q.dtype), []
    for t in range(len(q)):
        alpha, beta = gate(parts.alpha_gate, t, 1.0), gate(parts.beta_gate, t, 0.5)
        state = state * alpha[None, :]
        for key, value in zip(
            virtual(keys[: t + 1], parts.order, parts.trick),
            virtual(values[: t + 1], parts.order, parts.trick),
            strict=True,
        ):
            state = state + torch.outer(key, beta * (value - key @ state))
        outputs.append(unit(q[t]) @ state)
        if not parts.linear:
            length = (state.square().sum(-1, keepdim=True) + 1e-12).sqrt()
            state = state / 2 * F.gelu(2 * state / length, approximate="tanh")
    return torch.stack(outputs)


def definition(layer: LinearAttention, x: Tensor) -> Tensor:
    """The whole layer, without padding, in one direction."""
    merged = []
    group = layer.num_heads // layer.num_key_value_heads
    for row in x:
        q, k, v = (
            projection(row).unflatten(-1, (-1, layer.head_dim))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        heads = [
            one_head(q[:, h], k[:, h // group], v[:, h // group], layer.recurrent)
            for h in range(layer.num_heads)
        ]
        merged.append(torch.cat(heads, dim=-1))
    mixed = torch.stack(merged)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt()
    return layer.out_proj(mixed)


def exact_pool(layer: LinearAttention) -> LinearAttention:
    """1/3 in float64: a layer is made in float32."""
    for parameter in layer.pool_g.parameters():
        parameter.data.copy_(torch.full_like(parameter, 1 / 3 if parameter.ndim == 3 else 0.0))
    return layer


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_operator_modes_equal_the_definition(mode: str) -> None:
    """Any wrong factor, gate, order of updates or virtual token, in any mode, would show."""
    layer = exact_pool(make(operator_mode=mode, num_key_value_heads=1))
    x = inputs(19)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("trick", ["derivative", "rotation", "combined", "copy"])
def test_operator_modes_of_any_order_equal_the_definition(order: int, trick: str) -> None:
    """Differences that are lagged copies, or history that is too short for order 4, would show."""
    layer = exact_pool(make(10, 2, order=order, trick=trick, alpha_gate="v"))  # odd heads of 5
    x = inputs(11, 10)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["delta_rule", "gated_delta_product", "delta_product_c"])
def test_chunk_size_and_length_change_nothing(mode: str) -> None:
    """Results that depend on the chunk size or on what follows, as in TPTT, would show: every
    length from 1 to 130, prime or not, in every chunk size."""
    layer = exact_pool(make(8, 1, operator_mode=mode))
    x = inputs(130, 8, batch=1)
    expected = definition(layer, x)
    for chunk_size, length in itertools.product((1, 2, 3, 16, 64), range(1, 131)):
        if chunk_size < 16 and length % 7 not in (1, 3):
            continue  # small chunks are slow, and every length occurs in the large ones
        layer.max_chunk_size = chunk_size
        error = (layer(x[:, :length]) - expected[:, :length]).abs().max()
        assert error < 1e-10, f"chunks of {chunk_size}, {length} tokens: {error:.1e}"


@pytest.mark.parametrize("alpha", ["c", "k", "v", "kv"])
@pytest.mark.parametrize("beta", ["c", "k", "v", "kv"])
def test_gates_equal_the_definition_and_pass_gradients(alpha: str, beta: str) -> None:
    """A letter that selects the wrong tensor, or a gate outside of the graph, would show."""
    layer = exact_pool(make(8, 2, alpha_gate=alpha, beta_gate=beta))
    x = inputs(9, 8)
    ours = torch.autograd.grad(layer(x).sin().sum(), list(layer.q_proj.parameters())[:1])
    theirs = torch.autograd.grad(
        definition(layer, x).sin().sum(), list(layer.q_proj.parameters())[:1]
    )
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    for name in ("k_proj", "v_proj"):
        weight = getattr(layer, name).weight
        (gradient,) = torch.autograd.grad(layer(x).sin().sum(), [weight])
        (reference,) = torch.autograd.grad(definition(layer, x).sin().sum(), [weight])
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)


def test_operator_mode_honoured() -> None:
    """A mode that is ignored (T7) would show: each names other parts and gives another output."""
    x = inputs(12)
    outputs = {mode: make(operator_mode=mode)(x) for mode in MODES}
    for one, other in itertools.combinations(MODES, 2):
        assert not torch.allclose(outputs[one], outputs[other], atol=1e-3), (one, other)
    assert make().recurrent == OPERATOR_MODES["delta_rule"]
    assert make(operator_mode="gated_delta_product").recurrent.order == 2
    assert make(operator_mode="gated_delta_product", order=3).recurrent.alpha_gate == "k"
    assert make(recurrent_config={"trick": "rot", "order": 2}).recurrent.trick == "rotation"


# --- parts ------------------------------------------------------------------------------------


def test_pool_of_a_ramp() -> None:
    """A window that is not causal, or padded with zeros, would show; values of TPTT's own test."""
    ramp = torch.arange(6.0)[None, :, None]
    pooled = CausalAvgPool1d(1)(ramp).flatten()
    torch.testing.assert_close(pooled, torch.tensor([0, 1 / 3, 1, 2, 3, 4]))


def test_pool_is_causal_and_frozen() -> None:
    """Gates that see later tokens, or a kernel that trains, would show."""
    pool = CausalAvgPool1d(2)
    x = torch.randn(1, 7, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool(x)[:, 3].sum(), [x])
    assert gradient.abs().sum(-1).flatten().bool().tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert not any(parameter.requires_grad for parameter in pool.parameters())


def test_rotated_and_copied_virtual_tokens_are_those_of_tptt() -> None:
    """Another angle, direction or pairing than TPTT's, or a lost odd feature, would show."""
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])[None, :, None]
    rotated = virtual_tokens(x, 2, "rotation")[0, 0, :, 0]
    torch.testing.assert_close(rotated, torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, 3.0]]))
    assert virtual_tokens(x, 2, "copy")[0, 0, :, 0].tolist() == [[1, 2, 3], [1, 2, 3]]


def test_differences_are_differences() -> None:
    """Lagged copies in place of differences, as in TPTT, would show."""
    x = torch.tensor([0.0, 0.0, 1.0, 4.0, 9.0, 16.0])[None, :, None, None]
    assert virtual_tokens(x, 3, "derivative")[0, :, :, 0, 0].tolist() == [
        [1.0, 0.5, 0.25],
        [4.0, 1.5, 0.5],
        [9.0, 2.5, 0.5],
        [16.0, 3.5, 0.5],
    ]


@torch.no_grad()
def test_rms_of_the_merged_heads_is_one() -> None:
    """A norm per head, with a mean, or after the projection would show."""
    layer = make(num_key_value_heads=1)
    x = inputs(50)
    heads, _ = layer.mix(layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    rms = heads.square().mean(-1).sqrt()
    assert (rms - 1).abs().max() < 0.05 and (rms - 1).abs().median() < 1e-3
    assert not torch.allclose(heads[..., :6].square().mean(-1), torch.ones(2, 50).double())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["delta_rule", "gated_delta_product", "delta_rule_gelu"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_input_scale_is_survived(scale: float, mode: str) -> None:
    """Infinities or NaNs for inputs that nobody normalised would show."""
    torch.manual_seed(0)
    layer = LinearAttention(16, 2, operator_mode=mode)
    assert layer(scale * torch.randn(2, 40, 16)).isfinite().all()


def test_input_scale_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """Silence for raw data, a warning a step, or one because of padding would show."""
    layer = LinearAttention(16, 2)
    with caplog.at_level(logging.WARNING):
        layer(1e4 * torch.randn(1, 4, 16))
        layer(1e4 * torch.randn(1, 4, 16))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Normalise inputs" in caplog.text
    caplog.clear()
    x = torch.cat((torch.randn(1, 4, 16), torch.full((1, 1, 16), 1e9)), dim=1)
    LinearAttention(16, 2)(x, torch.tensor([[1, 1, 1, 1, 0]]))
    assert not caplog.records


def test_normaliser_equals_the_formula_of_sklearn() -> None:
    """Sample instead of population deviation, or a division by zero, would show."""
    generator = np.random.default_rng(0)
    data = generator.normal(5.0, 3.0, (200, 4)) * [1, 10, 1e-3, 0] + [0, 0, 0, 7]
    scaler = StandardScaler.fit(torch.tensor(data))
    deviation = data.std(axis=0)
    expected = (data - data.mean(axis=0)) / np.where(deviation < 1e-12, 1.0, deviation)
    np.testing.assert_allclose(scaler.transform(torch.tensor(data)), expected, atol=1e-6)
    np.testing.assert_allclose(
        scaler.inverse_transform(scaler.transform(torch.tensor(data))), data, atol=1e-6
    )


def test_normaliser_of_images_and_bad_data() -> None:
    """One mean for all channels, or a mean of NaNs that spreads silently, would show."""
    images = torch.rand(5, 3, 4, 4) * torch.tensor([1.0, 50.0, 255.0])[:, None, None]
    normal = StandardScaler.fit(images, dims=(0, 2, 3)).transform(images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.square().mean((0, 2, 3)), torch.ones(3))
    with pytest.raises(UserError, match="finite"):
        StandardScaler.fit(torch.tensor([[1.0], [float("nan")]]))


# --- arguments --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", ["delta_rule", "gated_delta_product", "delta_rule_gelu"])
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40))
def test_bidir_is_equivariant_to_flips(mode: str, length: int) -> None:
    """Gates or differences of the second direction that look the wrong way would show."""
    layer = make(operator_mode=mode, bidirectional=True)
    x = inputs(length)
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["delta_rule", "delta_product", "gated_delta_product"])
def test_bidir_rows_depend_on_every_input(mode: str) -> None:
    """A first row without inputs, as in TPTT (T9), or a one-way layer would show."""
    layer = make(operator_mode=mode, bidirectional=True)
    x = inputs(6, batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum((0, 2)), x)
    assert (jacobian.abs().sum(-1) > 0).all()


def test_one_direction_is_causal() -> None:
    """A token that sees later ones, in any mode, would show."""
    for mode in MODES:
        layer = make(operator_mode=mode)
        x = inputs(6, batch=1)
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x).sum((0, 2)), x)
        seen = jacobian.abs().sum(-1)[:, 0] > 0
        assert torch.equal(seen, torch.ones(6, 6, dtype=torch.bool).tril()), mode


@torch.no_grad()
def test_precision_of_the_recurrence() -> None:
    """A precision that is ignored, or one that leaks into the output type, would show."""
    x = inputs(60).float()
    outputs = {}
    for precision in (torch.float64, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = LinearAttention(12, 2, linear_precision=precision, operator_mode="gated_delta_rule")
        outputs[precision] = layer(x)
        assert outputs[precision].dtype == torch.float32
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    error = {p: (y - outputs[torch.float64]).abs().max() for p, y in outputs.items()}
    assert 0 < error[torch.float32] < 1e-5 < error[torch.bfloat16] < 0.1


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint_changes_no_gradient(mode: str) -> None:
    """A recomputation that sees other inputs, or one that never happens, would show."""
    x = inputs(40)
    gradients = []
    for use in (False, True):
        layer = make(operator_mode=mode, use_linear_checkpoint=use, max_chunk_size=8)
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=stored: (kept.append(tensor.numel()), tensor)[1], lambda t: t
        ):
            loss = layer(x).square().sum()
        gradients.append(
            torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad])
        )
        gradients.append(sum(stored))
    plain, plain_size, checkpointed, checkpointed_size = gradients
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)
    assert checkpointed_size < 0.8 * plain_size


@torch.no_grad()
def test_gqa_equals_repeated_heads() -> None:
    """Query heads that meet the keys or gates of another group would show."""
    grouped = make(12, 4, num_key_value_heads=2, alpha_gate="k")
    full = make(12, 4, alpha_gate="k")
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, 3)).repeat_interleave(2, dim=0).flatten(0, 1)
    for name in ("weight", "bias"):
        state[f"pool_g.causal_conv.conv1d.{name}"] = full.state_dict()[
            f"pool_g.causal_conv.conv1d.{name}"
        ]
    full.load_state_dict(state)
    x = inputs(20)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-12, atol=1e-12)
    assert make(12, 4, num_key_value_groups=2).num_key_value_heads == 2


def test_dropout_acts_on_outputs_in_training_only() -> None:
    """Dropout inside of the recurrence, or in evaluation, would show."""
    torch.manual_seed(0)
    layer = LinearAttention(64, 4, dropout=0.25)
    x = torch.randn(2, 50, 64)
    dropped = (layer(x) == 0).float().mean()
    assert 0.2 < dropped < 0.3
    assert not (layer.eval()(x) == 0).any()


def test_weights_of_tptt_load() -> None:
    """Other names than those of TPTT, or its stored constants in the way, would show."""
    layer = LinearAttention(16, 2, num_key_value_heads=1, operator_mode="delta_product")
    state = dict(layer.state_dict())
    assert set(state) == {
        *(f"{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")),
        *(f"pool_g.causal_conv.conv1d.{w}" for w in ("weight", "bias")),
    }
    for name, shape in (("deriv_coeffs", 2), ("rot_cos", (1, 1, 1, 2, 1)), ("rot_sin", 2)):
        state[f"virtual_token_expander.{name}"] = torch.zeros(shape)
    layer.load_state_dict(state)
    model = nn.ModuleList([layer])
    model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})


def test_import_is_light() -> None:
    """A package that imports torch before anyone asks for a layer would show."""
    code = (
        "import sys, rxlm.nn; assert 'torch' not in sys.modules; "
        "from rxlm.nn import LinearAttention as L; import torch; "
        "assert L(64, 4, dropout=.1)(torch.randn(2, 16, 64)).shape == (2, 16, 64); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 10, "num_heads": 4}, "not divisible by num_heads=4"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads=3"),
        ({"num_key_value_groups": 3}, "num_key_value_groups=3"),
        ({"operator_mode": "linear"}, "operator_mode='linear' does not exist: use one of delta"),
        ({"alpha_gate": "1"}, "alpha_gate='1' does not exist: use one of c, k"),
        ({"beta_gate": "q"}, "beta_gate='q' does not exist"),
        ({"trick": "fourier"}, "trick='fourier' does not exist"),
        ({"order": 0}, "order=0"),
        ({"recurrent_config": {"ordr": 2}}, "no ordr: it knows order"),
        ({"pooling_config": {"width": 3}}, "no width: it knows kernel_size"),
        ({"max_chunk_size": 0}, "max_chunk_size=0 must be positive"),
        ({"linear_precision": torch.int32}, "not a floating point type"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    """A bad option that surfaces later, as a KeyError or a shape, would show."""
    with pytest.raises(UserError, match=message):
        LinearAttention(**{"hidden_dim": 16, "num_heads": 4, **options})


def test_bad_inputs_are_one_clear_error() -> None:
    """An unprojected or unbatched input that fails inside of a projection would show."""
    layer = LinearAttention(16, 4)
    for shape in ((2, 5, 8), (5, 16), (2, 5, 16, 1)):
        with pytest.raises(UserError, match="expected \\[batch, tokens, 16\\]"):
            layer(torch.randn(shape))
