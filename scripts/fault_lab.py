"""A training run that is started, watched and compared: the tools of ``fault_test.py``.

Not here: when it is killed, and what is printed.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rxlm.errors import RunError
from rxlm.training.checkpoint import CHECKPOINTS, MARKER, list_checkpoints
from rxlm.training.metrics import TIMING_FIELDS, read_metrics

POLL_SECONDS = 0.001
START_SECONDS = 300.0
"""A start that shows nothing for so long hangs."""
FILES = ("model.safetensors", "train/optimizer.safetensors", "train/rng.safetensors")


def import_everything() -> None:
    """Import here what the children would import one by one."""

    import rxlm.cli.main
    import rxlm.training.stage  # noqa: F401


class Child:
    """A process that trains."""

    def __init__(self, arguments: Sequence[str], log: Path, *, fresh: bool) -> None:
        self.begin = time.perf_counter()
        self.log = log
        self._exit: int | None = None
        if fresh:
            with log.open("ab") as file:
                command = [sys.executable, "-m", "rxlm", *arguments]
                self._process = subprocess.Popen(command, stdout=file, stderr=file)
            self.pid = self._process.pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run_in_child(arguments, log))

    def exit_status(self) -> int | None:
        """Return how the process ended (minus the signal that ended it); None = it runs."""
        if self._exit is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._exit = os.waitstatus_to_exitcode(status) if pid else None
        return self._exit

    def wait(self) -> int:
        """Return how the process ended."""
        while self.exit_status() is None:
            time.sleep(0.01)
        assert self._exit is not None
        return self._exit

    def kill(self) -> float:
        """End it by SIGKILL; return how long it ran."""
        os.kill(self.pid, signal.SIGKILL)
        seconds = time.perf_counter() - self.begin
        self.wait()
        return seconds


def _run_in_child(arguments: Sequence[str], log: Path) -> int:
    from rxlm.cli.main import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.register(signal.SIGUSR1, file=descriptor)
    return main(list(arguments))


class Lab:
    """A folder with a recipe, its tokenizer, and the runs that are compared."""

    def __init__(self, root: Path, steps: int, overrides: Sequence[str], *, fresh: bool) -> None:
        self.root, self.steps, self._fresh = root, steps, fresh
        self._overrides = list(overrides)
        self.log = root / "log.txt"
        root.mkdir(parents=True, exist_ok=True)
        (root / "10_tokenizer.yaml").write_text(yaml.safe_dump(tokenizer_recipe()))
        (root / "20_memory.yaml").write_text(yaml.safe_dump(model_recipe(steps)))
        status = self._child(["train", str(root / "10_tokenizer.yaml")], root / "10_tokenizer")
        self.expect_success(status.wait())

    def start(self, run: Path) -> Child:
        """Start the run in ``run``, or resume it."""
        return self._child(["train", str(self.root / "20_memory.yaml"), *self._overrides], run)

    def _child(self, arguments: list[str], run: Path) -> Child:
        return Child([*arguments, "--out", str(run)], self.log, fresh=self._fresh)

    def expect_success(self, status: int) -> None:
        """Raise unless a child ended well."""
        if status != 0:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RunError(f"a child ended with status {status}:\n{tail}")


def tokenizer_recipe() -> dict[str, Any]:
    """Return a recipe that trains a small tokenizer in a moment."""
    return {
        "stage": "tokenizer",
        "tokenizer": {"kind": "byte-bpe", "vocab_size": 384},
        "objective": {"dialogues": 40},
    }


def model_recipe(steps: int) -> dict[str, Any]:
    """Return a recipe in which everything has a state that a resume could lose: dropout, a
    curriculum, accumulation, a state that is carried, validation that improves at odd times."""
    part = {
        "num_layers": 1, "embed_dim": 32, "ff_dim": 32, "att_heads": 2, "seq_len": 96,
        "stm_size": 4, "self_att_type": "md_gdn", "cross_att_type": "mha", "tie_embeddings": True,
        "att_dropout": 0.1, "ff_dropout": 0.1,
    }  # fmt: skip
    return {
        "stage": "memory_aware",
        "init_from": None,
        "tokenizer_from": "10_tokenizer.yaml",
        "model": {
            "decoder": part,
            "encoder": {"self_att_type": "mha"},
            "memory_attention": {"variant": "simple", "att_type": "mha", "att_heads": 1},
        },
        "train": {
            "steps": steps, "lr": 3e-3, "warmup_steps": 5, "accumulation": 2, "threads": 1,
            "log_every": 3, "save_every": 1, "validate_every": 7, "keep_last": 2, "keep_best": 1,
            "loggers": [],
        },
        "objective": {
            "phases": [
                {"turns": 2, "dialogues": 2, "reads": "history", "steps": max(1, steps // 3)},
                {"turns": 3, "dialogues": 2},
            ],
            "validation_dialogues": 1,
        },
    }  # fmt: skip


def newest(run: Path) -> int:
    """Return the step of the newest complete checkpoint; -1 = none."""
    steps = [int(path.parent.name[5:]) for path in (run / CHECKPOINTS).glob(f"step-*/{MARKER}")]
    return max(steps, default=-1)


def leftovers(run: Path) -> str:
    """Say what an interrupted save or deletion left behind; empty = nothing."""
    found = []
    for path in sorted((run / CHECKPOINTS).glob("*")):
        if path.name.startswith(".tmp-"):
            found.append("half-written folder")
        elif path.name.startswith(".trash-"):
            found.append("half-deleted folder")
        elif not (path / MARKER).exists():
            found.append("folder without marker")
    return ", ".join(found)


def is_saving(run: Path) -> bool:
    """Return whether the temporary folder of a checkpoint is there."""
    try:
        return any(name.startswith(".tmp-") for name in os.listdir(run / CHECKPOINTS))
    except FileNotFoundError:
        return False


def wait_for(child: Child, condition: Callable[[], bool]) -> bool:
    """Wait for a condition; return whether the child still ran when it came true."""
    deadline = time.perf_counter() + START_SECONDS
    while not condition():
        if child.exit_status() is not None:
            return False
        if time.perf_counter() > deadline:
            os.kill(child.pid, signal.SIGUSR1)  # its stack goes into the log
            time.sleep(1.0)
            child.kill()
            raise RunError(f"nothing happened for {START_SECONDS:.0f} s; see {child.log}")
        time.sleep(POLL_SECONDS)
    return child.exit_status() is None


class Durations(NamedTuple):
    """What the run that is not stopped takes, in seconds."""

    start: float
    """Until the first checkpoint is complete."""
    step: float
    """A step with its checkpoint."""
    save: float
    """While a temporary folder is there."""


def measure(lab: Lab, run: Path) -> Durations:
    """Let a run end undisturbed; return what it takes."""
    child = lab.start(run)
    saves: list[float] = []
    wait_for(child, lambda: newest(run) >= 0)
    start = time.perf_counter() - child.begin
    while wait_for(child, lambda: is_saving(run)):
        begin = time.perf_counter()
        wait_for(child, lambda: not is_saving(run))
        saves.append(time.perf_counter() - begin)
    seconds = time.perf_counter() - child.begin
    lab.expect_success(child.wait())
    saves.sort()
    return Durations(
        start, (seconds - start) / max(1, lab.steps - 1), saves[len(saves) // 2] if saves else 0.01
    )


def complete_and_readable(run: Path) -> bool:
    """Return whether every complete checkpoint can be read, to its last tensor."""
    from safetensors.torch import load_file

    from rxlm.training.training_state import read_snapshot

    for item in list_checkpoints(run):
        read_snapshot(item.path)
        load_file(item.path / "model.safetensors")
    return True


def differences(one: Path, two: Path) -> list[str]:
    """Return what differs between the ends of two runs; times do not count."""
    import torch
    from safetensors.torch import load_file

    found = []
    left, right = (list_checkpoints(run)[-1].path for run in (one, two))
    if left.name != right.name:
        found.append(f"last checkpoint: {left.name} and {right.name}")
    for name in FILES:
        ours, theirs = load_file(left / name), load_file(right / name)
        if ours.keys() != theirs.keys():
            found.append(f"{name}: other tensors")
            continue
        for key, value in ours.items():
            other = theirs[key]
            if value.dtype != other.dtype or not torch.equal(value, other):
                found.append(f"{name}: {key} differs")
    if (left / "train/rng.json").read_text() != (right / "train/rng.json").read_text():
        found.append("train/rng.json differs")
    lines, others = (
        [
            {key: value for key, value in record.items() if key not in TIMING_FIELDS}
            for record in read_metrics(run / "metrics.jsonl")
        ]
        for run in (one, two)
    )
    if lines != others:
        found.append("metrics.jsonl differs")
    kept, also = ([item.step for item in list_checkpoints(run)] for run in (one, two))
    if kept != also:
        found.append(f"checkpoints kept: {kept} and {also}")
    return found
