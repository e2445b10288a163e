"""Two processes train what one trains: every stage, every type of attention, every strategy.

The processes are real (``torchrun``, gloo), as is DeepSpeed. Each launch takes seconds, so a test
compares many runs. Not here: how a batch is cut (test_training_sharding).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rxlm.training.checkpoint import find_latest
from rxlm.training.metrics import TIMING_FIELDS, read_metrics

ROOT = Path(__file__).resolve().parents[3]
CASES = Path(__file__).with_name("cases.py")
# One after the other: each test has two processes, and there may be two cores.
pytestmark = pytest.mark.xdist_group("two processes")
NOT_LINEAR = {"perplexity", "write_size"}
"""Metrics whose mean over parts is not that of the whole."""


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    """The module ``cases.py`` beside this file (tests are no package)."""
    spec = importlib.util.spec_from_file_location("distributed_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run something in two processes; ``--standalone`` takes a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    variables = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200",
        **environment,
    }  # fmt: skip
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        variables.pop(name, None)
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def checkpoint(folder: Path) -> Path:
    latest = find_latest(folder)
    assert latest is not None, f"{folder} has no checkpoint"
    return latest


def differences(one: Path, two: Path, skip: set[str] = NOT_LINEAR) -> list[str]:
    """Compare the last weights, the optimizer state and all metrics of two run folders."""
    found = []
    for file in ("model.safetensors", "train/optimizer.safetensors"):
        left, right = load_file(checkpoint(one) / file), load_file(checkpoint(two) / file)
        assert left.keys() == right.keys()
        for name in left:
            if not torch.allclose(left[name], right[name], rtol=1e-4, atol=3e-6):
                largest = (left[name] - right[name]).abs().max()
                found.append(f"{two.name} {file} {name}: differs by {largest:.2g}")
    lines, others = (
        {(line["kind"], line["step"]): line for line in read_metrics(folder / "metrics.jsonl")}
        for folder in (one, two)
    )
    for place, left_line in lines.items():
        right_line = others[place]
        assert left_line.keys() == right_line.keys()
        for name in left_line.keys() - skip - {"kind", *TIMING_FIELDS}:
            if left_line[name] != pytest.approx(right_line[name], rel=1e-4):
                found.append(f"{two.name} {name}: {left_line[name]} and {right_line[name]}")
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs of one process are; several tests compare with the same ones."""
    return tmp_path_factory.mktemp("alone")


def compare_all(
    cases: ModuleType, folder: Path, alone: Path, wanted: list[Any], tokens: Any
) -> None:
    """Run each case in one process, too."""
    found = []
    for case in wanted:
        key = case._replace(strategy="alone")
        if not (alone / key.name).exists():
            cases.run_case(key, alone, tokens)
        found += differences(alone / key.name, folder / case.name)
    assert not found, "\n".join(found)


def test_ddp_trains_what_one_process_trains(cases: ModuleType, tmp_path: Path, alone: Path) -> None:
    """Catches a gradient that is a mean of means although processes have unequal numbers of
    targets, noise or masks that depend on the process, windows reduced once a turn, a parameter
    that only some steps use, clipping and metrics of one process alone, and a parent's random
    state that leaks into the batch."""
    result = launch(str(CASES), str(tmp_path), RXLM_CASES="-ddp-")
    assert result.returncode == 0, result.stderr[-3000:]
    wanted = [case for case in cases.SHARED if case.strategy == "ddp"]
    compare_all(cases, tmp_path, alone, wanted, cases.tokenizer())
    newest = checkpoint(tmp_path / wanted[0].name)
    assert (newest / "train" / "rng-1.json").exists(), "random state of process 1 is not saved"


