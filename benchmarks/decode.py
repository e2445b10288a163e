"""Speed of decoding with Micro, beside the machine's bandwidth and a Llama of equal size.

    python benchmarks/decode.py --quick                # minutes, to see that it works
    python benchmarks/decode.py                        # everything; to runs/benchmarks
    python benchmarks/decode.py --out docs/benchmarks  # ... to where the docs keep it

Writes a CSV file, a figure and a Markdown page, and prints what was asked and what came out. How it
is measured: README.md in this folder. The contenders are in decode_contenders.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import torch
from decode_contenders import (
    COMPILED,
    LLAMA,
    OURS,
    Contender,
    active_parameters,
    bytes_of_a_step,
    contenders,
    count,
    micro,
)
from timing import (
    Call,
    Quartiles,
    interleave,
    load_average,
    machine_name,
    quartiles,
    ratio,
)

from rxlm.errors import RunError, UserError
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.rxt.reactive import ReactiveModel

PROMPT = 16  # Tokens before those that are written, in a turn whose speed is measured.
COPY, TRIAD, GEMV = "copy", "triad", "matrix times vector"
LARGE = 128 * 2**20  # Bytes of a buffer that no cache holds.
REFERENCE = (
    "the reference package is not compared: its licence forbids commercial use, so it is not "
    "installed here (docs/legal.md)"
)


class Key(NamedTuple):
    """What a sample belongs to. ``tokens``: written (task 'turn'), read (task 'first token'), or
    bytes (task 'bandwidth')."""

    task: str
    threads: int
    rows: int
    tokens: int
    contender: str


@dataclass
class Results:
    """All that was measured: seconds per call, one a round; facts about the run."""

    seconds: dict[Key, list[float]] = field(default_factory=dict)
    step_bytes: dict[tuple[int, int], float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/decode.py", *typed])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(options)
        write(results, options.out, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for asked, measured, met in bars(results):
        print(f"{'met' if met else 'NOT MET':8} {asked}: {measured}")
    print(REFERENCE)
    print(f"written: {options.out / 'decode'}.md, .csv, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one thread, one row, short turns, few rounds")
    add("--new", type=int, nargs="*", metavar="N", help="tokens that are written")
    add("--prompts", type=int, nargs="*", metavar="N", help="tokens before the first is written")
    add("--rows", type=int, nargs="*", choices=(1, 8), help="conversations at once")
    add("--threads", type=int, nargs="*", metavar="N")
    add("--rounds", type=int, help="how often each is timed")
    add("--budget", type=float, default=1200.0, help="seconds after which no round begins")
    add("--no-compile", action="store_true", help="leave the compiled step out")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the model")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    options = parser.parse_args(arguments)
    for name, quick, full in (
        ("new", [32], [128, 256]),
        ("prompts", [64], [64, 256]),
        ("rows", [1], [1, 8]),
        ("threads", [1], [1, 2]),
        ("rounds", 3, 9),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def measure(options: argparse.Namespace) -> Results:
    """Run everything that the options ask for.

    Raises:
        UserError: if a step should be compiled and there is no compiler.
        RunError: if the compiled step writes other tokens.
    """
    model = micro(tuple(options.set))
    found = contenders(model, compiled=not options.no_compile)
    if not options.no_compile:
        check_agreement(found, options)
    results, load = Results(), load_average()
    for threads in options.threads:
        torch.set_num_threads(threads)
        progress(f"{threads} threads")
        results.seconds |= interleave(
            groups(model, found, threads, options, results),
            rounds=options.rounds,
            budget=options.budget / len(options.threads),
            progress=progress,
        )
    sizes = "; ".join(f"{contender.name} {contender.parameters:,}" for contender in found)
    results.facts = {
        "machine": machine_name("cpu"),
        "threads": f"{options.threads} (OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']})",
        "model": f"decoder of stages/micro, float32, random weights: {count(model.decoder):,} "
        f"parameters, of which a token visits {active_parameters(model):,}"
        + (f"; changed: {' '.join(options.set)}" if options.set else ""),
        "parameters": sizes,
        "versions": f"torch {torch.__version__}, transformers {transformers_version()}",
        "rounds": str(len(next(iter(results.seconds.values())))),
        "load average": f"{load:.1f} before, {load_average():.1f} after (processes that want to "
        "run; the benchmark itself takes up to the number of threads)",
        "date": time.strftime("%Y-%m-%d"),
        "reference package": REFERENCE,
        "CUDA": "not measured; nothing here says anything about GPUs",
    }
    return results


def groups(
    model: ReactiveModel,
    found: list[Contender],
    threads: int,
    options: argparse.Namespace,
    results: Results,
) -> list[dict[Key, Call]]:
    """Return the calls of one number of threads; those that are compared are in one group."""
    made: list[dict[Key, Call]] = []
    for rows in options.rows:
        for new in options.new:
            size = bytes_of_a_step(model, rows, PROMPT + new / 2)
            results.step_bytes[rows, new] = size
            # The buffer that the bound is of: as large as what a step reads.
            calls = bandwidth_calls(threads, rows, round(size))
            for contender in found:
                key = Key("turn", threads, rows, new, contender.name)
                calls[key] = partial(contender.answer, rows, PROMPT, new)
            made.append(calls)
    for tokens in options.prompts:
        made.append(
            {
                Key("first token", threads, 1, tokens, contender.name): partial(
                    contender.answer, 1, tokens, 1
                )
                for contender in found
            }
        )
    return made


def bandwidth_calls(threads: int, rows: int, size: int) -> dict[Key, Call]:
    """Return what reads memory as fast as the machine does."""
    one, two, three = (torch.ones(LARGE // 4) for _ in range(3))
    vector = torch.ones(128)
    matrix = torch.ones(size // 4 // 128, 128)
    large = one.view(-1, 128)
    return {
        Key("bandwidth", threads, rows, 2 * LARGE, COPY): lambda: two.copy_(one),
        Key("bandwidth", threads, rows, 3 * LARGE, TRIAD): lambda: torch.add(
            one, two, alpha=3.0, out=three
        ),
        Key("bandwidth", threads, rows, LARGE, GEMV): lambda: torch.mv(large, vector),
        Key("bandwidth", threads, rows, 4 * matrix.numel(), GEMV): lambda: torch.mv(matrix, vector),
    }


def check_agreement(found: list[Contender], options: argparse.Namespace) -> None:
    """Compile what is measured later, and compare its tokens.

    Raises:
        RunError: if they differ.
    """
    answers = {contender.name: contender.answer for contender in found}
    for rows in options.rows:
        for new in options.new:
            progress(f"compiling: {rows} rows, {new} tokens")
            if answers[OURS](rows, PROMPT, new) != answers[COMPILED](rows, PROMPT, new):
                raise RunError(f"{COMPILED}: other tokens than {OURS}, {rows} rows, {new} tokens.")


def transformers_version() -> str:
    import transformers

    version: str = transformers.__version__
    return version


# --- what is written ----------------------------------------------------------------------------


def speed(results: Results, key: Key) -> Quartiles:
    """Return tokens per second, all rows together."""
    lower, median, upper = quartiles(results.seconds[key])
    work = key.rows * key.tokens
    return Quartiles(work / upper, work / median, work / lower)


def bound(results: Results, key: Key) -> tuple[float, float]:
    """Return the tokens per second that memory allows, and the bytes per second that this is from.

    The fastest of copy, triad and matrix times vector, the last over as many bytes as a step reads
    (they may fit into a cache, as the weights then do).
    """
    fastest = max(
        other.tokens / quartiles(seconds).median
        for other, seconds in results.seconds.items()
        if other[:3] == ("bandwidth", key.threads, key.rows)
    )
    return key.rows * fastest / results.step_bytes[key.rows, key.tokens], fastest


def turns(results: Results) -> list[Key]:
    return [key for key in results.seconds if key.task == "turn"]


def faster(results: Results, key: Key, other: str) -> Quartiles:
    """How many times less time ``key`` takes than ``other``."""
    return ratio(results.seconds[key._replace(contender=other)], results.seconds[key])


def bars(results: Results) -> list[tuple[str, str, bool]]:
    """Return what was asked, what came out, and whether that is enough."""
    mine = [key for key in turns(results) if key.contender in (OURS, COMPILED)]
    shares = {key: speed(results, key).median / bound(results, key)[0] for key in mine}
    best = max(shares, key=lambda key: shares[key])
    found = [
        ("at least 60 % of the bandwidth bound in one row",
         f"{100 * shares[best]:.0f} % ({described(best)})", shares[best] >= 0.6)
    ]  # fmt: skip
    for name in dict.fromkeys(key.contender for key in mine):
        singles = [key for key in mine if key.rows == 1 and key.contender == name]
        if singles:
            least = min(singles, key=lambda key: faster(results, key, LLAMA).median)
            value = faster(results, least, LLAMA)
            asked = f"{name}: at least twice as fast as {LLAMA} with its cache, one row"
            found.append((asked, f"least: {times(value)}x ({described(least)})", value.median >= 2))
    firsts = [k for k in results.seconds if k.task == "first token" and k.contender == OURS]
    if firsts:
        least = min(firsts, key=lambda key: faster(results, key, LLAMA).median)
        value = faster(results, least, LLAMA)
        asked = f"first token no later than {LLAMA}'s"
        found.append((asked, f"least: {times(value)}x ({described(least)})", value.median >= 1))
    return found


def described(key: Key) -> str:
    return f"{key.contender}: {key.tokens} tokens, {key.rows} rows, {key.threads} threads"


def write(results: Results, folder: Path, command: str) -> None:
    """Write CSV file, figure and page."""
    stem = folder / "decode"
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, "quantity", *Quartiles._fields])
        for key, samples in results.seconds.items():
            writer.writerow([*key, "seconds", *(f"{x:.6g}" for x in quartiles(samples))])
        for (rows, new), size in results.step_bytes.items():
            writer.writerow(["step", "", rows, new, "", "bytes", "", round(size), ""])
    draw(results, f"{stem}.png")
    Path(f"{stem}.md").write_text(page(results, command), encoding="utf-8")


def page(results: Results, command: str) -> str:
    """Return the Markdown page."""
    asked = [(*bar[:2], "yes" if bar[2] else "NO") for bar in bars(results)]
    decoded = []
    for key in turns(results):
        limit, _ = bound(results, key)
        # The bound is of our step: Llama's, with more to read, has a lower one.
        ours = key.contender in (OURS, COMPILED)
        share = f"{100 * speed(results, key).median / limit:.0f} %" if ours else ""
        decoded.append(
            (
                f"{key.threads} / {key.rows} / {key.tokens}",
                key.contender,
                spread(speed(results, key)),
                share,
                "" if key.contender == LLAMA else times(faster(results, key, LLAMA)),
            )
        )
    machine = []
    for key, samples in results.seconds.items():
        if key.task == "bandwidth":
            lower, median, upper = quartiles(samples)
            values = Quartiles(*(key.tokens / x / 1e9 for x in (upper, median, lower)))
            where = (key.threads, key.rows, f"{key.tokens / 2**20:,.0f}")
            machine.append((*where, key.contender, times(values)))
    limits = []
    for key in turns(results):
        if key.contender == OURS:
            limit, fastest = bound(results, key)
            size = results.step_bytes[key.rows, key.tokens] / 2**20
            row = (f"{size:.1f}", f"{fastest / 1e9:.1f}", f"{limit:,.0f}")
            limits.append((key.threads, key.rows, key.tokens, *row))
    firsts = [
        (
            f"{key.threads} / {key.tokens}",
            key.contender,
            times(Quartiles(*(1000 * value for value in quartiles(samples)))),
            "" if key.contender == LLAMA else times(faster(results, key, LLAMA)),
        )
        for key, samples in results.seconds.items()
        if key.task == "first token"
    ]
    note = (
        f"A turn: a prompt of {PROMPT} tokens is read, then tokens are written greedily. Medians, "
        "quartiles in brackets; the last column is the median of the ratios within a round."
    )
    parts = [
        "# Speed of decoding",
        f"Written by `{command}`; every figure below comes from that run. All values are in "
        "[decode.csv](decode.csv).",
        markdown_table(Table("", ("", "this run"), list(results.facts.items()), prose=True)),
        "## What was asked, and what came out",
        markdown_table(Table("", ("asked", "measured", "met"), asked, prose=True)),
        "![Tokens per second](decode.png)",
        "## Tokens per second",
        markdown_table(
            Table(
                "",
                ("threads / rows / tokens", "", "tokens/s", "of the bound", f"times {LLAMA}"),
                decoded,
                note,
            )
        ),  # fmt: skip
        "## Time to the first token",
        markdown_table(
            Table(
                "",
                ("threads / prompt", "", "milliseconds", f"times {LLAMA}"),
                firsts,
                "One row. Ours reads the whole memory, too: 256 slots for each layer.",
            )
        ),  # fmt: skip
        "## The bound",
        "Every step reads the weights that its tokens visit, the memory's keys and values, and "
        "those of the turn. The bound is the fastest bandwidth measured in the same run, by those "
        "bytes. What a step of this small model reads fits into the last cache of most machines; "
        "the product with a vector is therefore also measured over a buffer of that size.",
        markdown_table(
            Table("", ("threads", "rows", "tokens", "MiB a step", "GB/s", "tokens/s"), limits)
        ),
        markdown_table(Table("", ("threads", "rows", "MiB", "", "GB/s"), machine)),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def draw(results: Results, path: str) -> None:
    """Draw tokens per second, and the bound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(key[1:4] for key in turns(results)))
    names = list(dict.fromkeys(key.contender for key in turns(results)))
    figure = Figure(figsize=(10, 1.5 + 1.2 * len(places)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [speed(results, Key("turn", *place, name)) for place in places]
        axes.barh(
            [number + width * index for number in range(len(places))],
            [value.median for value in found],
            0.9 * width,
            label=name,
            xerr=[[v.median - v.lower for v in found], [v.upper - v.median for v in found]],
        )
    for number, place in enumerate(places):
        limit, _ = bound(results, Key("turn", *place, OURS))
        label = "bandwidth bound" if number == 0 else None
        axes.vlines(limit, number - 0.1, number + 0.8, colors="black", label=label)
    axes.set_yticks(
        [number + 0.35 for number in range(len(places))],
        [f"{threads} threads, {rows} rows, {new} tokens" for threads, rows, new in places],
    )
    axes.set(xlabel="tokens per second, all rows together")
    axes.legend()
    figure.savefig(path, dpi=120)


def spread(value: Quartiles) -> str:
    return f"{value.median:,.0f} ({value.lower:,.0f}-{value.upper:,.0f})"


def times(value: Quartiles) -> str:
    lower, median, upper = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in value)
    return f"{median} ({lower}-{upper})"


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
