"""Residual gates by themselves. Shapes: L = 2 layers, B = 2, S = 3 slots, D = 4."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rxlm.memory.gates import GateSettings, ResidualGate

OLD, NEW = torch.randn(2, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def gate_of(settings: GateSettings) -> ResidualGate:
    """Return a gate for the shapes above, as it starts."""
    torch.manual_seed(0)
    return ResidualGate(2, 3, 4, settings)


def test_starts_as_configured(gate: GateSettings) -> None:
    """Catches a gate that starts elsewhere than ``init`` says: 0.18 of the new by default."""
    if not gate.enabled:
        assert torch.equal(gate_of(gate)(OLD, NEW), OLD + NEW)
        return
    value = gate_of(gate).value(OLD, NEW)
    start = torch.tanh(torch.tensor(-1.5)) / 2 + 0.5 if gate.tanh else torch.tensor(0.1824)
    # The linear gate's small random weights tell slots apart from the start.
    tolerance = 0.1 if gate.gate_type == "linear" else 1e-4
    torch.testing.assert_close(value, start.expand_as(value), atol=tolerance, rtol=0)


def test_one_value_where_one_is_promised(gate: GateSettings) -> None:
    """Catches gates that vary along an axis on which they are configured to be one value."""
    if not gate.enabled:
        assert list(gate_of(gate).parameters()) == []
        return
    module = gate_of(gate)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    value = module.value(OLD, NEW)
    varies = [value.shape[axis] > 1 for axis in range(4)]
    static = gate.gate_type == "static"
    assert varies[1] == (not static)
    assert varies[2] == (gate.per_slot or not static)
    assert varies[3] == (not gate.per_slot and not static)
    assert module(OLD, NEW).shape == OLD.shape


@pytest.mark.parametrize("tanh", [True, False])
def test_one_keeps_nothing_and_zero_keeps_all(tanh: bool) -> None:
    """Catches old and new swapped: a large logit must overwrite."""
    for logit, expected in ((40.0, NEW), (-40.0, OLD)):
        module = gate_of(GateSettings(gate_type="static", init=logit, tanh=tanh))
        torch.testing.assert_close(module(OLD, NEW), expected, atol=1e-6, rtol=0)


def test_a_stretched_gate_closes_and_opens_altogether() -> None:
    """Catches a gate that leaks: a hundredth of the new a turn would be half a slot in 64 turns."""
    for logit, expected in ((-4.0, OLD), (4.0, NEW)):
        module = gate_of(GateSettings(gate_type="static", init=logit, stretch=0.02))
        slots = OLD
        for _ in range(64):
            slots = module(slots, NEW)
        assert torch.equal(slots, expected)
        plain = gate_of(GateSettings(gate_type="static", init=logit))
        assert not torch.equal(plain(OLD, NEW), expected)


@pytest.mark.parametrize("gate_type", ["elementwise", "linear"])
def test_size_of_the_old_slot_does_not_open_the_gate(gate_type: str) -> None:
    """Catches a gate that reads the raw slot: growing slots would drive it into saturation."""
    module = gate_of(GateSettings(gate_type=gate_type))  # type: ignore[arg-type]
    nn.init.normal_(module.weight)
    torch.testing.assert_close(module.value(100 * OLD, NEW), module.value(OLD, NEW))
    assert (module.value(OLD, 3 * NEW) - module.value(OLD, NEW)).abs().max() > 1e-3


def test_without_residual_only_the_new_remains() -> None:
    """Catches a replaced memory that still depends on the old one, or holds unused weights."""
    module = gate_of(GateSettings(residual=False))
    assert list(module.parameters()) == []
    assert torch.equal(module(OLD, NEW), NEW)


def test_memory_keeps_its_precision() -> None:
    """Catches a bf16 update (autocast) that turns an fp32 memory into bf16 or is refused."""
    for settings in (GateSettings(), GateSettings(enabled=False), GateSettings(residual=False)):
        assert gate_of(settings)(OLD, NEW.bfloat16()).dtype == torch.float32


def test_vectors_are_not_decayed(gate: GateSettings) -> None:
    """Catches weight decay on biases and elementwise gates, which stacking makes look like
    matrices: it would pull every gate towards one half."""
    for name, parameter in gate_of(gate).named_parameters():
        is_map = name == "weight" and gate.gate_type == "linear"
        assert getattr(parameter, "_no_weight_decay", False) != is_map, name
