"""A trace of the memory for people: blocks and numbers in a terminal, a picture as PNG.

Not here: what is shown (``memory_trace``). A block is also a shade, so a pipe without colours reads
the same as a terminal.

Shapes: L layers, A tokens of an answer, S slots, N turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rxlm.evaluation.memory_trace import TurnTrace

SHADES = "\u00b7.:-=+*#%@"
"""From nothing to all, for terminals and pipes."""
MAX_BLOCKS = 64
"""Blocks of a line; with more slots, a block is the largest of several."""
TOP_SLOTS = 3
"""How many slots are named for a token or a layer."""
MAX_TOKENS = 48
"""Tokens of an answer that are listed; the picture has them all."""


def turn_view(trace: TurnTrace, number: int | None = None) -> Group:
    """Return what a turn did: said, written, and what each token of the answer read."""
    title = "" if number is None else f"turn {number}: "
    parts: list[Any] = [
        Text(f"{title}{trace.query}", style="bold"),
        Text(f"answer: {trace.answer}\n"),
        written_table(trace),
    ]
    if trace.read is None:
        parts.append(Text("This decoder does not read its slots by attention: no weights.\n"))
    else:
        parts.append(read_table(trace))
    return Group(*parts)


def written_table(trace: TurnTrace) -> Table:
    """Return one line a layer: a block for each slot, and the slots that changed most."""
    table = _table("written: change of each slot, relative to its size (0 none, 1 altogether)")
    for name in ("layer", "slots from 0", "mean", "most"):
        table.add_column(name, justify="right" if name == "mean" else "left", no_wrap=True)
    largest = float(trace.written.max())
    for layer, values in enumerate(trace.written.tolist()):
        table.add_row(
            str(layer),
            blocks(values, largest),
            f"{sum(values) / len(values):.3f}",
            _largest(values),
        )
    table.caption = f"darkest: {largest:.3f}"
    return table


def read_table(trace: TurnTrace) -> Table:
    """Return for each token a line a layer: a block for each slot, and the slots read most."""
    assert trace.read is not None
    num_layers, num_tokens, num_slots = trace.read.shape
    table = _table("read: weight of each slot (mean over heads) when the token was read")
    for name in ("token", "layer", "slots from 0", "most"):
        table.add_column(name, no_wrap=True)
    for place in range(min(num_tokens, MAX_TOKENS)):
        for layer in range(num_layers):
            values = trace.read[layer, place].tolist()
            token = Text(repr(trace.tokens[place])[1:-1] if layer == 0 else "")
            table.add_row(token, str(layer), blocks(values, max(values)), _largest(values))
    note = f"even reading would be {1 / num_slots:.3f} a slot; blocks: relative to the token's most"
    left_out = num_tokens - MAX_TOKENS
    table.caption = note + (f"; {left_out} more tokens are not listed" if left_out > 0 else "")
    return table


def blocks(values: Sequence[float], largest: float) -> Text:
    """Return a character for each value, its shade and colour from 0 to ``largest``."""
    text = Text()
    size = -(-len(values) // MAX_BLOCKS)
    for start in range(0, len(values), size):
        value = max(values[start : start + size])
        share = 0.0 if largest <= 0 else min(1.0, value / largest)
        level = round(share * (len(SHADES) - 1))
        light = round(23 * share)
        # Grey levels of the 256 colours, behind a character that says the same without colour.
        ink = 255 if light < 12 else 16
        text.append(SHADES[level], style=f"color({ink}) on color({232 + light})")
    return text


def _largest(values: Sequence[float]) -> str:
    order = sorted(range(len(values)), key=lambda slot: -values[slot])[:TOP_SLOTS]
    return "  ".join(f"{slot}:{values[slot]:.2f}" for slot in order)


def _table(title: str) -> Table:
    from rich.box import SIMPLE_HEAD

    return Table(title=title, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")


def trace_png(traces: Sequence[TurnTrace]) -> bytes:
    """Return a picture: what every turn wrote, and what the tokens of the last answer read."""
    from matplotlib.figure import Figure

    from rxlm.evaluation.figures import png

    last = traces[-1]
    num_layers, num_slots = last.written.shape
    with_reads = last.read is not None
    num_tokens = len(last.tokens) if with_reads else 0
    height = 1.2 + 0.28 * max(4, len(traces)) + (0.24 * max(4, num_tokens) if with_reads else 0)
    width = max(6.0, 0.16 * num_slots + 2) * num_layers**0.5
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(
        1 + with_reads,
        num_layers,
        squeeze=False,
        height_ratios=[max(4, len(traces)), *([max(4, num_tokens)] if with_reads else [])],
    )
    largest = max(float(trace.written.max()) for trace in traces)
    for layer in range(num_layers):
        axes = panels[0, layer]
        values = [trace.written[layer].tolist() for trace in traces]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_title(f"written, layer {layer}", fontsize=9)
        axes.set_yticks(range(len(traces)), [str(n + 1) for n in range(len(traces))], fontsize=7)
        axes.set_xlabel("slot", fontsize=8)
        if with_reads:
            assert last.read is not None
            axes = panels[1, layer]
            reading = axes.imshow(
                last.read[layer].tolist(),
                aspect="auto",
                cmap="magma",
                vmin=0,
                vmax=float(last.read.max()),
            )
            names = [repr(token)[1:-1].replace("$", r"\$") for token in last.tokens]
            axes.set_yticks(range(num_tokens), names, fontsize=7)
            axes.set_title(f"read by the last answer, layer {layer}", fontsize=9)
            axes.set_xlabel("slot", fontsize=8)
    panels[0, 0].set_ylabel("turn")
    figure.colorbar(image, ax=panels[0].tolist(), shrink=0.9)
    if with_reads:
        figure.colorbar(reading, ax=panels[1].tolist(), shrink=0.9)
    return png(figure)
