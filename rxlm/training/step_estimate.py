"""What a step takes, found out by making a few small ones: peak memory and seconds.

A micro-batch is cut (an eighth and a quarter of it), each part is computed forward and backward,
and what grows with the tokens is drawn out to the whole (:func:`_extrapolated`); if that would be
quick and fit easily, the whole is made, too, and the figures are measured ones. Then

    peak = weights and buffers + optimizer state + max(forward and backward pass, optimizer step)

where float32 masters of bfloat16 weights belong to the optimizer state, and both terms of the
maximum hold the gradients. What Python, libraries and the data take comes on top. Nothing is
written; weights change, so the objective is one that is thrown away.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.training.device import cpu_threads, move_to_device
from rxlm.training.distributed.strategy import Strategy, put_on_device
from rxlm.training.held_bytes import peak_of
from rxlm.training.objective import Objective
from rxlm.training.rng import isolated_random_state
from rxlm.training.settings import TrainSettings

WHOLE_BUDGET = 5.0
"""Seconds that a whole micro-batch may take to be tried."""
_CUTS = (8, 4)
_REPETITIONS = 2
_MEMORY_FILE = Path("/proc/meminfo")


class StepEstimate(NamedTuple):
    """What one update takes."""

    peak_bytes: int
    """At the highest point: weights, gradients, optimizer state, activations."""
    seconds: float
    """Of one update, batches included."""
    share: float
    """Of a micro-batch that was really computed; 1 = the figures are measured."""


class RunEstimate(NamedTuple):
    """What all updates take; a curriculum's phases are taken to last as long as they may."""

    peak_bytes: int
    """Of the phase that takes most."""
    seconds: float
    """Of all updates; validations and checkpoints come on top."""
    share: float
    """Of a micro-batch that was really computed, in the phase of the smallest share."""


class Pass(NamedTuple):
    """One forward and backward pass: tokens, bytes at the highest point, seconds."""

    num_tokens: int
    peak_bytes: int
    seconds: float


def estimate_step(
    objective: Objective,
    settings: TrainSettings,
    device: torch.device,
    *,
    whole_budget: float = WHOLE_BUDGET,
) -> StepEstimate:
    """Return what an update takes in the objective's present phase.

    Args:
        objective: with real weights; they change.
        settings: how it is to be trained.
        device: where.
        whole_budget: seconds that a whole micro-batch may take to be tried.
    """
    optimizer, masters = put_on_device(objective, settings, device)
    strategy = Strategy(objective, optimizer, settings, device, masters=masters)
    objective.set_training_mode()
    begin = time.perf_counter()
    batch = objective.batch(0, 0)
    building = time.perf_counter() - begin
    passes = _Passes(strategy, settings, device)
    with isolated_random_state(0):
        parts = _parts(objective, batch)
        passes.run(parts[0])
        strategy.step()
        measured = [passes.measure(part) for part in parts]
        whole = _extrapolated(measured, _count_tokens(objective, parts, batch, measured))
        if len(parts) == 1:
            whole, share = measured[0], 1.0
        elif whole.seconds <= whole_budget and fits(whole.peak_bytes, device):
            whole, share = passes.measure(batch), 1.0
        else:
            share = measured[-1].num_tokens / whole.num_tokens
        step = _measured_step(strategy, device)
    module = objective.trained_modules()
    static = _num_bytes(
        [
            *module.parameters(),
            *module.buffers(),
            *(part for values in optimizer.state.values() for part in values.values()),
            *([] if masters is None else masters.kept_on(device.type)),
        ]
    )
    gradients = _num_bytes(strategy.gradients().values())
    strategy.begin_update([])
    computing = whole.seconds * settings.accumulation + step.seconds
    waiting = building * settings.accumulation
    return StepEstimate(
        peak_bytes=static + max(whole.peak_bytes, gradients + step.peak_bytes),
        seconds=max(computing, waiting) if settings.prefetch else computing + waiting,
        share=share,
    )


