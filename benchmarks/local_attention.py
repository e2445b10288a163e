"""Speed and memory of local attention, beside the package local-attention and SDPA with a mask.

    python benchmarks/local_attention.py --quick                # seconds, to see that it works
    python benchmarks/local_attention.py                        # everything; to runs/benchmarks
    python benchmarks/local_attention.py --out docs/benchmarks  # ... to where the docs keep it

Writes a CSV file, a figure and a Markdown page, and prints what was asked and what came out. How it
is measured: README.md in this folder.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import local_attention_package
import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import RunError, UserError
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import (
    Call,
    Quartiles,
    extra_memory,
    in_fresh_process,
    interleave,
    load_average,
    log_log_slope,
    machine_name,
    quartiles,
    ratio,
)
from rxlm.nn import LocalAttention
from rxlm.ops.rotary import rotate_halves

OURS, PACKAGE, MASKED = "rxlm", "local-attention", "SDPA with a mask"
TASKS = ("forward", "forward+backward")
CASES: dict[str, dict[str, bool]] = {
    "causal": {"causal": True},
    "causal, rotary": {"causal": True, "use_rotary_pos_emb": True},
    "causal, exact": {"causal": True, "exact_windowsize": True},
    "both directions": {"causal": False},
}
"""What is compared, as arguments of ``LocalAttention``; one window behind (and one ahead). Rotary
only where the package rotates as published."""
MASKED_LIMIT = 8192  # The mask alone takes 5 bytes x T^2: as bool, and as the kernel's float.
LARGEST_DIFFERENCE = 1e-4


class Key(NamedTuple):
    """What a sample belongs to."""

    case: str
    task: str
    tokens: int
    contender: str


@dataclass
class Results:
    """All that was measured: seconds per call, one a round; peak bytes; facts about the run."""

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    memory: dict[Key, int | None] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


class Sizes(NamedTuple):
    """Shape of what is attended to, and the window."""

    heads: int
    head_dim: int
    window: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/local_attention.py", *typed])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(options)
        write(results, options, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for asked, measured, met in bars(results):
        print(f"{'met' if met else 'NOT MET':8} {asked}: {measured}")
    print(f"written: {options.out / 'local_attention'}.md, .csv, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="short sequences, few rounds")
    add("--length", type=int, help="tokens, a multiple of the window")
    add("--memory-lengths", type=int, nargs="*", metavar="T", help="multiples of the window")
    add("--window", type=int, default=256)
    add("--rounds", type=int, help="how often each pass is timed")
    add("--budget", type=float, default=240.0, help="seconds after which no round begins")
    add("--threads", type=int, default=2)
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    options = parser.parse_args(arguments)
    for name, quick, full in (
        ("length", 1024, 8192),
        ("memory_lengths", [1024, 2048], [2048, 4096, 8192, 16384, 32768]),
        ("rounds", 3, 9),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def measure(options: argparse.Namespace) -> Results:
    """Run everything that the options ask for.

    Raises:
        UserError: for a length that the package does not take.
        RunError: if contenders do not compute the same.
    """
    for length in (options.length, *options.memory_lengths):
        if length < options.window or length % options.window:
            raise UserError(f"{length} tokens are not a multiple of --window {options.window}.")
    torch.set_num_threads(options.threads)
    sizes = Sizes(options.heads, options.head_dim, options.window)
    names = [OURS, MASKED, *([PACKAGE] if local_attention_package.load() else [])]
    difference = check_agreement(names, sizes)
    load = load_average()
    groups = [
        {
            (key := Key(case, task, options.length, name)): make_call(key, sizes)
            for name in names
        }
        for case in CASES
        for task in TASKS
    ]  # fmt: skip
    results = Results()
    results.seconds = interleave(
        groups, rounds=options.rounds, budget=options.budget, progress=progress
    )
    for tokens in options.memory_lengths:
        for name in names:
            key = Key("causal", TASKS[1], tokens, name)
            if name != MASKED or tokens <= MASKED_LIMIT:
                progress(f"memory: {name}, T = {tokens}")
                found = in_fresh_process(memory_of, key, sizes, options.threads)
                results.memory[key] = found
    rounds = len(next(iter(results.seconds.values())))
    version = f"local-attention {local_attention_package.VERSION}"
    results.facts = {
        "machine": machine_name("cpu"),
        "threads": f"{options.threads} (OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']})",
        "shape and type": f"B = 1, H = {sizes.heads}, K = {sizes.head_dim}, W = {sizes.window}, "
        "look_backward = 1 (look_forward = 1 in both directions), float32",
        "versions": f"torch {torch.__version__}, {version if PACKAGE in names else 'not compared'}",
        "largest difference between contenders": f"{difference:.1e} (outputs and gradients)",
        "rounds": str(rounds),
        "load average": f"{load:.1f} before, {load_average():.1f} after (processes that want to "
        f"run; the benchmark itself takes up to {options.threads})",
        "date": time.strftime("%Y-%m-%d"),
        "CUDA": "not measured; nothing here says anything about GPUs",
    }
    return results


# --- the contenders -----------------------------------------------------------------------------


def attention_of(name: str, case: str, sizes: Sizes) -> Callable[..., Tensor]:
    """Return the function of q, k, v ``[1, H, T, K]``."""
    arguments = {"use_rotary_pos_emb": False, **CASES[case]}
    if name == MASKED:
        return partial(masked_attention, arguments, sizes.window)
    package = local_attention_package.load()
    assert name == OURS or package is not None
    kind = LocalAttention if name == OURS or package is None else package.LocalAttention
    made: Callable[..., Tensor] = kind(sizes.window, dim=sizes.head_dim, **arguments)
    return made


def masked_attention(
    arguments: dict[str, bool], window: int, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """PyTorch's fused attention with the mask of the windows, which it builds first."""
    places = torch.arange(q.shape[-2])
    query, key = places[:, None], places
    if arguments.get("exact_windowsize"):
        mask = query - key <= window
    else:
        mask = query // window - key // window <= 1
    mask = mask & (key <= query if arguments["causal"] else key // window - query // window <= 1)
    if arguments["use_rotary_pos_emb"]:
        q, k = rotate_halves(q, places), rotate_halves(k, places)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def make_call(key: Key, sizes: Sizes) -> Call:
    """Return a pass with its own tensors."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes.heads, key.tokens, sizes.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    attention = attention_of(key.contender, key.case, sizes)
    if key.task == "forward":
        return partial(forward, attention, q, k, v)
    for part in (q, k, v):
        part.requires_grad_()
    return partial(forward_and_backward, attention, q, k, v)


@torch.no_grad()
def forward(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


def forward_and_backward(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor
) -> list[Tensor]:
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]


def check_agreement(names: Sequence[str], sizes: Sizes) -> float:
    """Return the largest difference to SDPA with a mask, outputs and gradients, at T = 4 W.

    Raises:
        RunError: if it is no rounding error.
    """
    worst = 0.0
    for case in CASES:
        keys = [Key(case, TASKS[1], 4 * sizes.window, name) for name in names]
        found: dict[str, list[Tensor]] = {
            key.contender: make_call(key, sizes)()  # type: ignore[misc]
            for key in keys
        }
        for name in names:
            for one, two in zip(found[name], found[MASKED], strict=True):
                difference = float((one - two).abs().max())
                worst = max(worst, difference)
                if difference > LARGEST_DIFFERENCE:
                    raise RunError(f"{case}: {name} differs from {MASKED} by {difference:.1e}.")
    return worst


def memory_of(key: Key, sizes: Sizes, threads: int) -> int | None:
    """Return the peak memory of one pass. Runs in a process of its own."""
    torch.set_num_threads(threads)
    return extra_memory(lambda: make_call(key, sizes), "cpu")


# --- what is written ----------------------------------------------------------------------------


def bars(results: Results) -> list[tuple[str, str, bool]]:
    """Return what was asked of speed and memory, what came out, and whether that is enough."""
    found = []
    for other in (PACKAGE, MASKED):
        for task in TASKS:
            ratios = [
                (case, faster(results, case, task, other))
                for case in CASES
                if any(key[::3] == (case, other) for key in results.seconds)
            ]
            if ratios:
                case, least = min(ratios, key=lambda item: item[1].median)
                asked = f"{task}: faster than {other} in every case"
                found.append((asked, f"least: {times(least)}x ({case})", least.median > 1))
    slope = memory_slope(results, OURS)
    if slope is not None:
        asked = "peak memory grows at most with T^1.1 (forward+backward)"
        found.append((asked, f"T^{slope:.2f}", slope <= 1.1))
    return found


def faster(results: Results, case: str, task: str, other: str) -> Quartiles:
    """How many times less time ours takes than ``other``."""
    tokens = next(key.tokens for key in results.seconds if key.case == case)
    ours, theirs = (results.seconds[Key(case, task, tokens, name)] for name in (OURS, other))
    return ratio(theirs, ours)


def memory_slope(results: Results, name: str) -> float | None:
    """Return p of the power law T^p of peak memory, from at least three lengths."""
    points = {
        key.tokens: value
        for key, value in results.memory.items()
        if key.contender == name and value
    }
    return log_log_slope(list(points), list(points.values())) if len(points) > 2 else None


def write(results: Results, options: argparse.Namespace, command: str) -> None:
    """Write CSV file, figure and page."""
    stem = options.out / "local_attention"
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "task", "tokens", "contender", "quantity", "lower", "median",
                         "upper"])  # fmt: skip
        for key, samples in results.seconds.items():
            writer.writerow([*key, "seconds", *(f"{x:.6g}" for x in quartiles(samples))])
        for key, value in results.memory.items():
            writer.writerow([*key, "peak bytes", "", "" if value is None else value, ""])
    draw(results, f"{stem}.png")
    Path(f"{stem}.md").write_text(page(results, command, options.length), encoding="utf-8")


def page(results: Results, command: str, length: int) -> str:
    """Return the Markdown page."""
    names = list(dict.fromkeys(key.contender for key in results.seconds))
    rows, ratios = [], []
    for case in CASES:
        for task in TASKS:
            keys = [Key(case, task, length, name) for name in names]
            values = (1000 * quartiles(results.seconds[key]).median for key in keys)
            rows.append((f"{case}: {task}", *(f"{value:,.0f}" for value in values)))
            others = [times(faster(results, case, task, other)) for other in names[1:]]
            ratios.append((f"{case}: {task}", *others))
    lengths = sorted({key.tokens for key in results.memory})
    memory = []
    for name in names:
        keys = [Key("causal", TASKS[1], tokens, name) for tokens in lengths]
        slope = memory_slope(results, name)
        cells = [mebibytes(results.memory[key]) if key in results.memory else "" for key in keys]
        memory.append((name, *cells, "" if slope is None else f"{slope:.2f}"))
    asked = [(*bar[:2], "yes" if bar[2] else "NO") for bar in bars(results)]
    note = (
        "Causal, forward+backward: highest memory of a fresh process on top of its inputs. "
        f"{MASKED} is not run beyond T = {MASKED_LIMIT:,}. Growth: the exponent p of T^p."
    )
    parts = [
        "# Speed of local attention",
        f"Written by `{command}`; every figure below comes from that run. All values are in "
        "[local_attention.csv](local_attention.csv).",
        markdown_table(Table("", ("", "this run"), list(results.facts.items()), prose=True)),
        "## What was asked, and what came out",
        markdown_table(Table("", ("asked", "measured", "met"), asked, prose=True)),
        "![Time and memory](local_attention.png)",
        f"## Time at T = {length:,}",
        markdown_table(Table("", ("milliseconds (medians)", *names), rows)),
        markdown_table(
            Table(
                "",
                ("rxlm is so many times faster than", *names[1:]),
                ratios,
                "Median of the ratios within a round, quartiles in brackets; below 1 is slower.",
            )
        ),
        "## Memory",
        markdown_table(
            Table("", ("MiB at T =", *(f"{x:,}" for x in lengths), "growth"), memory, note)
        ),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def draw(results: Results, path: str) -> None:
    """Draw the times and the memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(key.contender for key in results.seconds))
    for place, name in enumerate(names):
        keys = [key for key in results.seconds if key.contender == name and key.task == TASKS[1]]
        found = [quartiles(results.seconds[key]) for key in keys]
        left.barh(
            [index + 0.27 * place for index in range(len(keys))],
            [value.median for value in found],
            0.25,
            label=name,
            xerr=[[v.median - v.lower for v in found], [v.upper - v.median for v in found]],
        )
        left.set_yticks([index + 0.27 for index in range(len(keys))], [key.case for key in keys])
        points = [(k.tokens, v / 2**20) for k, v in results.memory.items()
                  if k.contender == name and v]  # fmt: skip
        right.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    left.set_xlabel(f"seconds, {TASKS[1]}")
    left.legend()
    if results.memory:
        right.set(xscale="log", yscale="log")
    right.set(xlabel="tokens", ylabel="peak MiB, causal")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def times(value: Quartiles) -> str:
    lower, median, upper = (f"{x:.0f}" if x >= 100 else f"{x:.2g}" for x in value)
    return f"{median} ({lower}-{upper})"


def mebibytes(value: int | None) -> str:
    return "n/a" if value is None else f"{value / 2**20:,.0f}"


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
