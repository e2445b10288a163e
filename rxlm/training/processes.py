"""One stage in several processes of this machine, started and watched from one that is not torch's.

``torchrun`` starts ``rxlm train`` once per process, as a person would; the processes share every
update (:mod:`rxlm.training.distributed`), so the result is that of one process. Not here: several
machines, which ``torchrun`` is started on by hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rxlm.errors import RunError, UserError
from rxlm.training.recipes import StageFile
from rxlm.training.run_folder import read_status
from rxlm.training.signals import STOP_SIGNALS
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

    SIGINT and SIGTERM are handed on: the processes save at the next step boundary and end.

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
    # A session of its own: Ctrl-C must reach the processes once, not once from the terminal and
    # once from the launcher, for the second one means "stop without saving".
    process = subprocess.Popen(
        command_of(stage, folder, count), env=environment, start_new_session=True
    )
    with _handing_on(process) as received:
        status = process.wait()
    record = read_status(folder)
    if record is not None and record.status == "interrupted" and received:
        return StageResult(
            stage.name, folder, record.status, record.metrics, record.seconds, signal=received[0]
        )
    if status != 0 or record is None:
        raise RunError(
            f"{stage.name}: a process of {count} ended with status {status}; its message stands "
            "above. What was saved is kept: the same command goes on from there."
        )
    return StageResult(stage.name, folder, record.status, record.metrics, record.seconds)


@contextmanager
def _handing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send SIGTERM to a process when this one is asked to stop; yield the signals received."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
