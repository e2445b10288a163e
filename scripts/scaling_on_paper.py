"""Writes docs/benchmarks/scaling_on_paper.md: what many GPUs would hold, send and write.

    python scripts/scaling_on_paper.py

Everything follows from the parameters of a recipe (counted on the meta device) and from the
assumptions below, which the page repeats. Nothing here was measured.

N: all parameters, A: those that a token uses, W: processes, one GPU each.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rxlm.evaluation.tables import Table, markdown_table
from rxlm.rxt.accounting import model_costs
from rxlm.rxt.model import RxTNetwork
from rxlm.storage.files import write_bytes
from rxlm.training.described_model import described_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "scaling_on_paper.md"
RECIPES = ("stages/micro", "stages/mini", "stages/beta")
PROCESSES = (8, 64, 1000)
BYTES = 4
"""Of a weight, a gradient, or one of Adam's two moments."""
OPERATIONS_A_SECOND = 400e12
"""Of a GPU in training: 40 % of the 989e12 that an H100 is sold with (bf16, dense)."""
LINK = 50e9
"""Bytes a second in each direction between a GPU and the others: 400 Gb/s."""
DISK = 2e9
"""Bytes a second of the process that writes a checkpoint."""
SHARE_OF_SENDING = 0.2
SHARE_OF_SAVING = 0.01


class Size(NamedTuple):
    """A recipe, its parameters, and those that a token uses."""

    recipe: str
    parameters: int
    active: int


def size_of(recipe: str) -> Size:
    """Count the parameters of a recipe; nothing is allocated."""
    config = described_model(ROOT / recipe, [])
    with torch.device("meta"):
        costs = model_costs(RxTNetwork(config))
    return Size(recipe, costs.num_parameters, sum(costs.active.values()))


def held(size: Size, strategy: str, processes: int) -> float:
    """Return the bytes of weights, gradients and moments in one process, without activations."""
    whole = BYTES * size.parameters
    part = whole / processes
    return {
        "ddp": 4 * whole,
        "zero1": 2 * whole + 2 * part,
        "zero2": whole + 3 * part,
        # Weights are whole while a pass runs.
        "zero3": whole + 3 * part,
        "zero3, between passes": 4 * part,
    }[strategy]


def sent(size: Size, processes: int) -> float:
    """Return the bytes that one process sends an update.

    A ring sums gradients in two rounds of (W - 1) / W of them each (reduce-scatter, all-gather);
    ZeRO gathers weights in the second round in place of gradients, as many bytes.
    """
    return 2 * BYTES * size.parameters * (processes - 1) / processes


def tokens_to_hide(size: Size, processes: int) -> float:
    """Return the tokens of a process and update that keep sending below a fifth of computing."""
    sending = sent(size, processes) / LINK
    return sending / SHARE_OF_SENDING * OPERATIONS_A_SECOND / (6 * size.active)


def main() -> None:
    """Write the page."""
    sizes = [size_of(recipe) for recipe in RECIPES]
    text = f"""# Scaling, on paper

Written by `python scripts/scaling_on_paper.py`. **Nothing on this page was measured**: it is
arithmetic over the parameters of a recipe and these assumptions. A GPU makes
{OPERATIONS_A_SECOND / 1e12:.0f}e12 operations a second and sends {LINK / 1e9:.0f} GB/s; a
checkpoint is written at {DISK / 1e9:.0f} GB/s; weights, gradients and both moments of Adam are
{BYTES} bytes each; training takes 6 operations a token and active parameter. What was run, in two
processes on a CPU, is in [Scaling](../scaling.md).

## What one process holds

Weights, gradients and moments; activations come on top (`rxlm train --dry-run` estimates them).

{_held_table(sizes)}

As long as `ddp` fits into a GPU with room for activations, nothing is gained by ZeRO: it sends as
many bytes. `zero1` is next. `zero3` helps between passes only, since all weights are whole while a
pass runs (a window of turns is one pass); a model whose weights alone do not fit needs another
strategy than those built here.

## What is sent, and how large a batch hides it

{_sent_table(sizes)}

The last column is the least number of tokens that a process should compute an update, so that
sending takes no more than {SHARE_OF_SENDING:.0%} of the time of computing, if nothing overlaps (DDP
overlaps most of it with the backward pass). It hardly depends on the number of processes; the batch
of an update grows with it. A mixture of experts sends all its parameters and computes with few:
{_experts(sizes[-1])}

## Checkpoints

Process 0 writes weights and both moments, {3 * BYTES} bytes a parameter; the others wait.

{_checkpoint_table(sizes)}
"""
    write_bytes(PAGE, text.encode())
    print(PAGE.relative_to(ROOT))


def _held_table(sizes: list[Size]) -> str:
    strategies = ("ddp", "zero1", "zero2", "zero3", "zero3, between passes")
    rows = [
        (
            size.recipe,
            f"{size.parameters / 1e6:,.1f}M",
            strategy,
            *(_bytes(held(size, strategy, count)) for count in PROCESSES),
        )
        for size in sizes
        for strategy in strategies
    ]
    columns = ("recipe", "parameters", "strategy", *(f"{count:,} GPUs" for count in PROCESSES))
    return markdown_table(Table("", columns, rows))


def _sent_table(sizes: list[Size]) -> str:
    rows = [
        (
            size.recipe,
            f"{size.active / 1e6:,.1f}M",
            f"{count:,}",
            _bytes(sent(size, count)),
            f"{1e3 * sent(size, count) / LINK:,.1f} ms",
            f"{tokens_to_hide(size, count):,.0f}",
        )
        for size in sizes
        for count in PROCESSES
    ]
    columns = ("recipe", "active", "GPUs", "sent an update", "takes", "tokens a process")
    return markdown_table(Table("", columns, rows))


def _checkpoint_table(sizes: list[Size]) -> str:
    rows = []
    for size in sizes:
        num_bytes = 3 * BYTES * size.parameters
        seconds = num_bytes / DISK
        rows.append(
            (
                size.recipe,
                _bytes(num_bytes),
                f"{seconds:,.1f} s",
                f"{seconds / SHARE_OF_SAVING / 60:,.1f} min",
            )
        )
    columns = (
        "recipe",
        "bytes",
        "takes",
        f"save no oftener than (for {SHARE_OF_SAVING:.0%} of the time)",
    )
    return markdown_table(Table("", columns, rows))


def _experts(size: Size) -> str:
    return (
        f"`{size.recipe}` sends {size.parameters / size.active:.0f} times what its active "
        "parameters are, so it\nneeds batches that are larger by as much, or experts that live on "
        "different GPUs, which is not built."
    )


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
