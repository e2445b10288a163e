"""Where the time of a training step goes, by torch's profiler.

Three runs: a plain one that is timed, one with the profiler (self times, memory, Chrome trace,
table), one with Python stacks. Stacks slow everything down, so nothing is timed there. Self times
are those of the device that computed, and say which: on a CPU there is no CUDA time, and none is
made up.

Written for each mechanism: ``NAME_trace.json`` (Perfetto, chrome://tracing), ``NAME_table.txt``,
``NAME_stacks.txt`` (collapsed stacks) and ``NAME.speedscope.json`` (https://www.speedscope.app).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rxlm.errors import RunError
from rxlm.storage.files import write_bytes
from rxlm.study.bench import training_calls
from rxlm.study.calibration import ModelPlan
from rxlm.study.memory import MIB
from rxlm.study.results import Row
from rxlm.study.settings import StudySettings

STEP = "rxlm.study.step"
"""What the trace calls a step: its self time is what lies between the operators."""
SPEEDSCOPE_SCHEMA = "https://www.speedscope.app/file-format-schema.json"
_STEPS = 3
_TOP = 5
_ROWS = 25


def profile_mechanism(
    settings: StudySettings, plan: ModelPlan, folder: Path, device: torch.device
) -> Row:
    """Profile training steps of a mechanism, write its files and return its row.

    Raises:
        RunError: if the profiler recorded no stacks.
    """
    contender = training_calls(settings, plan, settings.profile_len, device)
    step = contender.calls["step"]
    step()
    plain = _timed(step, device)
    folder.mkdir(parents=True, exist_ok=True)
    name = plan.attention
    profiled, wall = _profiled(step, device)
    profiled.export_chrome_trace(str(folder / f"{name}_trace.json"))
    averages = profiled.key_averages()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=_ROWS)
    write_bytes(folder / f"{name}_table.txt", table.encode("utf-8"))
    stacks = _stacks(step, device, folder / f"{name}_stacks.txt")
    speedscope = speedscope_of(name, stacks)
    write_bytes(folder / f"{name}.speedscope.json", json.dumps(speedscope).encode("utf-8"))
    # Self times only: totals of nested operators would count the same time again and again.
    cpu = {item.key: item.self_cpu_time_total / 1000.0 / _STEPS for item in averages}
    gpu = {item.key: item.self_device_time_total / 1000.0 / _STEPS for item in averages}
    chosen = gpu if device.type == "cuda" else {key: x for key, x in cpu.items() if key != STEP}
    top = sorted(chosen.items(), key=lambda item: -item[1])[:_TOP]
    return {
        **contender.common,
        "attention": name,
        "cuda_time_ms": sum(gpu.values()) if device.type == "cuda" else None,
        "cpu_time_ms": sum(cpu.values()),
        "peak_memory_mb": contender.common["memory_mb"],
        "time_of": "CUDA kernels" if device.type == "cuda" else "CPU operators",
        "wall_ms": plain * 1000.0,
        "profiled_wall_ms": wall * 1000.0 / _STEPS,
        "outside_operators_ms": cpu.get(STEP, 0.0),
        "allocated_mb": sum(max(0, item.self_cpu_memory_usage) for item in averages) / MIB / _STEPS,
        "num_operators": sum(item.count for item in averages if item.key != STEP) // _STEPS,
        "top": ", ".join(f"{key} {value:.2f} ms" for key, value in top),
    }


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def _activities(device: torch.device) -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    return [*activities, ProfilerActivity.CUDA] if device.type == "cuda" else activities


def _profiled(call: Callable[[], Any], device: torch.device) -> tuple[profile, float]:
    """Return the profile of a few steps, and their seconds in all."""
    with profile(activities=_activities(device), profile_memory=True, acc_events=True) as profiled:
        begin = time.perf_counter()
        for _ in range(_STEPS):
            with record_function(STEP):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - begin
    return profiled, wall


def _stacks(call: Callable[[], Any], device: torch.device, path: Path) -> list[tuple[str, int]]:
    """Write collapsed stacks, and return them with their microseconds.

    ``verbose`` is what makes torch keep the frames at all: without it the file is empty
    (pytorch issue 100253).
    """
    config = torch._C._profiler._ExperimentalConfig(verbose=True)
    metric = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"

    def export(finished: profile) -> None:
        finished.export_stacks(str(path), metric)

    with profile(
        activities=_activities(device),
        with_stack=True,
        experimental_config=config,
        on_trace_ready=export,
    ):
        with record_function(STEP):
            call()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    stacks = []
    for line in lines:
        frames, _, weight = line.rpartition(" ")
        if frames and weight.isdigit():
            stacks.append((frames, int(weight)))
    if not stacks:
        raise RunError(f"{path.name}: torch's profiler recorded no stacks.")
    return stacks


def speedscope_of(name: str, stacks: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Return collapsed stacks (outermost frame first, by ``;``) in speedscope's file format."""
    frames: dict[str, int] = {}
    samples, weights = [], []
    for stack, weight in stacks:
        samples.append([frames.setdefault(frame, len(frames)) for frame in stack.split(";")])
        weights.append(weight)
    return {
        "$schema": SPEEDSCOPE_SCHEMA,
        "name": f"training step, {name}",
        "exporter": "rxlm study",
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": [
            {
                "type": "sampled",
                "name": name,
                "unit": "microseconds",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
            }
        ],
    }
