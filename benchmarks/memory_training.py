"""Methods of memory-aware training, one by one: what each does to recall at a small budget.

    python benchmarks/memory_training.py --quick                 # does it work here?
    python benchmarks/memory_training.py --work runs/methods     # hours; may be stopped, goes on
    python benchmarks/memory_training.py --work runs/methods --report --out docs/benchmarks

Every variant is the nano recipe with one thing changed, trained with the same number of updates
and several seeds, and measured on dialogues of the test split. Stages that do not use memory
attention are trained once a seed. Finished trainings are kept in --work, unfinished ones go on
from their last checkpoint; several processes may share the folder, each takes what no other is at.
Results that the page in --out holds already are taken from there.
Writes memory_training.md, .json and .png from what is finished. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from memory_training_report import write_report
from memory_training_variants import (
    AWARE,
    BY_NAME,
    PRETRAINING,
    QUICK,
    SHARED,
    VARIANTS,
    Budget,
    Variant,
    key_of,
    stage_of,
)

from rxlm.errors import RunError, UserError
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.timing import machine_name
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.saving import save_model
from rxlm.storage.model_folder import resolve_model_dir
from rxlm.training.build import model_config
from rxlm.training.recipes import ReactiveRecipe, StageFile
from rxlm.training.rng import derive_seed, isolated_random_state
from rxlm.training.run_folder import read_status, write_atomically
from rxlm.training.stage import run_stage

RECALL = RecallSettings(
    distances=(1, 2, 4),
    facts=(4,),
    unseen=("none", "pairs"),
    update_distances=(1, 4),
    unknown_distances=(),
    conditions=("memory", "zeroed"),
    free_running=False,
    seeds=(0,),
    dialogues=100,
    mistakes_per_cell=0,
)


class Stopped(Exception):
    """Time is over, or a signal came; what is there has been saved."""


class Clock:
    """Ends the training that runs, with a checkpoint, when time is over or SIGTERM comes."""

    def __init__(self, minutes: float | None) -> None:
        self.is_over = False
        self._training = False
        # The Trainer has its own while it trains, which saves; this one is for the time between.
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self._ring),
        }
        if minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 60.0 * minutes)

    def close(self) -> None:
        """Put the handlers back."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def train(self, stage: StageFile, folder: Path) -> float:
        """Train one stage, or go on with it; return its seconds.

        Raises:
            Stopped: when it was interrupted.
        """
        self._training = True
        try:
            result = run_stage(stage, folder)
        finally:
            self._training = False
        if result.status == "interrupted":
            raise Stopped(f"{folder}: goes on from its checkpoint at the next start")
        return result.seconds

    def _ring(self, *_: object) -> None:
        self.is_over = True
        if self._training:
            signal.raise_signal(signal.SIGTERM)

    def _terminate(self, *_: object) -> None:
        raise Stopped("stopped by SIGTERM" if not self.is_over else "time is over")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, write the page; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/memory_training.py", *typed])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        variants = chosen_variants(options.variants)
        adopt(options)
        if not options.report:
            run_all(variants, options)
        results = finished(options)
        if results:
            write_report(results, options.out, command)
            print(f"written: {options.out / 'memory_training'}.md, .json, .png")
        else:
            print("nothing is finished yet", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        torch.set_num_threads(threads)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Methods of memory-aware training.")
    add = parser.add_argument
    names = ", ".join(variant.name for variant in VARIANTS)
    add("--variants", nargs="+", metavar="NAME", help=f"rows, in order (default: all): {names}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    add("--work", type=Path, default=Path("runs/memory-training"), help="folder of the trainings")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    add("--time-budget", type=float, metavar="MINUTES", help="stop after so long; may go on")
    add("--report", action="store_true", help="train nothing: write the page of what is finished")
    add("--quick", action="store_true", help="a few updates, one seed, two rows unless named")
    options = parser.parse_args(arguments)
    options.budget = QUICK if options.quick else Budget()
    if options.quick:
        options.work /= "quick"
        options.seeds = options.seeds[:1]
        options.variants = options.variants or [VARIANTS[0].name, VARIANTS[1].name]
    return options


def chosen_variants(names: Sequence[str] | None) -> list[Variant]:
    """Return the variants of these names; ``None``: all.

    Raises:
        UserError: for a name that does not exist.
    """
    if names is None:
        return list(VARIANTS)
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise UserError(f"no variant is called {unknown[0]!r}: use {', '.join(BY_NAME)}.")
    return [BY_NAME[name] for name in names]


def run_all(variants: Sequence[Variant], options: argparse.Namespace) -> None:
    """Make every result that is missing and that no other process is making."""
    clock = Clock(options.time_budget)
    try:
        for variant in variants:
            for seed in options.seeds:
                if clock.is_over:
                    raise Stopped("time is over")
                name = f"{variant.name}-s{seed}-{key_of(variant, seed, options.budget)}"
                with locked(options.work, name, wait=False) as mine:
                    if mine and not result_file(options.work, name).exists():
                        result = run_one(variant, seed, name, options, clock)
                        save_result(options.work, name, result)
                        print(f"{name}: {result['seconds']:.0f} s of training", file=sys.stderr)
    except Stopped as reason:
        print(f"{reason}", file=sys.stderr)
    finally:
        clock.close()


def run_one(
    variant: Variant, seed: int, name: str, options: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """Train one variant with one seed, and measure it."""
    work, budget = options.work, options.budget
    shared = work / "shared" / f"s{seed}-{key_of(variant, seed, budget, shared=True)}"
    with locked(work, f"shared-{shared.name}", wait=True):
        for stage_name in SHARED:
            clock.train(stage_of(stage_name, variant, seed, budget), shared / stage_name)
    folder = work / "runs" / name
    before = folder / "start"
    if not before.exists():
        make_start(stage_of(AWARE, variant, seed, budget), shared / SHARED[-1], before)
    seconds = 0.0
    if variant.pretrained:
        stage = stage_of(PRETRAINING, variant, seed, budget, before)
        before = folder / PRETRAINING
        seconds += clock.train(stage, before)
    seconds += clock.train(stage_of(AWARE, variant, seed, budget, before), folder / AWARE)
    status = read_status(folder / AWARE)
    assert status is not None, "it was trained just now"
    model = RxTAlpha.from_pretrained(resolve_model_dir(folder / AWARE))
    settings = RECALL.model_copy(update={"dialogues": 4}) if options.quick else RECALL
    recall = evaluate_recall(model, settings)
    return {
        "name": name,
        "variant": variant.name,
        "title": variant.title,
        "seed": seed,
        "budget": budget._asdict(),
        "updates": status.step,
        "tokens": round(status.tokens_per_second * status.seconds),
        "train_accuracy": status.metrics.get("train/accuracy"),
        "seconds": round(seconds, 1),
        "recall_seconds": round(recall.seconds, 1),
        "machine": machine_name("cpu"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": recall.rows,
    }


def make_start(stage: StageFile, sft: Path, folder: Path) -> None:
    """Write the trained encoder and decoder with the variant's own, new memory attention."""
    recipe = stage.recipe
    assert isinstance(recipe, ReactiveRecipe) and recipe.model is not None
    source = RxTAlpha.from_pretrained(resolve_model_dir(sft))
    tokenizer = source.require_tokenizer()
    with isolated_random_state(derive_seed(recipe.train.seed, "model")):
        model = RxTAlpha.from_config(model_config(recipe.model, tokenizer), tokenizer)
    model.encoder.load_state_dict(source.encoder.state_dict())
    model.decoder.load_state_dict(source.decoder.state_dict())
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    save_model(model, unfinished)
    unfinished.rename(folder)


@contextlib.contextmanager
def locked(work: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Hold a lock of the work folder, until killed at most; yields whether it was to be had."""
    folder = work / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def result_file(work: Path, name: str) -> Path:
    """Return where the result of one training is kept."""
    return work / "results" / f"{name}.json"


def save_result(work: Path, name: str, result: dict[str, Any]) -> None:
    """Keep the result of one training."""
    path = result_file(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result) + "\n")


def adopt(options: argparse.Namespace) -> None:
    """Keep the results of the written page as if they had been made in this work folder."""
    page = options.out / "memory_training.json"
    if not page.exists():
        return
    for result in json.loads(page.read_text(encoding="utf-8"))["results"]:
        variant = BY_NAME.get(result["variant"])
        if variant is None or result["budget"] != options.budget._asdict():
            continue
        name = f"{variant.name}-s{result['seed']}-{key_of(variant, result['seed'], options.budget)}"
        # Of another version of the recipes, it is not a result of this variant.
        if result["name"] == name and not result_file(options.work, name).exists():
            save_result(options.work, name, result)


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all results of this budget, in the order of the rows."""
    found = []
    for variant in VARIANTS:
        for seed in range(100):
            name = f"{variant.name}-s{seed}-{key_of(variant, seed, options.budget)}"
            path = result_file(options.work, name)
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


if __name__ == "__main__":
    sys.exit(main())
