"""Stages that a pipeline trains in several processes: same weights, clear ends, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rxlm.errors import RunError, UserError
from rxlm.training import processes
from rxlm.training.checkpoint import find_latest
from rxlm.training.pipeline import plan_pipeline, run_pipeline
from rxlm.training.processes import check_processes, command_of, run_stage_in_processes
from rxlm.training.recipes import read_recipe
from rxlm.training.run_folder import read_status

pytestmark = pytest.mark.xdist_group("two processes")


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the final weights of the model stage."""
    folder = find_latest(out / "2_joint")
    assert folder is not None
    return load_file(folder / "model.safetensors")


def needs_two_cores() -> None:
    """Skip where two processes are refused."""
    try:
        check_processes(2)
    except UserError:
        pytest.skip("needs two CPU cores")


def test_two_processes_give_the_weights_of_one(recipes: Path, tmp_path: Path) -> None:
    """Catches overrides, a run folder or a share of the batch that get lost on the way."""
    needs_two_cores()
    words = ["joint_lm.train.steps=4"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_pipeline(plan_pipeline(recipes, alone, words, stop_after="joint_lm"))
    planned = plan_pipeline(recipes, shared, words, stop_after="joint_lm")
    result = run_pipeline(planned, processes=2)
    assert [item.status for item in result.stages] == ["complete", "complete"]
    status = read_status(shared / "2_joint")
    assert status is not None
    assert status.step == 4
    expected = weights(alone)
    for name, value in weights(shared).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_failing_process_ends_the_pipeline(
    recipes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches a stage that counts as trained though its processes died, and a lost message."""
    needs_two_cores()
    out = tmp_path / "out"
    run_pipeline(plan_pipeline(recipes, out, stop_after="tokenizer"))
    stage = read_recipe(recipes / "2_joint.yaml", ["objective.dialogues=1"])
    with pytest.raises(RunError, match="2_joint: a process of 2 ended with status"):
        run_stage_in_processes(stage, out / "2_joint", 2)
    assert "dialogues" in capfd.readouterr().err


def test_a_signal_is_handed_on(recipes: Path, tmp_path: Path) -> None:
    """Catches processes that run on, or are killed unsaved, when the pipeline is stopped."""
    needs_two_cores()
    out = tmp_path / "out"
    run_pipeline(plan_pipeline(recipes, out, stop_after="tokenizer"))
    stage = read_recipe(recipes / "2_joint.yaml", ["train.steps=1000000", "train.log_every=1"])
    folder = out / "2_joint"
    metrics = folder / "metrics.jsonl"

    def stop() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    watcher.start()
    before = signal.getsignal(signal.SIGTERM)
    result = run_stage_in_processes(stage, folder, 2)
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (result.status, result.signal) == ("interrupted", signal.SIGTERM)
    assert find_latest(folder) is not None, "saved before it ended"


def test_a_second_ctrl_c_leaves_nobody_behind(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches processes that train on, watched by nobody, after two signals at once."""
    stage = read_recipe(recipes / "2_joint.yaml")
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(processes, "command_of", lambda *_: sleep)
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(launcher: subprocess.Popen[bytes]) -> None:
        started.append(launcher)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes, "_status_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage_in_processes(stage, tmp_path / "out", 2)
    assert started[0].wait(timeout=20) == -signal.SIGTERM


@pytest.mark.parametrize("count", [0, 100_000])
def test_a_senseless_number_is_refused(count: int, recipes: Path, tmp_path: Path) -> None:
    """Catches a number that is accepted and then starves or hangs; nothing may be written."""
    with pytest.raises(UserError, match=f"processes={count}: expected 1 to"):
        check_processes(count)
    with pytest.raises(UserError, match="processes="):
        run_pipeline(plan_pipeline(recipes, tmp_path / "out"), processes=count)
    assert not (tmp_path / "out").exists()


def test_the_command_is_the_documented_one(recipes: Path) -> None:
    """Catches overrides that do not reach the processes."""
    stage = read_recipe(recipes / "2_joint.yaml", ["train.steps=7"])
    words = command_of(stage, Path("runs/x"), 3)
    assert words[words.index("--nproc-per-node") + 1] == "3"
    assert words[words.index("train") :] == [
        "train", str(recipes / "2_joint.yaml"), "train.steps=7", "--out", "runs/x",
    ]  # fmt: skip
