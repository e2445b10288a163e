"""Speed and memory of linear attention, beside softmax attention and other people's code.

    python benchmarks/linear_attention.py --quick               # a minute, to see that it works
    python benchmarks/linear_attention.py                       # everything; to runs/benchmarks
    python benchmarks/linear_attention.py --out docs/benchmarks     # ... to where the docs keep it

Measures forward passes, forward passes with all gradients, and decoding steps; writes a CSV file, a
figure and a Markdown page, and prints what was asked of the speed and what came out. See README.md
in this folder. On a GPU: ``--device cuda --dtype bfloat16``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# OpenMP reads this once, when torch is loaded. By default its threads spin between the many small
# parallel regions of linear attention, and fight with whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from linear_attention_contenders import (
    Contender,
    Sizes,
    check_agreement,
    make_call,
    make_step,
    sequence_contenders,
    step_contenders,
)
from linear_attention_report import Key, Results, bars, draw, page, write_csv

from rxlm.errors import RunError, UserError
from rxlm.evaluation.timing import (
    Call,
    extra_memory,
    in_fresh_process,
    interleave,
    load_average,
    machine_name,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
WARM_UP_LENGTH = 2048  # longer passes take so long that a first one does not matter
CHUNK = 64  # fla's reference files take multiples of it only


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/linear_attention.py", *typed])
    try:
        check(options)
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(options, lambda found: write(found, options, command))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for bar in bars(results):
        print(f"{'met' if bar.met else 'NOT MET':8} {bar.asked}: {bar.measured}")
    print(f"written: {options.out / options.name}.md, .csv, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of linear attention, beside softmax attention and other "
        "people's code. Writes NAME.md, NAME.csv and NAME.png."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few short sequences and rounds")
    add("--lengths", type=int, nargs="+", metavar="T", help=f"multiples of {CHUNK}")
    add("--backward-lengths", type=int, nargs="*", metavar="T", help="default: --lengths")
    add("--memory-lengths", type=int, nargs="*", metavar="T", help="where peak memory is measured")
    add("--positions", type=int, nargs="*", metavar="T", help="where decoding steps are timed")
    add("--rounds", type=int, help="how often each pass is timed")
    add("--step-rounds", type=int, help="how often each step is timed")
    add("--budget", type=float, default=240.0, help="seconds per task after which no round begins")
    add("--only", nargs="+", metavar="NAME", help="parts of contenders' names, beside SDPA")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    add("--name", default="linear_attention", help="of the files that are written")
    options = parser.parse_args(arguments)
    few = options.quick
    for name, quick, full in (
        ("lengths", [64, 256, 1024], list(LENGTHS)),
        ("memory_lengths", [1024], [2048, 8192]),
        ("positions", [64, 1024], [64, 2048, 32768]),
        ("rounds", 3, 7),
        ("step_rounds", 5, 60),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if few else full)
    if options.backward_lengths is None:
        options.backward_lengths = options.lengths
    return options


def write(results: Results, options: argparse.Namespace, command: str) -> None:
    """Write CSV file, figure and page."""
    write_csv(results, options.out / f"{options.name}.csv")
    draw(results, options.out / f"{options.name}.png")
    text = page(results, command, options.name)
    (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")


def measure(options: argparse.Namespace, save: Callable[[Results], None]) -> Results:
    """Run everything that the options ask for, and save after each part: the whole takes long.

    Raises:
        RunError: if contenders do not compute the same.
    """
    torch.set_num_threads(options.threads)
    sizes = Sizes(
        options.batch, options.heads, options.head_dim, options.device, DTYPES[options.dtype]
    )
    wait: Call = torch.cuda.synchronize if options.device == "cuda" else (lambda: None)
    results, sequences, steps = prepare(options, sizes)
    load_before = load_average()

    def done() -> None:
        results.facts["rounds"] = "; ".join(rounds_of(results))
        results.facts["load average"] = (
            f"{load_before:.1f} before, {load_average():.1f} after (processes that want to run; "
            f"the benchmark itself takes up to {options.threads})"
        )
        save(results)

    measure_sequences(results, "forward", options.lengths, sequences, sizes, options, wait)
    done()
    if options.positions:
        measure_steps(results, steps, sizes, options, wait)
        done()
    if options.memory_lengths:
        measure_memory(results, sequences, sizes, options)
        done()
    if options.backward_lengths:
        lengths = options.backward_lengths
        measure_sequences(results, "forward+backward", lengths, sequences, sizes, options, wait)
        done()
    return results


def prepare(
    options: argparse.Namespace, sizes: Sizes
) -> tuple[Results, list[Contender], list[Contender]]:
    """Find the contenders for sequences and for steps, and check that they compute the same."""
    sequences, missing = sequence_contenders(sizes)
    steps, missing_steps = step_contenders(sizes)
    sequences, steps = (chosen(found, options.only) for found in (sequences, steps))
    results = Results({who.name: who for who in [*sequences, *steps]})
    disagreement, remarks = check_agreement(sequences, sizes)
    results.facts = facts(options)
    results.facts["largest difference between contenders of a mechanism"] = (
        f"{disagreement:.1e} of the largest entry (outputs and gradients, T = 128)"
    )
    results.remarks = [*dict.fromkeys([*missing, *missing_steps]), *remarks]
    results.remarks += [
        f"{who.name}: up to T = {who.max_length:,}; {who.limit_reason}."
        for who in sequences
        if who.max_length is not None and who.max_length < max(options.lengths)
    ]
    for remark in results.remarks:
        progress(remark)
    return results, sequences, steps


def measure_sequences(
    results: Results,
    task: str,
    lengths: list[int],
    contenders: list[Contender],
    sizes: Sizes,
    options: argparse.Namespace,
    wait: Call,
) -> None:
    """Time whole sequences; the contenders of a length take turns."""
    progress(f"{task}: {len(contenders)} contenders, lengths {lengths}")
    groups = [
        {
            Key(task, length, who.name): make_call(who, task, length, sizes)
            for who in contenders
            if who.takes(length)
        }
        for length in lengths
    ]
    results.seconds |= interleave(
        groups,
        rounds=options.rounds,
        budget=options.budget,
        warm_up=lambda key: key.tokens <= WARM_UP_LENGTH or sizes.device == "cuda",
        synchronize=wait,
        progress=progress,
    )


def measure_steps(
    results: Results, steps: list[Contender], sizes: Sizes, options: argparse.Namespace, wait: Call
) -> None:
    """Time decoding steps; all positions of all contenders take turns."""
    progress(f"step: {len(steps)} contenders, positions {options.positions}")
    calls: dict[Key, Callable[[], object]] = {}
    for position in options.positions:
        for who in steps:
            key = Key("step", position, who.name)
            calls[key], results.read_bytes[key] = make_step(who, position, sizes)
    results.seconds |= interleave(
        [calls], rounds=options.step_rounds, budget=options.budget, synchronize=wait
    )


def measure_memory(
    results: Results, contenders: list[Contender], sizes: Sizes, options: argparse.Namespace
) -> None:
    """Measure the peak memory of each pass."""
    for task in ("forward", "forward+backward"):
        for length in options.memory_lengths:
            progress(f"memory: {task}, T = {length}")
            for who in [x for x in contenders if x.takes(length)]:
                results.memory[Key(task, length, who.name)] = in_fresh_process(
                    memory_of, who.name, task, length, sizes, options.threads
                )


def memory_of(name: str, task: str, length: int, sizes: Sizes, threads: int) -> int | None:
    """Return the peak memory of one pass. Runs in a process of its own."""
    torch.set_num_threads(threads)
    foreign = not name.endswith(("SDPA", "rxlm"))  # loading transformers takes seconds
    found, _ = sequence_contenders(sizes, foreign=foreign)
    who = next(x for x in found if x.name == name)
    return extra_memory(lambda: make_call(who, task, length, sizes), sizes.device)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used.

    Raises:
        UserError: naming the option.
    """
    for name in ("lengths", "backward_lengths", "memory_lengths"):
        for length in getattr(options, name):
            if length < CHUNK or length % CHUNK:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: {length} is not a multiple of {CHUNK}.")
    for name in ("rounds", "step_rounds", "threads", "batch", "heads", "head_dim"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: {getattr(options, name)}, expected 1 or more.")
    if min(options.positions, default=1) < 1:
        raise UserError(f"--positions: {min(options.positions)}, expected 1 or more.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu.")


def chosen(found: list[Contender], only: list[str] | None) -> list[Contender]:
    """Keep softmax attention and those whose names contain one of ``only``."""
    if only is None:
        return found
    kept = [who for who in found if any(part in who.name for part in only)]
    return [found[0], *(who for who in kept if who is not found[0])]


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to know about the run."""
    shape = f"B = {options.batch}, H = {options.heads}, K = V = {options.head_dim}"
    policy = os.environ["OMP_WAIT_POLICY"]
    found = {
        "machine": machine_name(options.device),
        "threads": f"{options.threads} (OMP_WAIT_POLICY={policy})",
        "shape and type": f"{shape}, {options.dtype}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.device == "cpu":
        found["CUDA"] = "not measured; nothing here says anything about GPUs"
    return found


def rounds_of(results: Results) -> list[str]:
    """How many rounds each task got."""
    counts = {key.task: len(samples) for key, samples in results.seconds.items()}
    return [f"{task}: {count}" for task, count in counts.items()]


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