@pytest.mark.deepspeed
def test_deepspeed_trains_what_one_process_trains(
    cases: ModuleType, tmp_path: Path, alone: Path
) -> None:
    """As for DDP, of ZeRO 1, 2, 3 and with offloading: clipping after the wrong scale, weights that
    are not whole when they are saved, moments that a resumed run loses, and a checkpoint that only
    the strategy that wrote it can read."""
    tokens = cases.tokenizer()
    for case in cases.RESUMED:
        cases.run_case(case, tmp_path, tokens, steps=2)
    result = launch(str(CASES), str(tmp_path), RXLM_CASES="-zero")
    assert result.returncode == 0, result.stderr[-3000:]
    wanted = [case for case in (*cases.SHARED, *cases.RESUMED) if "zero" in case.strategy]
    compare_all(cases, tmp_path, alone, wanted, tokens)
    # And back: one process goes on where ZeRO 3 stopped after its second step.
    cut_up = next(item for item in wanted if item[:3] == ("memory_aware", "softmax", "zero3"))
    cases.run_case(cut_up, tmp_path, tokens, steps=4)
    whole = cases.RESUMED[0]._replace(strategy="alone").name
    found = differences(alone / whole, tmp_path / cut_up.name, {"loss", *NOT_LINEAR})
    assert not [line for line in found if "safetensors" in line], "\n".join(found)


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    """Catches processes that wait for ever for one that has failed, and a message that is lost
    among those of the others."""
    begin = time.perf_counter()
    result = launch(str(CASES), str(tmp_path), RXLM_CASES="failing")
    assert result.returncode != 0
    assert time.perf_counter() - begin < 120
    assert "this dialogue is damaged" in result.stderr


def test_two_processes_stop_and_go_on_together(cases: ModuleType, tmp_path: Path) -> None:
    """Catches a process that stops alone (the others wait for ever) or at another step, a run that
    cannot go on with more or fewer processes or sees other data then, and bfloat16 weights whose
    gradients are not exchanged."""
    tokens, alone = cases.tokenizer(), tmp_path / "alone"
    cases.run_case(cases.GROWN, tmp_path, tokens, steps=2)
    result = launch(str(CASES), str(tmp_path), RXLM_CASES="faults")
    assert result.returncode == 0, result.stderr[-3000:]

    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    stopped = [case for case in cases.STOPPED if case.strategy == "ddp" or has_deepspeed]
    expected = ["interrupted", 2, signal.SIGTERM, "complete", 4]
    for case in stopped:
        for rank in range(2):
            assert json.loads((tmp_path / f"{case.name}.{rank}.json").read_text()) == expected
    cases.run_case(cases.SHRUNK, tmp_path, tokens, steps=4)
    found = []
    for case in (*stopped, cases.GROWN, cases.SHRUNK):
        whole = case._replace(strategy="alone")
        if not (alone / whole.name).exists():
            cases.run_case(whole, alone, tokens, steps=4)
        found += differences(alone / whole.name, tmp_path / case.name, {"loss", *NOT_LINEAR})
    assert not [line for line in found if "safetensors" in line], "\n".join(found)

    cases.run_case(cases.PURE, alone, tokens, precision="bf16_pure", accumulation=2)
    begin = cases.objective_of(cases.PURE, tokens).model.state_dict()
    one, two = (
        load_file(checkpoint(root / cases.PURE.name) / "model.safetensors")
        for root in (alone, tmp_path)
    )
    moved = sum(float((one[name] - begin[name]).square().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    # Gradients of other batch sizes are rounded otherwise; unshared ones would be far apart.
    assert apart < 0.1**2 * moved, (apart, moved)


def test_the_command_line_trains_in_two_processes(cases: ModuleType, tmp_path: Path) -> None:
    """Catches a result that every process prints, a folder that two processes write, and a recipe
    that works in one process only."""
    cases.tokenizer().save(tmp_path / "tokenizer")
    shutil.copy(ROOT / "stages/nano/_base.yaml", tmp_path)
    recipe = {
        "extends": "_base.yaml",
        "stage": "joint_lm",
        "init_from": None,
        "tokenizer_from": str(tmp_path / "tokenizer"),
        "train": {"steps": 2, "validate_every": 2, "log_every": 1},
        "objective": {"dialogues": 2, "turns": 2, "validation_dialogues": 2},
    }
    (tmp_path / "lm.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["train", str(tmp_path / "lm.yaml"), "model.decoder.embed_dim=16"]
    result = launch("-m", "rxlm", *arguments, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("complete") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert checkpoint(tmp_path / "run").name == "step-000002"
