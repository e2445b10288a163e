"""What a run measures of itself: formulas against plain code, and no trace on training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rxlm.errors import RunError
from rxlm.training.checkpoint import find_latest
from rxlm.training.metrics import read_metrics
from rxlm.training.objective import Objective
from rxlm.training.objectives.language_modeling import LMObjective
from rxlm.training.objectives.memory_aware import MemoryAwareObjective
from rxlm.training.objectives.sft import SFTObjective
from rxlm.training.settings import TrainSettings
from rxlm.training.watching import utilization
from rxlm.training.watching.failures import is_out_of_memory, memory_reported
from rxlm.training.watching.samples import read_samples
from rxlm.training.watching.utilization import PEAK_FILE, count_forward, measured_peak

OFF = {"mfu": False, "memory_dialogues": 0, "sample_dialogues": 0}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_latest(folder)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


def test_watching_changes_no_weight(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a measurement that draws from the generators of training, or leaves evaluation mode
    on (the toy has dropout)."""
    for name, watch in (("on", {}), ("off", OFF)):
        toy.train(
            toy.ToyObjective(), tmp_path / name, log_every=1, validate_every=2, watch=watch, steps=5
        )
    on, off = weights_of(tmp_path / "on"), weights_of(tmp_path / "off")
    assert all(torch.equal(on[name], off[name]) for name in off)


def test_operations_are_counted_by_hand(toy: ModuleType) -> None:
    """Catches a wrong factor for the backward pass, and frozen parts that count as trained."""
    objective = toy.ToyObjective(batch_size=4, width=8)
    batch = objective.batch(0, 0)
    device = torch.device("cpu")
    counted = count_forward(objective, batch, 0, device, "fp32")
    first, second = 2 * 4 * 3 * 8, 2 * 4 * 8 * 1
    assert (counted.forward, counted.frozen) == (first + second, 0)
    assert counted.per_token == 3 * (first + second) / 4
    assert objective.model.training
    objective.model[0].requires_grad_(False)
    counted = count_forward(objective, batch, 0, device, "fp32")
    assert counted.frozen == first
    assert counted.per_token == (first + 3 * second) / 4


def test_mfu_is_operations_over_the_measured_peak(toy: ModuleType, tmp_path: Path) -> None:
    """Catches an MFU of other units than its parts."""
    toy.train(toy.ToyObjective(), tmp_path, steps=2, log_every=1)
    peak = json.loads((tmp_path / PEAK_FILE).read_text(encoding="utf-8"))
    line = read_metrics(tmp_path / "metrics.jsonl")[-1]
    expected = line["flops_per_token"] * line["tokens_per_second"] / peak["flops_per_second"]
    assert line["mfu"] == pytest.approx(expected)
    assert "1024 x 1024" in peak["how"]


