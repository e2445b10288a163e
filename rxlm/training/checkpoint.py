"""Checkpoint folders that survive a kill at any instant: written aside, renamed, marked last.

``checkpoints/step-000500/`` is a loadable model folder with a ``train/`` folder beside the weights
and a file ``COMPLETE``. A folder without the marker is an interrupted save: it is reported and
never used. What the files hold is not known here (see ``training_state.py``). No torch.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from rxlm.errors import RunError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MARKER = "COMPLETE"
_UNFINISHED, _DISCARDED = ".tmp-", ".trash-"


class Score(NamedTuple):
    """A validation metric of a checkpoint."""

    metric: str
    mode: str
    """``min`` or ``max``: which values are better."""
    value: float

    def rank(self) -> float:
        """Return a number that is smaller for a better checkpoint."""
        return self.value if self.mode == "min" else -self.value


class Checkpoint(NamedTuple):
    """A complete checkpoint folder."""

    path: Path
    step: int
    score: Score | None
    """``None`` when there was no validation at this step."""


def list_checkpoints(run_directory: str | Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, oldest first."""
    found = []
    for path in Path(run_directory, CHECKPOINTS).glob(f"step-*/{MARKER}"):
        marker = _read_marker(path)
        score = Score(**marker["score"]) if marker["score"] else None
        found.append(Checkpoint(path.parent, marker["step"], score))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_latest(run_directory: str | Path) -> Path | None:
    """Return the newest complete checkpoint folder of a run, or ``None``.

    Folders of interrupted saves are reported in the log.
    """
    for path in sorted(Path(run_directory, CHECKPOINTS).glob("step-*")):
        if not (path / MARKER).exists():
            logger.warning("%s: ignored, it has no %s (an interrupted save)", path, MARKER)
    checkpoints = list_checkpoints(run_directory)
    return checkpoints[-1].path if checkpoints else None


def find_best(run_directory: str | Path) -> Path | None:
    """Return the checkpoint folder with the best validation metric, or ``None``.

    Checkpoints that were scored by another metric than the newest scored one are left out. Of
    equals, the older one is best.
    """
    ranked = _ranked(list_checkpoints(run_directory))
    return ranked[0].path if ranked else None


def save_checkpoint(
    run_directory: Path,
    step: int,
    score: Score | None,
    write: Callable[[Path], None],
    num_bytes: int,
) -> Path:
    """Write a checkpoint so that it is either complete or not there.

    Args:
        run_directory: the run; the folder is ``checkpoints/step-<step>`` in it.
        step: number of updates made.
        score: validation metric at this step, for :func:`find_best`.
        write: fills the folder that it is given.
        num_bytes: expected size, for the message when the disk is full.

    Returns:
        The complete folder.

    Raises:
        RunError: when the disk refuses; earlier checkpoints are intact and nothing is left over.
    """
    root = run_directory / CHECKPOINTS
    final = root / f"step-{step:06d}"
    temporary = root / f"{_UNFINISHED}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        write(temporary)
        _sync_tree(temporary)
        _discard(final)
        os.replace(temporary, final)
        _sync(root)
        _write_marker(final, {"step": step, "score": score._asdict() if score else None})
    except (OSError, SafetensorError, RunError) as error:
        if not (final / MARKER).exists():
            shutil.rmtree(final, ignore_errors=True)
        # A writer of model files may have wrapped what the disk said.
        reason = error.__cause__ if isinstance(error, RunError) else error
        if not isinstance(reason, (OSError, SafetensorError)):
            raise
        raise RunError(_describe_failed_save(final, reason, num_bytes)) from error
    finally:
        # Also on KeyboardInterrupt; after the rename there is nothing to remove.
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def remove_surplus(run_directory: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest ``keep_last`` and the best ``keep_best`` checkpoints."""
    checkpoints = list_checkpoints(run_directory)
    kept = {checkpoint.path for checkpoint in checkpoints[-keep_last:]}
    kept |= {checkpoint.path for checkpoint in _ranked(checkpoints)[:keep_best]}
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            try:
                _discard(checkpoint.path)
            except OSError as error:
                # Too many checkpoints are no reason to lose a run.
                logger.warning("%s: could not be deleted (%s)", checkpoint.path, error)


def clean_leftovers(run_directory: Path) -> None:
    """Remove what a killed save or deletion left behind."""
    for prefix in (_UNFINISHED, _DISCARDED):
        for path in Path(run_directory, CHECKPOINTS).glob(f"{prefix}*"):
            logger.warning("%s: removed, it is left over from a killed run", path)
            _remove(path)


def _ranked(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints scored like the newest scored one, best first, then oldest first."""
    scored = [(item.score, item) for item in checkpoints if item.score is not None]
    if not scored:
        return []
    kind = scored[-1][0][:2]
    comparable = [pair for pair in scored if pair[0][:2] == kind]
    return [item for _, item in sorted(comparable, key=lambda pair: (pair[0].rank(), pair[1].step))]


def _read_marker(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}). Delete {path.parent} to go on without this "
            "checkpoint."
        ) from error


def _write_marker(directory: Path, content: dict[str, Any]) -> None:
    """Write the marker; it appears with its whole content or not at all."""
    temporary = directory / f"{_UNFINISHED}{MARKER}"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, directory / MARKER)
    _sync(directory)


def _discard(directory: Path) -> None:
    """Delete a folder such that a kill midway does not leave half of it under its name."""
    if directory.exists():
        trash = directory.with_name(f"{_DISCARDED}{directory.name}")
        _remove(trash)
        os.replace(directory, trash)
        _remove(trash)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _sync_tree(directory: Path) -> None:
    """Force all files below ``directory``, and the folders that name them, to disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder, and needs no such call.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe_failed_save(final: Path, error: Exception, num_bytes: int) -> str:
    """Say what could not be saved, how much room it needs, and what is still there."""
    free = shutil.disk_usage(final.parent if final.parent.exists() else final.parents[1]).free
    older = [item for item in list_checkpoints(final.parents[1]) if item.path != final]
    intact = f"The checkpoint {older[-1].path} is intact." if older else "There is no older one."
    return (
        f"{final}: the checkpoint could not be written: {error}. It needs about "
        f"{num_bytes / 1e6:.1f} MB; {free / 1e6:.1f} MB are free. {intact} Make room (or write "
        "the run elsewhere), then start the same command again: it resumes."
    )
