"""Multi-query associative recall: which mechanisms remember up to 64 pairs, at two widths.

    python benchmarks/mqar.py --quick                      # seconds, to see that it works
    python benchmarks/mqar.py                              # everything; to runs/benchmarks
    python benchmarks/mqar.py --out docs/benchmarks        # ... to where the docs keep it

Trains one two-layer model per mechanism and width from scratch, prints accuracy by number of pairs
and writes mqar.md, .csv and .png. Every finished model is a line of mqar.jsonl: a run that was
stopped goes on where it was, and one with other settings trains again what they concern. The task
is ``rxlm/data/mqar.py``, the training ``mqar_training.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Read once, when torch is loaded; set here for the processes that train, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from mqar_report import draw, page, score_table, write_csv
from mqar_training import Difficulty, Recipe, train

from rxlm.errors import RunError, UserError
from rxlm.evaluation.tables import markdown_table
from rxlm.evaluation.timing import load_average, machine_name
from rxlm.nn.mixers import MIXERS

NAMES = ("softmax", "deltanet", "gated_deltanet", "kda", "gla", "elu")
QUICK = Recipe(
    difficulties=(Difficulty(2, 8, 16), Difficulty(4, 16, 32)),
    vocab_size=32, tokens_per_step=256, max_steps=60, questions=256,
)  # fmt: skip
FEWER_STEPS = 0.6
"""Factor on the steps of models of 128 and more channels, which learn in fewer and longer ones."""


class Job(NamedTuple):
    """One model to train."""

    mixer: str
    dim: int
    num_heads: int
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Names all settings: a line of another key answers another question."""
        settings = json.dumps([*self[:4], dataclasses.asdict(self.recipe)])
        return hashlib.sha256(settings.encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/mqar.py", *typed])
    try:
        jobs = plan(options)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = run(jobs, options)
        write_csv(rows, options.out / f"{options.name}.csv")
        draw(rows, options.out / f"{options.name}.png")
        text = page(rows, jobs[0].recipe, command, options.name)
        (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown_table(score_table(rows)))
    print(f"written: {options.out / options.name}.md, .csv, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Accuracy on multi-query associative recall.")
    add = parser.add_argument
    add("--quick", action="store_true", help="few pairs, small models, few steps")
    add("--mixers", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(MIXERS))
    add("--dims", type=int, nargs="+", metavar="D", help="widths (default: 64 128)")
    add("--head-dim", type=int, metavar="K", help="width of a head (default: 64)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N")
    add("--steps", type=int, help="most steps of a model of fewer than 128 channels")
    add("--learning-rate", type=float)
    add("--processes", type=int, default=2, help="models trained at the same time, a thread each")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    add("--name", default="mqar", help="of the files that are written")
    options = parser.parse_args(arguments)
    if options.dims is None:
        options.dims = [16] if options.quick else [64, 128]
    if options.head_dim is None:
        options.head_dim = 16 if options.quick else 64
    return options


def plan(options: argparse.Namespace) -> list[Job]:
    """Return the models to train, the small ones first.

    Raises:
        UserError: for names or sizes that no model can have.
    """
    recipe = QUICK if options.quick else Recipe()
    changes = {"max_steps": options.steps, "learning_rate": options.learning_rate}
    given = {field: value for field, value in changes.items() if value is not None}
    recipe = dataclasses.replace(recipe, **given)
    unknown = sorted(set(options.mixers) - set(MIXERS))
    if unknown:
        raise UserError(f"mixer {unknown[0]!r} does not exist: use some of {', '.join(MIXERS)}.")
    if recipe.max_steps < 3 or options.processes < 1 or min(options.seeds) < 0:
        raise UserError(
            f"--steps {recipe.max_steps} --processes {options.processes} --seeds {options.seeds}: "
            "expected at least 3 steps, 1 process and seeds from 0."
        )
    for dim in options.dims:
        if options.head_dim < 2 or options.head_dim % 2 or dim < 1 or dim % options.head_dim:
            raise UserError(
                f"--dims {dim} --head-dim {options.head_dim}: expected an even width of heads "
                "that divides the width of the model."
            )
    jobs = []
    for seed in options.seeds:
        for dim in sorted(options.dims):
            steps = round(recipe.max_steps * FEWER_STEPS) if dim >= 128 else recipe.max_steps
            fitting = dataclasses.replace(recipe, max_steps=steps)
            jobs += [
                Job(mixer, dim, dim // options.head_dim, seed, fitting) for mixer in options.mixers
            ]
    return jobs


def run(jobs: Sequence[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a job; train those of which the file has none."""
    path = options.out / f"{options.name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {row["key"]: row for row in map(json.loads, lines)}
    missing = [job for job in jobs if job.key not in rows]
    for row in _trained(missing, options.processes):
        rows[row["key"]] = row
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{len(rows)} rows; {row['mixer']}, D = {row['dim']}: {row['steps']} steps, "
              f"{row['cpu_seconds']:.0f} s of CPU", file=sys.stderr)  # fmt: skip
    return [rows[job.key] for job in jobs]


def _trained(jobs: Sequence[Job], processes: int) -> Iterable[dict[str, Any]]:
    if processes == 1 or len(jobs) < 2:
        yield from map(train_one, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(train_one, jobs)


def train_one(job: Job) -> dict[str, Any]:
    """Train and test one model, on one thread; return its row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = load_average()
    try:
        outcome = train(
            *job[:4],
            job.recipe,
            lambda text: print(f"  {job.mixer}, D = {job.dim}: {text}", file=sys.stderr),
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "key": job.key,
        "mixer": job.mixer,
        "dim": job.dim,
        "num_heads": job.num_heads,
        "seed": job.seed,
        "max_steps": job.recipe.max_steps,
        **outcome._asdict(),
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
        "load_average": [round(before, 1), round(load_average(), 1)],
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
