"""The size of the memory over 1,000 turns of random text, for every form of memory attention.

All norms and gates of a variant run as the rows of one batch: norms and gates are replaced by banks
that give each row its own. Shapes: L = 2 layers, B combinations, S = 3 slots, D = 8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rxlm.nn.attention import KeyValue
from rxlm.rxt.components import RxTEncoder
from rxlm.rxt.memory_building import RxTMemoryAttention
from rxlm.rxt.memory_config import MemoryAttentionConfig

TURNS = 1000
SIZES: dict[str, Any] = {"num_layers": 2, "embed_dim": 8, "att_heads": 2, "stm_size": 3}
VARIANTS = ("simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer")
NORMS = ("classic-rms", "rms", "layer", "adaptive", "positional")
GATES: list[dict[str, Any]] = [{"use_gated_residual": False}] + [
    {
        "residual_gate_type": gate_type,
        "residual_per_slot_gate": per_slot,
        "use_tanh_residual_gate": tanh,
    }
    for gate_type in ("static", "elementwise", "linear")
    for per_slot in (True, False)
    for tanh in (True, False)
]
OWN: dict[str, list[dict[str, Any]]] = {
    "simple": [{}, {"disable_residual": True}],
    "self": [{}, {"use_gate_for_self_attention": False}],
}
"""What else decides over a variant's sums."""


class Bank(nn.Module):
    """Modules of which each computes some of the rows (dimension 1)."""

    def __init__(self, parts: list[nn.Module], rows: list[list[int]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.rows = [torch.tensor(indices) for indices in rows]
        self.back = torch.cat(self.rows).argsort()

    def forward(self, *inputs: Tensor) -> Tensor:
        results = [
            part(*(x.index_select(1, rows) for x in inputs))
            for part, rows in zip(self.parts, self.rows, strict=True)
        ]
        return torch.cat(results, dim=1).index_select(1, self.back)


class Sizes(NamedTuple):
    """Root mean square of the memories ``[turns, B]``, and the settings of the B rows."""

    sizes: Tensor
    configs: list[MemoryAttentionConfig]


def config_of(variant: str, **fields: Any) -> MemoryAttentionConfig:
    groups = 2 if variant.startswith("grouped") else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MemoryAttentionConfig(**SIZES, variant=variant, num_groups=groups, **fields)


def built(config: MemoryAttentionConfig) -> RxTMemoryAttention:
    torch.manual_seed(0)
    return RxTMemoryAttention(config)


def banks(configs: list[MemoryAttentionConfig]) -> RxTMemoryAttention:
    """Return memory attention that gives each row the norms and gates of its configuration."""
    alone = [built(config) for config in configs]

    def bank(name: str, kind: Callable[[RxTMemoryAttention], Any]) -> Bank:
        # Equal modules (they are made from one seed) are computed once.
        rows: dict[Any, list[int]] = {}
        for row, memory in enumerate(alone):
            rows.setdefault(kind(memory), []).append(row)
        parts = [getattr(alone[indices[0]], name) for indices in rows.values()]
        return Bank(parts, list(rows.values()))

    memory: Any = built(configs[0])
    memory.gate = bank("gate", lambda part: part.settings.gate)
    memory.slot_norm = bank("slot_norm", lambda part: part.settings.norm_type)
    if hasattr(memory, "mix_norm"):
        memory.mix_norm = bank("mix_norm", lambda part: part.settings.norm_type)
        memory.mix_gate = bank(
            "mix_gate", lambda part: part.settings.mix_gate.enabled and part.settings.mix_gate
        )
    return memory


def turns_of(memory: RxTMemoryAttention, count: int) -> list[KeyValue]:
    """Return encoded turns of random ids, one conversation each."""
    ids = torch.randint(0, 20, (count, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    states = RxTEncoder({**SIZES, "vocab_size": 20, "ff_dim": 8})(ids)
    encoded = memory.project(states)
    keys, values = (part.unflatten(0, (2, count)) for part in encoded)
    return [KeyValue(keys[:, turn], values[:, turn]) for turn in range(count)]


@torch.no_grad()
def run(variant: str, num_turns: int = TURNS) -> Sizes:
    # The tanh gate of a logit is the sigmoid gate of twice the logit: tried with two variants.
    short = variant not in OWN
    gates = [gate for gate in GATES if not (short and gate.get("use_tanh_residual_gate"))]
    configs = [
        config_of(variant, norm_type=norm, **gate, **own)
        for own in OWN.get(variant, [{}])
        for gate in (gates if own != {"disable_residual": True} else gates[:1])
        for norm in NORMS
    ]
    memory = banks(configs)
    slots = memory.initial(len(configs)).clone()
    sizes = []
    for turn in turns_of(memory, num_turns):
        # Every row is told the same.
        rows = (part[:, None].expand(-1, len(configs), -1, -1, -1).flatten(0, 1) for part in turn)
        slots = memory.write(slots, KeyValue(*rows))
        sizes.append(slots.square().mean(dim=(0, 2, 3)).sqrt())
    return Sizes(torch.stack(sizes), configs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_is_bounded_or_the_configuration_warns(variant: str) -> None:
    """Catches a gate or a norm with which a long conversation overflows and nobody was told, and a
    warning of what does not happen."""
    sizes, configs = run(variant)
    early, late = sizes[: TURNS // 2].amax(0), sizes[TURNS // 2 :].amax(0)
    grows = ~(torch.isfinite(late) & (late < 1.1 * early))
    for growing, size, config in zip(grows.tolist(), late.tolist(), configs, strict=True):
        fields = config.growing_fields()
        assert not growing or fields, config
        assert fields or size < 3.0, (size, config)
        # One sum beside a gate may stay bounded; where there is no gate, all grow.
        assert growing or not fields or (variant == "self" and len(fields) == 1), config
    assert any(grows) and not all(grows)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_the_banks_is_its_own_memory_attention(variant: str) -> None:
    """Catches banks that give a row the gate or the norm of another, so that the test above would
    prove nothing."""
    sizes, configs = run(variant, 3)
    for row in range(0, len(configs), 7):
        memory = built(configs[row])
        for name in ("mix_attention", "source_gate"):
            # Drawn after the gates, so other ones; all rows of the banks share the first row's.
            if hasattr(memory, name):
                weights = getattr(built(configs[0]), name).state_dict()
                getattr(memory, name).load_state_dict(weights)
        slots = memory.initial(1)
        for turn, size in zip(turns_of(memory, 3), sizes[:, row], strict=True):
            slots = memory.write(slots, turn)
            torch.testing.assert_close(slots.square().mean().sqrt(), size)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_gated_residual": False}, "use_gated_residual=False:"),
        (
            {"variant": "self", "use_gate_for_self_attention": False},
            "use_gate_for_self_attention=False:",
        ),
    ],
)
def test_the_warning_names_the_fields_and_comes_once(fields: dict[str, Any], named: str) -> None:
    """Catches a warning without a remedy, and one for every model of a long program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            MemoryAttentionConfig(**fields)
    messages = [str(item.message) for item in caught if item.category is UserWarning]
    assert len(messages) == 1
    assert messages[0].startswith(named) and "use_gated_residual=True" in messages[0]


def test_the_defaults_do_not_warn() -> None:
    """Catches a warning that everybody learns to ignore."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for variant in VARIANTS:
            for norm in NORMS:
                MemoryAttentionConfig(**SIZES, variant=variant, norm_type=norm)
        MemoryAttentionConfig(use_gate_for_self_attention=False)  # Not read: no variant 'self'.
        MemoryAttentionConfig(variant="simple", disable_residual=True, use_gated_residual=False)
