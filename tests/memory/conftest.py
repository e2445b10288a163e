"""Small memory attentions of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from rxlm.memory.attention import HeadSettings, MemoryAttention, MemorySettings
from rxlm.memory.gates import GateSettings

VARIANTS = ("simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer")
NORM_TYPES = ("classic-rms", "rms", "layer", "adaptive", "positional")
GATES = {"off": GateSettings(enabled=False)} | {
    f"{gate_type}-{'slot' if per_slot else 'wide'}-{'tanh' if tanh else 'sigmoid'}": GateSettings(
        gate_type=gate_type, per_slot=per_slot, tanh=tanh
    )
    for gate_type in ("static", "elementwise", "linear")
    for per_slot in (True, False)
    for tanh in (True, False)
}


class Combination(NamedTuple):
    """One choice of each option."""

    variant: str
    norm_type: str
    gate: GateSettings


EVERY = {
    f"{variant}-{norm_type}-{name}": Combination(variant, norm_type, gate)
    for variant in VARIANTS
    for norm_type in NORM_TYPES
    for name, gate in GATES.items()
}
# Every pair of options occurs: 13 gates and 5 variants, with norms running against both.
PAIRWISE = {
    f"{variant}-{NORM_TYPES[(v + g) % 5]}-{name}": Combination(
        variant, NORM_TYPES[(v + g) % 5], gate
    )
    for v, variant in enumerate(VARIANTS)
    for g, (name, gate) in enumerate(GATES.items())
}


def small_memory(
    variant: str = "simple",
    norm_type: str = "classic-rms",
    gate: GateSettings | None = None,
    *,
    seed: int = 0,
    heads: tuple[int, int] = (2, 2),
    mix_heads: tuple[int, int] = (2, 2),
    randomized: bool = True,
    **fields: Any,
) -> MemoryAttention:
    """Return memory attention with L = 4, S = 3, D = 8 and heads of width 4.

    ``randomized`` replaces constant initial values (zero gate weights, unit scales) by random
    ones, so that a parameter applied along the wrong axis shows.
    """
    torch.manual_seed(seed)
    gate = GateSettings() if gate is None else gate
    sizes: dict[str, Any] = {"num_layers": 4, "num_slots": 3, "dim": 8, "num_groups": 2}
    settings = MemorySettings(
        variant=variant,  # type: ignore[arg-type]
        norm_type=norm_type,  # type: ignore[arg-type]
        write_heads=HeadSettings(*heads, head_dim=4),
        mix_heads=HeadSettings(*mix_heads, head_dim=4),
        gate=gate,
        mix_gate=gate,
        **{**sizes, **fields},
    )
    memory = MemoryAttention(settings)
    if randomized:
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                if name.endswith("norm.scale") or "gate" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return memory


@pytest.fixture(scope="session")
def make_memory() -> Callable[..., MemoryAttention]:
    """The function that builds a small memory attention."""
    return small_memory


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each variant."""
    return request.param


@pytest.fixture(params=NORM_TYPES)
def norm_type(request: pytest.FixtureRequest) -> str:
    """Each norm."""
    return request.param


@pytest.fixture(params=list(EVERY.values()), ids=list(EVERY))
def combination(request: pytest.FixtureRequest) -> Combination:
    """Every variant with every norm and every gate."""
    return request.param


@pytest.fixture(params=list(PAIRWISE.values()), ids=list(PAIRWISE))
def pair(request: pytest.FixtureRequest) -> Combination:
    """A choice of combinations in which every two options meet."""
    return request.param


@pytest.fixture(params=list(GATES.values()), ids=list(GATES))
def gate(request: pytest.FixtureRequest) -> GateSettings:
    """Each form of the residual gate."""
    return request.param
