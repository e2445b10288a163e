"""What ``rxlm config show --params`` prints: the costs of the model that a recipe describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rxlm.cli import console

if TYPE_CHECKING:
    from rxlm.rxt.accounting import ModelCosts
    from rxlm.rxt.config import RxTConfig

_STEPS = {
    "read": "slots projected for the decoder",
    "encode": "the turn encoded",
    "write": "the memory written",
}


def show_costs(path: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the costs of a model; nothing of it is allocated.

    Args:
        path: see :func:`rxlm.training.described_model.described_model`.
        overrides: of the recipe.
        as_json: one object instead of a table.
    """
    import torch

    from rxlm.rxt.accounting import model_costs
    from rxlm.rxt.model import RxTNetwork
    from rxlm.training.described_model import described_model

    config = described_model(path, overrides)
    with torch.device("meta"):
        costs = model_costs(RxTNetwork(config))
    if as_json:
        values = {"parameters_in_all": costs.num_parameters, **costs._asdict()}
        console.print_json(values)
        return
    console.results().out("\n".join(_lines(config, costs)), highlight=False)


def _lines(config: RxTConfig, costs: ModelCosts) -> list[str]:
    length = config.decoder.seq_len
    lines = [f"{'parameters':34}{costs.num_parameters:>16,}"]
    for component, parts in costs.parameters.items():
        active = costs.active[component]
        total = sum(parts.values())
        of_token = "" if active == total else f"  a token uses {active:,}"
        shared = " (embedding: the decoder's)" if component == "encoder" else ""
        lines.append(f"  {component:32}{total:>16,}{of_token}{shared}")
        lines += [f"    {part:30}{count:>16,}" for part, count in parts.items()]
    lines += [
        "",
        f"{'operations':34}{'':>16}  2 = a multiplication and an addition",
        f"  {'an answer token':32}{costs.token_operations:>16,}  the last of {length:,} tokens",
        *(
            f"  {_STEPS[step]:32}{count:>16,}  once a turn of {length:,} tokens"
            for step, count in costs.turn_operations.items()
        ),
        "",
        f"{'bytes (fp32)':34}",
        f"  {'weights':32}{costs.weight_bytes:>16,}",
        f"  {'memory':32}{costs.memory_bytes:>16,}  a conversation, whatever its length",
    ]
    if costs.carried_bytes:
        lines.append(
            f"  {'carried from turn to turn':32}{costs.carried_bytes:>16,}  a conversation"
        )
    lines.append(f"  {'decode state':32}{costs.decode_bytes:>16,}  at the end of {length:,} tokens")
    return lines
