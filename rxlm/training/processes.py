"""One stage in several processes of this machine, started and watched from one that is not torch's.

``torchrun`` starts ``rxlm train`` once per process, as a person would; the processes share every
update (:mod:`rxlm.training.distributed`), so the result is that of one process. Not here: several
machines, which ``torchrun`` is started on by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rxlm.errors import RunError, UserError
from rxlm.training.recipes import StageFile
from rxlm.training.run_folder import read_status
from rxlm.training.signals import StopRequest
from rxlm.training.stage import StageResult


def check_processes(count: int) -> None:
    """Refuse a number of processes that makes no sense on this machine.

    Raises:
        UserError: if it is below one or above the number of CPU cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not 1 <= count <= (cores or 1):
        raise UserError(
            f"processes={count}: expected 1 to {cores or 1}, the CPU cores that this process may "
            "use. For GPUs, start a stage by hand: torchrun --nproc-per-node N -m rxlm train RECIPE"
        )


def command_of(stage: StageFile, folder: Path, count: int) -> list[str]:
    """Return the command that trains a stage in ``count`` processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [
        *launcher, "--standalone", "--nproc-per-node", str(count), "-m", "rxlm", "train",
        str(stage.path), *stage.overrides, "--out", str(folder),
    ]  # fmt: skip


def run_stage_in_processes(stage: StageFile, folder: Path, count: int) -> StageResult:
    """Train one stage into ``folder`` in ``count`` processes, or go on with what is there.

    SIGINT and SIGTERM are handed on: the processes save at the next step boundary and end. A step
    that takes longer than the 30 seconds that torchrun waits is lost, back to the last checkpoint.
    After a second Ctrl-C nobody waits for them here.

    Args:
        stage: the recipe; not of stage ``tokenizer``.
        folder: the run folder.
        count: how many processes.

    Raises:
        RunError: when a process fails. What it said stands on standard error.
    """
    environment = dict(os.environ)
    # What torchrun would set, with a warning; the recipe's `train.threads` comes later and wins.
    environment.setdefault("OMP_NUM_THREADS", "1")
    # DDP looks for parameters without a gradient in every step, for a curriculum may begin without
    # memory; where it finds none, it warns once a process, in words that help nobody.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A session of its own: Ctrl-C must reach the processes once, not once from the terminal and
    # once from the launcher, for the second one means "stop without saving".
    with StopRequest() as stop:
        launcher = subprocess.Popen(
            command_of(stage, folder, count), env=environment, start_new_session=True
        )
        is_asked = False
        try:
            while (status := _status_of(launcher)) is None:
                if stop.signal is not None and not is_asked:
                    launcher.terminate()
                    is_asked = True
        finally:
            # A second Ctrl-C may come before the first was handed on: without this the processes
            # would train on, watched by nobody, into a folder that the next run writes to.
            if launcher.poll() is None and not is_asked:
                launcher.terminate()
    record = read_status(folder)
    if record is not None and record.status == "interrupted" and stop.signal is not None:
        return StageResult(
            stage.name, folder, record.status, record.metrics, record.seconds, signal=stop.signal
        )
    if status != 0 or record is None:
        raise RunError(
            f"{stage.name}: a process of {count} ended with status {status}; its message stands "
            "above. What was saved is kept: the same command goes on from there."
        )
    return StageResult(stage.name, folder, record.status, record.metrics, record.seconds)


def _status_of(launcher: subprocess.Popen[bytes]) -> int | None:
    """Return the status of a launcher that ended, or None after a moment of waiting."""
    try:
        return launcher.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None
