"""Draws the kernels of feature-map attention and prints the figures of its page.

    python benchmarks/feature_maps.py --out docs/figures

Writes ``feature_maps.svg`` and prints two tables in Markdown: what a decode state holds, and how
far three well-known mistakes are from the formula. Nothing is timed here.

Shapes: B batch, T tokens, H heads, K/V head dimensions.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from torch import Tensor

from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.ops.feature_map_attention import feature_map_attention
from rxlm.ops.feature_maps import FEATURE_MAPS, elu_features, taylor_kernel

WIDTH = 16
SIZES = MixerSettings(dim=512, num_heads=8, window=128)
MIXERS = ("softmax", "local", "elu", "taylor", "based", "kda")
POSITIONS = (1024, 8192)


def kernels() -> tuple[Tensor, dict[str, Tensor]]:
    """Return scores ``q . k / sqrt(K)`` from -3 to 3, and the weight that each kernel gives.

    The query is ones / 2 and the key a multiple of it: ELU + 1 is no function of the score alone.
    """
    scores = torch.linspace(-3, 3, 241, dtype=torch.float64)
    query = torch.full((1, WIDTH), 0.5, dtype=torch.float64)
    keys = scores[:, None] * 2 / WIDTH**0.5 * torch.ones(WIDTH, dtype=torch.float64)
    return scores, {
        "exp(s), softmax": scores.exp(),
        "1 + s + s^2/2, taylor": taylor_kernel(query, keys)[0],
        "elu, divided by its value at 0": _elu_kernel(query, keys),
    }


def _elu_kernel(query: Tensor, keys: Tensor) -> Tensor:
    at_zero = elu_features(query) @ elu_features(torch.zeros_like(query)).mT
    return (elu_features(query) @ elu_features(keys).mT / at_zero)[0]


def draw() -> bytes:
    """Return the picture of the kernels as SVG, the same bytes each time."""
    rcParams["svg.hashsalt"] = "rxlm"
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    scores, drawn = kernels()
    for (label, weights), colour in zip(
        drawn.items(), ("#777777", "#0072B2", "#D55E00"), strict=True
    ):
        left.plot(scores, weights, color=colour, label=label)
        right.plot(scores, weights / weights.max(), color=colour, label=label)
    left.set(title="weight", xlabel="score s = q . k / sqrt(K)", ylim=(0, 9))
    right.set(title="share of the largest weight", xlabel="score s")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


@torch.no_grad()
def state_table() -> list[str]:
    """Return what the caches of the mixers weigh, for one sequence, in Markdown."""
    heads = " | ".join(f"cache after {position:,} tokens (KiB)" for position in POSITIONS)
    rows = [f"| mixer | parameters | {heads} |", "|---|---|" + "---|" * len(POSITIONS)]
    for name in MIXERS:
        torch.manual_seed(0)
        mixer = build_mixer(name, SIZES)
        parameters = sum(one.numel() for one in mixer.parameters())
        sizes = []
        for position in POSITIONS:
            cache = None
            # Pieces, so that softmax attention needs no matrix of all pairs.
            for piece in torch.zeros(1, position, SIZES.dim).split(1024, dim=1):
                cache = mixer(piece, cache=cache)[1]
            assert cache is not None
            sizes.append(f"{cache.num_bytes / 1024:,.1f}")
        rows.append(f"| `{name}` | {parameters:,} | {' | '.join(sizes)} |")
    return rows


def mistake_table() -> list[str]:
    """Return relative errors of wrong readings of ELU + 1 attention, in Markdown."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 64, 4, 16, dtype=torch.float64).unbind(0)
    right = feature_map_attention(query, key, value).output
    q, k, v = (x.transpose(1, 2) for x in (elu_features(query), elu_features(key), value))
    everything = feature_map_attention(query, key, value, causal=False).output
    whole_context = (q @ (k.mT @ v)) / k.cumsum(dim=2)  # a vector, where a number belongs
    merged = right.transpose(1, 2).reshape(2, 64, 64)  # [B, H, T, V] read as [B, T, H * V]
    found = {
        "sums over all tokens in place of the past": everything,
        "whole context, divided by the vector `cumsum(k)`": whole_context.transpose(1, 2),
        "heads merged without moving them behind time": merged.view(2, 64, 4, 16),
    }
    rows = ["| mistake | relative error |", "|---|---|"]
    for label, wrong in found.items():
        rows.append(f"| {label} | {float((wrong - right).norm() / right.norm()):.2f} |")
    return rows


def feature_table() -> list[str]:
    """Return the number of features for some head dimensions, in Markdown."""
    rows = ["| K | features of `elu` | features of `taylor` |", "|---|---|---|"]
    for width in (8, 16, 32, 64):
        counts = " | ".join(f"{FEATURE_MAPS[name].size(width):,}" for name in ("elu", "taylor"))
        rows.append(f"| {width} | {counts} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the picture")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "feature_maps.svg").write_bytes(draw())
    for table in (feature_table(), state_table(), mistake_table()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