def test_running_out_of_memory_while_counting_is_said(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and a run that stays "running" for ever, where mfu needs the memory."""
    monkeypatch.setattr(utilization, "count_forward", lambda *_: out_of_memory_on_cuda())
    with pytest.raises(RunError) as caught:
        toy.train(toy.ToyObjective(), tmp_path, steps=4, log_every=2)
    message = str(caught.value)
    assert "measuring mfu after step 2 with 1 micro-batch" in message
    assert "Set train.watch.mfu=false" in message
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_the_peak_is_that_of_the_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches products in fp32 as the peak of a run in bf16, and a wait of a quarter of a minute
    where those are slow."""
    seconds, kinds = [], set()

    def slow(matrix: torch.Tensor) -> float:
        kinds.add(matrix.dtype)
        seconds.append(3.4 * (len(matrix) / 1024) ** 3)
        return seconds[-1]

    monkeypatch.setattr(utilization, "_seconds_of_product", slow)
    peak = measured_peak.__wrapped__(torch.device("cpu"), precision, 1)
    assert kinds == {torch.bfloat16}
    assert sum(seconds) < 3
    assert "bf16, 1 threads" in peak.how
    assert "512 x 512" in peak.how
    assert peak.flops_per_second == pytest.approx(2 * 1024**3 / 3.4)
    seconds.clear()
    monkeypatch.setattr(utilization, "_seconds_of_product", lambda matrix: 1e-4)
    peak = measured_peak.__wrapped__(torch.device("cpu"), "fp32", 1)
    assert "fp32, 1 threads: fastest of 4 products of matrices 1024 x 1024" in peak.how


def test_the_remedy_is_one_of_the_stage() -> None:
    """Catches advice that ends in an error (a stage without checkpointing), settings that a stage
    does not have, and nothing more to do after "layers"."""

    def remedy(stage: type[Objective], checkpointing: str) -> str:
        settings = TrainSettings(steps=1, gradient_checkpointing=checkpointing)
        with pytest.raises(RunError) as caught:
            with memory_reported("step 1", [], settings, stage.memory_saving, None):
                out_of_memory_on_cuda()
        return str(caught.value)

    said = remedy(LMObjective, "none")
    for part in ("objective.batch_size", "objective.seq_len", "train.precision=bf16"):
        assert part in said
    for part in ("gradient_checkpointing", "dialogues", "turns"):
        assert part not in said
    said = remedy(SFTObjective, "none")
    assert "objective.dialogues" in said
    assert "gradient_checkpointing=layers (now none)" in said
    assert "gradient_checkpointing=both (now layers)" in remedy(SFTObjective, "layers")
    said = remedy(MemoryAwareObjective, "both")
    assert "gradient_checkpointing" not in said
    assert "objective.phases" in said


def test_clip_rate_is_the_share_of_clipped_updates(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a rate over log lines, or one that is weighted by targets."""
    toy.train(toy.ToyObjective(), tmp_path / "all", steps=4, log_every=1)
    lines = read_metrics(tmp_path / "all" / "metrics.jsonl")
    norms = sorted(line["grad_norm"] for line in lines)
    limit = (norms[1] + norms[2]) / 2
    # Without movement the norms of the second run are near those of the first.
    settings: dict[str, Any] = {"steps": 4, "log_every": 4, "grad_clip": limit, "lr": 1e-9}
    toy.train(toy.ToyObjective(dropout=0.0), tmp_path / "one", **settings)
    (line,) = read_metrics(tmp_path / "one" / "metrics.jsonl")
    settings["log_every"] = 1
    toy.train(toy.ToyObjective(dropout=0.0), tmp_path / "each", **settings)
    each = read_metrics(tmp_path / "each" / "metrics.jsonl")
    assert line["clip_rate"] == sum(item["grad_norm"] > limit for item in each) / 4
    toy.train(toy.ToyObjective(), tmp_path / "none", steps=1, log_every=1, grad_clip=None)
    assert "clip_rate" not in read_metrics(tmp_path / "none" / "metrics.jsonl")[0]


def out_of_memory_on_a_cpu() -> None:
    torch.empty(1 << 60)


def out_of_memory_on_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("fail", [out_of_memory_on_a_cpu, out_of_memory_on_cuda])
def test_out_of_memory_is_one_message(toy: ModuleType, tmp_path: Path, fail: Any) -> None:
    """Catches a traceback, a message without step, batch or remedy, and a lost checkpoint."""
    objective = toy.ToyObjective(dropout=0.0)
    loss = objective.loss

    def failing(batch: Any, step: int) -> Any:
        if step == 3:
            fail()
        return loss(batch, step)

    objective.loss = failing
    with pytest.raises(RunError) as caught:
        toy.train(objective, tmp_path / "run", save_every=2)
    message = str(caught.value)
    for part in ("step 4", "float32 [4, 3]", "out of memory", "double train.accumulation"):
        assert part in message
    assert f"resume from {tmp_path / 'run' / 'checkpoints' / 'step-000002'}" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    toy.train(toy.ToyObjective(dropout=0.0), tmp_path / "run", save_every=2)
    toy.train(toy.ToyObjective(dropout=0.0), tmp_path / "whole", save_every=2)
    again, whole = weights_of(tmp_path / "run"), weights_of(tmp_path / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_other_errors_are_not_taken_for_memory() -> None:
    """Catches a shape error that is reported as a lack of memory."""
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_skipped_steps_name_the_batch(
    toy: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning from which the bad batch cannot be found."""
    objective = toy.ToyObjective()
    objective.bad_steps = {1}
    with caplog.at_level("WARNING", "rxlm"):
        toy.train(objective, tmp_path, steps=3)
    assert "step 2: skipped, the loss is nan (1 micro-batch" in caplog.text
    assert math.isfinite(read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"])
    assert read_samples(tmp_path) == []
