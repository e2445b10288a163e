"""Speed of decoding, beside the machine's bandwidth and a Llama of equal size.

    python benchmarks/decode.py --quick                # minutes, to see that it works
    python benchmarks/decode.py                        # everything; to runs/benchmarks
    python benchmarks/decode.py --out docs/benchmarks  # ... to where the docs keep it

Writes a CSV file, a figure and a Markdown page, and prints what was asked and what came out. How it
is measured: README.md in this folder. The contenders are in decode_contenders.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import torch
from decode_contenders import (
    COMPILED,
    OURS,
    Contender,
    active_parameters,
    bytes_of_a_step,
    contenders,
    count,
    published,
)
from decode_report import COPY, GEMV, PROMPT, REFERENCE, TRIAD, Key, Results, bars, write

from rxlm.errors import RunError, UserError
from rxlm.evaluation.timing import Call, interleave, load_average, machine_name
from rxlm.rxt.reactive import ReactiveModel

LARGE = 128 * 2**20  # Bytes of a buffer that no cache holds.


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
    add("--sizes", nargs="+", choices=("micro", "micro-plus", "mini"), default=["micro"])
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
    results, load = Results(), load_average()
    described, sizes = [], []
    for size in options.sizes:
        model = published(size, tuple(options.set))
        found = contenders(model, compiled=not options.no_compile)
        if not options.no_compile:
            check_agreement(found, options)
        for threads in options.threads:
            torch.set_num_threads(threads)
            progress(f"{size}, {threads} threads")
            found_seconds = interleave(
                groups(size, model, found, threads, options, results),
                rounds=options.rounds,
                budget=options.budget / len(options.threads) / len(options.sizes),
                progress=progress,
            )
            results.seconds |= from_first_token(found_seconds)
        described.append(
            f"{size}: {count(model.decoder):,} parameters in the decoder, of which a token visits "
            f"{active_parameters(model):,}"
        )
        sizes += [f"{size}: {contender.name} {contender.parameters:,}" for contender in found]
    rounds = [len(samples) for samples in results.seconds.values()]
    results.facts = {
        "machine": machine_name("cpu"),
        "threads": f"{options.threads} (OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']})",
        "model": f"those of stages/, float32, random weights; {'; '.join(described)}"
        + (f"; changed: {' '.join(options.set)}" if options.set else ""),
        "parameters": "; ".join(sizes),
        "versions": f"torch {torch.__version__}, transformers {transformers_version()}",
        "rounds": f"{min(rounds)} to {max(rounds)}",
        "load average": f"{load:.1f} before, {load_average():.1f} after (processes that want to "
        "run; the benchmark itself takes up to the number of threads)",
        "date": time.strftime("%Y-%m-%d"),
        "reference package": REFERENCE,
        "CUDA": "not measured; nothing here says anything about GPUs",
    }
    return results


def groups(
    size: str,
    model: ReactiveModel,
    found: list[Contender],
    threads: int,
    options: argparse.Namespace,
    results: Results,
) -> list[dict[Key, Call]]:
    """Return the calls of one number of threads; those that are compared are in one group."""
    made: list[dict[Key, Call]] = [bandwidth_calls(threads, size)]
    for rows in options.rows:
        for new in options.new:
            read = bytes_of_a_step(model, rows, PROMPT + new / 2)
            results.step_bytes[size, rows, new] = read
            # What the bound is from, over as many bytes as a step reads.
            matrix = round(read) // 512 * 512
            made.append(
                {Key("bandwidth", threads, rows, matrix, GEMV, size): product(matrix)}
                | {
                    Key("turn", threads, rows, new, contender.name, size): partial(
                        contender.answer, rows, PROMPT, new
                    )
                    for contender in found
                }
                | {
                    Key("start", threads, rows, new, contender.name, size): partial(
                        contender.answer, rows, PROMPT, 1
                    )
                    for contender in found
                }
            )
    for tokens in options.prompts:
        made.append(
            {
                Key("first token", threads, 1, tokens, contender.name, size): partial(
                    contender.answer, 1, tokens, 1
                )
                for contender in found
                if contender.name != COMPILED  # The prompt is not compiled.
            }
        )
    return made


def from_first_token(seconds: dict[Key, list[float]]) -> dict[Key, list[float]]:
    """Take from each turn what it takes until its first token, measured in the same round."""
    return {
        key: [
            whole - start
            for whole, start in zip(samples, seconds[key._replace(task="start")], strict=True)
        ]
        if key.task == "turn"
        else samples
        for key, samples in seconds.items()
        if key.task != "start"
    }


def bandwidth_calls(threads: int, size: str) -> dict[Key, Call]:
    """Return what reads and writes memory as fast as the machine does, beyond its caches."""
    one, two, three = (torch.ones(LARGE // 4) for _ in range(3))

    def triad() -> object:
        return torch.add(one, two, alpha=3.0, out=three)

    return {
        Key("bandwidth", threads, 0, 2 * LARGE, COPY, size): lambda: two.copy_(one),
        Key("bandwidth", threads, 0, 3 * LARGE, TRIAD, size): triad,
        Key("bandwidth", threads, 0, LARGE, GEMV, size): product(LARGE),
    }


def product(size: int) -> Call:
    """Return a product of a matrix of so many bytes, 128 columns wide, with a vector."""
    return partial(torch.mv, torch.ones(size // 512, 128), torch.ones(128))


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


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
