"""Checkpoint folders: complete or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rxlm.errors import RunError
from rxlm.training.checkpoint import (
    MARKER,
    Score,
    clean_leftovers,
    find_best,
    find_latest,
    list_checkpoints,
    remove_surplus,
    save_checkpoint,
)


def save(run: Path, step: int, value: float | None = None, metric: str = "loss") -> Path:
    score = None if value is None else Score(metric, "min" if metric == "loss" else "max", value)

    def write(directory: Path) -> None:
        (directory / "train").mkdir()
        (directory / "train" / "state.json").write_text(json.dumps({"step": step}))
        (directory / "model").write_bytes(b"weights" * 100)

    return save_checkpoint(run, step, score, write, 800)


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run)]


def test_latest_and_best(tmp_path: Path) -> None:
    """Catches an order by name or date, a wrong direction of 'best', a younger equal that wins."""
    assert find_latest(tmp_path) is None
    assert find_best(tmp_path) is None
    for step, value in [(1_000_000, 2.0), (9, 1.0), (200, 1.0), (999, None)]:
        save(tmp_path, step, value)
    assert find_latest(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    assert find_best(tmp_path) == tmp_path / "checkpoints" / "step-000009"
    # Another metric from here on: the old scores no longer compare.
    save(tmp_path, 1_000_001, 0.5, "accuracy")
    save(tmp_path, 1_000_002, 0.7, "accuracy")
    assert find_best(tmp_path) == tmp_path / "checkpoints" / "step-1000002"


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Catches a deleted best checkpoint, and one kept too many or too few."""
    for step, value in enumerate([3.0, 1.0, 2.0, 1.5, 4.0], start=1):
        save(tmp_path, step, value)
    remove_surplus(tmp_path, keep_last=2, keep_best=2)
    assert steps(tmp_path) == [2, 4, 5]
    remove_surplus(tmp_path, keep_last=1, keep_best=0)
    assert steps(tmp_path) == [5]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_incomplete_folders_are_reported_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a folder without its marker that is used, or that blocks the next save."""
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    (broken / MARKER).unlink()
    (tmp_path / "checkpoints" / ".tmp-step-000003").mkdir()
    assert find_latest(tmp_path) == tmp_path / "checkpoints" / "step-000001"
    assert "step-000002: ignored" in caplog.text
    with caplog.at_level(logging.WARNING):
        clean_leftovers(tmp_path)
    assert ".tmp-step-000003: removed" in caplog.text
    assert not (tmp_path / "checkpoints" / ".tmp-step-000003").exists()
    assert find_latest(tmp_path) != save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a half-written folder left behind, a lost older one, a message without numbers."""
    before = save(tmp_path, 1)

    def full(directory: Path) -> None:
        (directory / "model").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "model"))

    with pytest.raises(RunError) as error:
        save_checkpoint(tmp_path, 2, None, full, 12_000_000)
    message = str(error.value)
    for part in ("step-000002", "No space left", "12.0 MB", "MB are free", str(before)):
        assert part in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]

    # The disk may also fill up at the very last file.
    def refuse(directory: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rxlm.training.checkpoint._write_marker", refuse)
    with pytest.raises(RunError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_an_interrupt_during_a_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """Catches a temporary folder that stays after Ctrl-C."""

    def interrupted(directory: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, None, interrupted, 0)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    """Catches a traceback, or a silent skip, for a marker that cannot be read."""
    (save(tmp_path, 1) / MARKER).write_text("{")
    with pytest.raises(RunError, match=r"step-000001/COMPLETE.*Delete"):
        find_latest(tmp_path)


KILLED_SAVES = """
import json, os, signal, sys
from pathlib import Path
from rxlm.training import checkpoint as module

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(name, call=1):
    real, calls = getattr(module, name), []
    def killing(*arguments):
        calls.append(1)
        return kill() if len(calls) == call else real(*arguments)
    setattr(module, name, killing)

def replace_number(call):
    real, calls = os.replace, []
    def killing(*arguments):
        calls.append(1)
        return kill() if len(calls) == call else real(*arguments)
    module.os.replace = killing

def write(directory):
    for name in ("model", "config"):
        (directory / name).write_bytes(b"x" * 5000)
        if point == "writing":
            kill()

points = {
    "writing": lambda: None,
    "before_sync": lambda: before("_sync_tree"),
    "before_rename": lambda: replace_number(1),
    "before_marker": lambda: before("_write_marker"),
    "half_marker": lambda: replace_number(2),
    "before_deletion": lambda: replace_number(3),
    "half_deletion": lambda: setattr(module, "_remove", lambda path: path.exists() and kill()),
    "not_killed": lambda: None,
}
report = {}
for point, prepare in points.items():
    run = Path(sys.argv[1], point)
    for step in (1, 2):
        module.save_checkpoint(run, step, None, lambda d: (d / "model").write_bytes(b"old"), 1)
    child = os.fork()
    if child == 0:
        prepare()
        module.save_checkpoint(run, 3, None, write, 1)
        module.remove_surplus(run, 1, 0)
        os._exit(0)
    report[point] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(report))
"""


def test_a_kill_at_any_point_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Catches a save that destroys the previous checkpoint before the new one is complete."""
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = json.loads(result.stdout)
    assert codes.pop("not_killed") == 0
    assert set(codes.values()) == {-9}, codes
    after_marker = {"before_deletion", "half_deletion"}
    for point in codes:
        run = tmp_path / point
        latest = find_latest(run)
        assert latest is not None
        expected = "step-000003" if point in after_marker else "step-000002"
        assert latest.name == expected, point
        for checkpoint in list_checkpoints(run):
            content = b"old" if checkpoint.step < 3 else b"x" * 5000
            assert (checkpoint.path / "model").read_bytes() == content, point
        # The next start cleans up and saves the same step again.
        clean_leftovers(run)
        save(run, 3)
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert all(name.startswith("step-") for name in names), point
        assert steps(run)[-1] == 3
