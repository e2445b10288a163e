"""Kills a real training run again and again, resumes it, and compares its end with that of a run
that was never stopped.

    python scripts/fault_test.py --kills 25 --seed 0 --page docs/benchmarks/faults.md
    python scripts/fault_test.py --kills 3 --steps 12               the short form, as in the tests
    python scripts/fault_test.py --full-disk                        a disk that fills up (Linux)

Every start is ``rxlm train RECIPE`` in a process of its own, ended by SIGKILL. A third of the kills
come at a random instant after a random step, a third while the temporary folder of a checkpoint is
there, and the others anywhere, the start included. Weights, optimizer state, random generators and
metrics must be those of the other run bit by bit, and no kill may cost a complete checkpoint.

Children are forked from this process, which has imported everything: a start costs a fraction of a
second instead of the seconds of an import. ``--fresh`` starts a new interpreter each time.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fault_lab import (
    POLL_SECONDS,
    Durations,
    Lab,
    complete_and_readable,
    differences,
    import_everything,
    is_saving,
    leftovers,
    measure,
    newest,
    wait_for,
)

from rxlm.errors import RunError, UserError
from rxlm.training.checkpoint import list_checkpoints

AIMS = ("after a step", "in a save", "anywhere")


class Kill(NamedTuple):
    """One start of the run and its end."""

    number: int
    aim: str
    seconds: float
    """From the start of the process."""
    before: int
    """Newest complete checkpoint at the start; -1 = none."""
    after: int
    """The same after the kill."""
    left: str
    """What the kill left behind in ``checkpoints``; empty = it did not hit a save."""


def kill_once(
    lab: Lab, run: Path, number: int, target: int, durations: Durations, draw: random.Random
) -> Kill:
    """Start the run and kill it at or after step ``target`` (or anywhere).

    Raises:
        RunError: if the run ends before it is killed, or lost a complete checkpoint.
    """
    aim, before = AIMS[number % len(AIMS)], newest(run)
    intact = {item.step for item in list_checkpoints(run)} if before >= 0 else set()
    child = lab.start(run)
    alive = True
    if aim == "anywhere":
        pause = draw.uniform(0.0, durations.start + 2 * durations.step)
    else:
        alive = wait_for(child, lambda: newest(run) >= target)
        pause = draw.uniform(0.0, durations.step)
        if aim == "in a save":
            alive = alive and wait_for(child, lambda: is_saving(run))
            pause = draw.uniform(0.0, durations.save)
    end = time.perf_counter() + pause
    while alive and time.perf_counter() < end:
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.perf_counter())))
    if not alive or child.exit_status() is not None:
        raise RunError(f"kill {number + 1}: the run ended first; use more --steps. See {lab.log}")
    seconds = child.kill()
    after = newest(run)
    if after < before or not complete_and_readable(run):
        raise RunError(f"kill {number + 1} cost a complete checkpoint: had {sorted(intact)}, {run}")
    return Kill(number + 1, aim, seconds, before, after, leftovers(run))


def kill_and_compare(lab: Lab, kills: int, seed: int) -> tuple[Durations, list[Kill], list[str]]:
    """Return how long things take, the kills, and what differs at the end."""
    draw = random.Random(seed)
    whole, killed = lab.root / "whole", lab.root / "killed"
    durations = measure(lab, whole)
    targets = sorted(draw.randint(1, max(1, lab.steps - 4)) for _ in range(kills))
    done: list[Kill] = []
    for number, target in enumerate(targets):
        done.append(kill_once(lab, killed, number, target, durations, draw))
        print(row(done[-1]), flush=True)
    lab.expect_success(lab.start(killed).wait())
    return durations, done, differences(whole, killed)


HEADER = (
    "| kill | aimed | killed after (s) | resumed from | newest complete | left behind |\n"
    "| ---: | --- | ---: | ---: | ---: | --- |"
)


def row(kill: Kill) -> str:
    """Return a line of the table."""
    before, after = ("none" if step < 0 else str(step) for step in (kill.before, kill.after))
    return (
        f"| {kill.number} | {kill.aim} | {kill.seconds:.2f} | {before} | {after} | "
        f"{kill.left or '-'} |"
    )


def verdict(kills: list[Kill], found: list[str], steps: int) -> str:
    """Say what came out."""
    hit = sum(bool(kill.left) for kill in kills)
    if found:
        return f"FAILED: after {len(kills)} kills the runs differ:\n" + "\n".join(found)
    return (
        f"PASSED: after {len(kills)} kills, {hit} of them inside a save, {steps} steps end bit for "
        "bit as without any: weights, optimizer state, random generators, metrics, and the "
        "checkpoints that are kept."
    )


def page(lab: Lab, durations: Durations, kills: list[Kill], result: str, options: Any) -> str:
    """Return the page that records a run of this script."""
    import torch

    command = f"python scripts/fault_test.py --kills {options.kills} --seed {options.seed}"
    return "\n".join(
        [
            "# Killed and resumed",
            "",
            f"Written by `{command} --page docs/benchmarks/faults.md`; every figure below comes",
            "from that run. A memory-aware training (curriculum, dropout, accumulation, carried",
            f"state; {lab.steps} steps, a checkpoint after each) is ended by SIGKILL and started",
            "again, and compared with the same run left alone.",
            "",
            f"**{result}**",
            "",
            "|  | this run |",
            "| --- | --- |",
            f"| torch | {torch.__version__} |",
            f"| date | {time.strftime('%Y-%m-%d', time.gmtime())} |",
            f"| first checkpoint complete after | {durations.start:.2f} s |",
            f"| a step with its checkpoint | {durations.step * 1000:.0f} ms |",
            f"| of which a half-written folder is there for | {durations.save * 1000:.0f} ms |",
            "",
            "*Newest complete* is the last step whose checkpoint was complete after the kill;",
            "*left behind* is what the kill interrupted, which the next start removes.",
            "",
            HEADER,
            *map(row, kills),
            "",
        ]
    )


def fill_the_disk(lab: Lab) -> list[str]:
    """Let a small file system fill up in the middle of a save, then make room and go on.

    Needs to be root in a name space of its own (:func:`enter_namespace`).

    Returns:
        What was wrong; empty = nothing was lost.
    """
    whole, disk = lab.root / "whole", lab.root / "disk"
    measure(lab, whole)
    size = sum(
        path.stat().st_size
        for path in list_checkpoints(whole)[-1].path.rglob("*")
        if path.is_file()
    )
    disk.mkdir()
    # Three checkpoints fit (two newest, best), the one being written does not.
    mount = ["mount", "-t", "tmpfs", "-o", f"size={round(2.7 * size / 4096) * 4}k", "rxlm-full"]
    subprocess.run([*mount, str(disk)], check=True)
    try:
        run = disk / "run"
        # A run looks for its tokenizer beside it.
        (disk / "10_tokenizer").symlink_to(lab.root / "10_tokenizer")
        status = lab.start(run).wait()
        message = lab.log.read_text(errors="replace")
        found = []
        if status != 1:
            found.append(f"a full disk ended the run with status {status}, expected 1")
        if "No space left on device" not in message or "is intact" not in message:
            found.append("the message does not say what is full and what is intact")
        if not list_checkpoints(run) or not complete_and_readable(run) or leftovers(run):
            found.append("a complete checkpoint was lost, or half of one was left")
        print(f"the disk was full after step {newest(run)}: {last_line(message)}")
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        lab.expect_success(lab.start(run).wait())
        return found + differences(whole, run)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def enter_namespace() -> None:
    """Start this script again as root of a mount name space of its own; no root is needed."""
    if os.environ.get("RXLM_FAULT_NAMESPACE") or shutil.which("unshare") is None:
        raise UserError("--full-disk needs Linux and user name spaces (the command unshare).")
    environment = {**os.environ, "RXLM_FAULT_NAMESPACE": "1"}
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
    os.execvpe(command[0], command, environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test; return the exit status."""
    parser = argparse.ArgumentParser(description="Kill a training run and compare its end.")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--steps", type=int, default=60, help="length of the run")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each start")
    parser.add_argument("--full-disk", action="store_true", help="fill a disk instead of killing")
    parser.add_argument("--page", type=Path, help="where to write the table as a page")
    parser.add_argument("--work", type=Path, help="folder that is kept; default: a temporary one")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        if options.full_disk and not os.environ.get("RXLM_FAULT_NAMESPACE"):
            enter_namespace()
        with tempfile.TemporaryDirectory(prefix="rxlm-faults-") as temporary:
            return run_in(options.work or Path(temporary), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_in(folder: Path, options: argparse.Namespace) -> int:
    """Run the test that was asked for in a folder; return the exit status."""
    if not options.fresh:
        import_everything()
    begin = time.perf_counter()
    lab = Lab(folder, options.steps, options.set, fresh=options.fresh)
    if options.full_disk:
        found = fill_the_disk(lab)
        print("\n".join(["FAILED:", *found]) if found else "PASSED: nothing was lost.")
        return int(bool(found))
    print(HEADER, flush=True)
    durations, kills, found = kill_and_compare(lab, options.kills, options.seed)
    result = verdict(kills, found, options.steps)
    print(f"{result}\n{time.perf_counter() - begin:.0f} s")
    if options.page is not None and not found:
        options.page.write_text(page(lab, durations, kills, result, options), encoding="utf-8")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
