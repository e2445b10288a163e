"""Draw docs/figures/local_windows.svg: which keys a query of local attention sees.

    python scripts/draw_local_windows.py

The squares come from the rule that the operator uses.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rxlm.nn import LocalAttention

TARGET = Path(__file__).resolve().parents[1] / "docs" / "figures" / "local_windows.svg"
WINDOW, TOKENS, CELL, GAP = 4, 16, 11, 34
PANELS = {
    "causal": LocalAttention(WINDOW, causal=True),
    "causal, exact": LocalAttention(WINDOW, causal=True, exact_windowsize=True),
    "both directions": LocalAttention(WINDOW),
    "both directions, exact": LocalAttention(WINDOW, exact_windowsize=True),
}


def main() -> None:
    """Write the file."""
    size = TOKENS * CELL
    width, height = len(PANELS) * (size + GAP) + 8, size + 66
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, attention) in enumerate(PANELS.items()):
        left, top = 24 + number * (size + GAP), 28
        parts.append(f'<text x="{left}" y="{top - 10}">{title}</text>')
        places = torch.arange(TOKENS)
        seen = attention.pattern(WINDOW).visible(places, places)
        for row in range(TOKENS):
            for column in range(TOKENS):
                color = "#eef1f4"
                if seen[row, column]:
                    color = "#1f4e79" if row == column else "#7fb2e5"
                x, y = left + column * CELL, top + row * CELL
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{color}"/>'
                )
        for edge in range(WINDOW, TOKENS, WINDOW):
            at = edge * CELL - 0.5
            parts.append(
                f'<path d="M{left} {top + at}h{size}M{left + at} {top}v{size}" stroke="#c0392b" '
                'stroke-width="0.8" fill="none"/>'
            )
        parts.append(f'<text x="{left}" y="{top + size + 16}" fill="#555">keys</text>')
        if number == 0:
            x, y = left - 8, top + size
            parts.append(
                f'<text transform="translate({x},{y})rotate(-90)" fill="#555">queries</text>'
            )
    legend = "Dark: the token itself. Light: what else it sees. Red: where windows (W = 4) end."
    parts += [f'<text x="24" y="{height - 6}">{legend}</text>', "</svg>"]
    TARGET.write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
