"""Softmax and linear attention side by side: the gate, its schedules, the wrapper (LiZA, MaG)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.drop_in.layer import LinearAttention
from rxlm.nn.drop_in.memory_gate import MemoryAsGate, MuSchedule, mix, set_mu
from rxlm.nn.drop_in.mixing import LiZASettings, LiZAttention

HEADS, HEAD_DIM = 2, 4


class Softmax(nn.Module):
    """Any model's attention: projections, a mask, two outputs."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        if fused:
            self.qkv_proj = nn.Linear(8, 24)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.o_proj = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
        if hasattr(self, "qkv_proj"):
            parts = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        else:
            parts = [p(hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj)]
        heads = [part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in parts]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        attended = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), "weights"


def wrap(base: Softmax | None = None, **options: Any) -> LiZAttention:
    torch.manual_seed(0)
    return LiZAttention(
        Softmax() if base is None else base,
        LiZASettings(**options),
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_key_value_heads=HEADS,
        bidirectional=False,
    )


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return x, mask


def linear_layer(base: Softmax, mode: str) -> LinearAttention:
    """A layer of its own with the projections of ``base``."""
    layer = LinearAttention(8, HEADS, operator_mode=mode)
    named = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    for ours, theirs in named.items():
        getattr(layer, ours).load_state_dict(getattr(base, theirs).state_dict())
    return layer


@torch.no_grad()
@pytest.mark.parametrize("cross_gate", [False, True])
def test_liza_without_memory_equals_base_bit_for_bit(cross_gate: bool) -> None:
    """A wrapper that changes the model before it was trained would show."""
    liza = wrap(mu=0.0, cross_gate=cross_gate)
    x, mask = inputs()
    y, weights = liza(x, attention_mask=mask)
    assert torch.equal(y, liza.base_attn(x, mask)[0])
    assert weights == "weights"


@torch.no_grad()
@pytest.mark.parametrize("mode", ["delta_rule", "gated_delta_product"])
def test_liza_with_memory_alone_equals_the_layer(mode: str) -> None:
    """Other projections, mask or normalisation than those of the layer would show."""
    liza = wrap(mu=1.0, operator_mode=mode)
    x, mask = inputs()
    expected = linear_layer(liza.base_attn, mode)(x, mask)
    y, _ = liza(x, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(y[real], expected[real], rtol=0, atol=1e-6)
    torch.testing.assert_close(liza(x, mask)[0], y)  # a mask given by position is read, too


@torch.no_grad()
def test_liza_mixes_and_crosses() -> None:
    """A cross gate without both shares, or mu on the wrong branch, would show."""
    x, _ = inputs()
    liza = wrap(mu=0.3, cross_gate=True)
    softmax = liza.base_attn(x)[0]
    linear = linear_layer(liza.base_attn, "delta_rule")(x)
    expected = 0.7 * softmax + 0.3 * linear + 0.7 * softmax * 0.3 * linear
    torch.testing.assert_close(liza(x)[0], expected)
    scaled = wrap(liza.base_attn, mu=1.0, base_scale_attn=True)(x)[0]
    ratio = (softmax.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(scaled, ratio * linear)


@torch.no_grad()
def test_liza_reads_fused_projections() -> None:
    """Fused projections that are cut at other places would show."""
    fused, split = Softmax(fused=True), Softmax()
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            part = getattr(fused.qkv_proj, kind).chunk(3)[index]
            getattr(getattr(split, name), kind).copy_(part)
    split.o_proj.load_state_dict(fused.o_proj.state_dict())
    x, mask = inputs()
    torch.testing.assert_close(wrap(fused)(x, mask)[0], wrap(split)(x, mask)[0])


@pytest.mark.parametrize("gate_mode", ["constant", "learnable", "dynamic"])
def test_mag_is_in_the_state_dict(gate_mode: str) -> None:
    """A share that is lost at saving, as in TPTT, would show, for every kind of gate."""
    x, _ = inputs()
    saved = wrap(mu=0.3, gate_mode=gate_mode)
    if gate_mode == "dynamic":
        nn.init.normal_(saved.memory_gate.project.weight)
    loaded = wrap(mu=0.8, gate_mode=gate_mode)
    assert not torch.allclose(loaded(x)[0], saved(x)[0])
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x)[0], saved(x)[0])


@pytest.mark.parametrize("gate_mode", ["learnable", "dynamic"])
def test_mag_learns_and_starts_at_mu(gate_mode: str) -> None:
    """A gate that gets no gradient, or starts elsewhere, would show; T10: dynamic can be built."""
    x, _ = inputs()
    liza = wrap(mu=0.3, gate_mode=gate_mode)
    torch.testing.assert_close(liza(x)[0], wrap(liza.base_attn, mu=0.3)(x)[0])
    liza(x)[0].square().sum().backward()
    gradients = [parameter.grad for parameter in liza.memory_gate.parameters()]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)
    assert not list(wrap(mu=0.3).memory_gate.parameters())


def test_mag_schedules() -> None:
    """A line that overshoots, a cycle that is off by one, or a name that is not defined (T11)."""
    gradual = MuSchedule("gradual", initial=0.1, final=0.5, steps=4)
    assert [round(gradual.at(step), 6) for step in (0, 1, 2, 4, 9)] == [0.1, 0.2, 0.3, 0.5, 0.5]
    cyclic = MuSchedule("cyclic", values=(0.0, 0.5, 1.0), period=2)
    assert [cyclic.at(step) for step in range(7)] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 0.0]
    switch = MuSchedule("switch", initial=0.0, final=0.9)
    assert [switch.at(step) for step in range(3)] == [0.0, 0.9, 0.0]
    assert MuSchedule("constant", final=0.25).at(1000) == 0.25
    model = nn.Sequential(MemoryAsGate(), MemoryAsGate())
    assert set_mu(model, gradual.at(2)) == 2
    assert [round(float(gate.mu), 6) for gate in model] == [0.3, 0.3]


def test_mag_mix_is_exact_at_both_ends() -> None:
    """Rounding at the ends, which makes an untouched model a different one, would show."""
    softmax, linear = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(mix(softmax, linear, torch.tensor(0.0)), softmax)
    assert torch.equal(mix(softmax, linear, torch.tensor(1.0)), linear)


def test_misuse_of_gates_is_one_clear_error() -> None:
    """A share beyond its range, or a schedule that silently does nothing, would pass."""
    for call, message in (
        (lambda: MemoryAsGate(1.5), "mu=1.5 must lie between"),
        (lambda: MemoryAsGate(mode="linear"), "mode='linear' does not exist"),  # type: ignore
        (lambda: MemoryAsGate(0.0, "learnable"), "cannot be learned"),
        (lambda: MemoryAsGate(0.5, "dynamic"), "needs dim"),
        (lambda: MemoryAsGate(0.5, "learnable").set_mu(0.1), "is learned, not set"),
        (lambda: MuSchedule("ramp"), "'ramp' does not exist"),  # type: ignore
        (lambda: MuSchedule(steps=0), "steps=0"),
        (lambda: set_mu(nn.Linear(1, 1), 0.5), "no memory gates"),
        (lambda: wrap(nn.Linear(8, 8)), "has no projections that are known"),  # type: ignore
        (lambda: wrap(linear_precision="float99"), "'float99' is no type"),
    ):
        with pytest.raises(UserError, match=message):
            call()