def estimate_run(
    objective: Objective, settings: TrainSettings, device: torch.device
) -> RunEstimate:
    """Return what a run takes; arguments are those of :func:`estimate_step`."""
    with cpu_threads(settings.threads):
        found = [
            (steps, estimate_step(objective, settings, device))
            for steps in objective.each_phase(settings.steps)
        ]
    return RunEstimate(
        peak_bytes=max(item.peak_bytes for _, item in found),
        seconds=sum(steps * item.seconds for steps, item in found),
        share=min(item.share for _, item in found),
    )


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether so many bytes can be tried on a device: at most half of what is free."""
    room = _available_bytes(device)
    return room is not None and num_bytes < room / 2


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(item.numel() * item.element_size() for item in tensors)


class _Passes:
    """Runs forward and backward passes."""

    def __init__(self, strategy: Strategy, settings: TrainSettings, device: torch.device) -> None:
        self._strategy, self._settings, self._device = strategy, settings, device

    def run(self, batch: Any) -> int:
        """Make one pass; return its tokens."""
        moved = move_to_device(batch, self._device)
        return self._strategy.compute(moved, 0, is_last=True).num_tokens

    def measure(self, batch: Any) -> Pass:
        """Measure a pass as the trainer makes it: with gradients there from the pass before if
        micro-batches are accumulated, without otherwise."""
        seconds = []
        for _ in range(_REPETITIONS):
            self._strategy.begin_update([])
            begin = time.perf_counter()
            num_tokens = self.run(batch)
            _synchronize(self._device)
            seconds.append(time.perf_counter() - begin)
        self._strategy.begin_update([])
        count = min(2, self._settings.accumulation)

        def passes() -> None:
            for _ in range(count):
                self.run(batch)

        return Pass(num_tokens, peak_of(passes, self._device), statistics.median(seconds))


def _parts(objective: Objective, batch: Any) -> list[Any]:
    """Return parts of growing size; the batch itself if it cannot be cut."""
    parts = []
    for cut in _CUTS:
        # A batch too small to be cut, or a stage that cannot: it is then run as it is.
        with contextlib.suppress(UserError):
            parts.append(objective.shard(batch, 0, cut))
    return parts if len(parts) == len(_CUTS) else [batch]


def _count_tokens(objective: Objective, parts: list[Any], batch: Any, measured: list[Pass]) -> int:
    """Return the tokens of the whole: those of the last part, as targets grow."""
    if len(parts) == 1:
        return measured[0].num_tokens
    own = getattr(batch, "num_tokens", None)
    if isinstance(own, int):
        return own
    targets = objective.count_targets(batch) / max(1, objective.count_targets(parts[-1]))
    return round(measured[-1].num_tokens * targets)


def _extrapolated(measured: list[Pass], num_tokens: int) -> Pass:
    """Draw bytes and seconds of two passes out to ``num_tokens``.

    Which moment of a pass holds most may change with its size, so that bytes are convex in the
    tokens: at least what a straight line gives, at most in proportion. The middle of both is taken.
    """
    if len(measured) == 1:
        return measured[0]
    small, large = measured
    span = large.num_tokens - small.num_tokens
    growth = num_tokens / max(1, large.num_tokens)

    def line(low: float, high: float) -> float:
        if span <= 0:
            return high * growth
        return high + max(0.0, high - low) * (num_tokens - large.num_tokens) / span

    most = large.peak_bytes * growth
    return Pass(
        num_tokens,
        math.ceil((line(small.peak_bytes, large.peak_bytes) + most) / 2),
        line(small.seconds, large.seconds),
    )


def _measured_step(strategy: Strategy, device: torch.device) -> Pass:
    begin = time.perf_counter()
    strategy.step()
    _synchronize(device)
    seconds = time.perf_counter() - begin
    return Pass(0, peak_of(strategy.step, device), seconds)


def _available_bytes(device: torch.device) -> int | None:
    """Return how much memory is free; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not _MEMORY_FILE.is_file():
        return None
    for line in _MEMORY_FILE.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
