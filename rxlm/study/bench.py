"""Time of training steps, prefills, decoding steps and operators, all mechanisms side by side.

Mechanisms of one length are timed in interleaved rounds (:mod:`rxlm.evaluation.timing`) until the
quartiles of each are close, so that a ratio is one of neighbours in time. A call that cannot run is
a row that says why.

    train      one update: forward, backward, clipping, AdamW; and its parts
    prefill    reading a prompt without gradients, to the scores of the first token
    decode     one more token after a context, its cache given
    op         the mixer alone

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.evaluation.timing import Call, interleave, load_average
from rxlm.lm.model import mixer_settings
from rxlm.nn.mixers import build_mixer
from rxlm.study.calibration import ModelPlan, build
from rxlm.study.fits import median_interval, ratio_interval
from rxlm.study.mechanisms import Backend, backend_of, set_backend
from rxlm.study.memory import DTYPES, MIB, is_out_of_memory, peak_of
from rxlm.study.network import StudyNetwork
from rxlm.study.results import FAILED, OK, OOM, TIME_BUDGET, Row
from rxlm.study.settings import StudySettings

Key = tuple[str, str]
"""Mechanism, and the part that is timed."""
GRAD_CLIP = 1.0


class Contender(NamedTuple):
    """What one mechanism is timed with: calls by part, and what their rows have in common."""

    calls: dict[str, Call]
    common: Row


Prepare = Callable[[], Contender]


def time_group(
    settings: StudySettings, prepared: Mapping[str, Prepare], device: torch.device, tokens: int
) -> list[Row]:
    """Time all mechanisms of one length and return a row for each and each part.

    Args:
        settings: of the study.
        prepared: builds the calls of a mechanism; run once, in turn.
        device: where.
        tokens: that one call deals with, for the throughput.
    """
    rows: list[Row] = []
    calls: dict[Key, Call] = {}
    common: dict[str, Row] = {}
    limits = settings.timing
    load = load_average()
    for name, prepare in prepared.items():
        try:
            contender = prepare()
            first = {part: _first(call, device) for part, call in contender.calls.items()}
        except (MemoryError, RuntimeError, UserError) as error:
            if isinstance(error, UserError) and settings.strict_backend:
                raise
            outcome = OOM if is_out_of_memory(error) else FAILED
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.append({"attention": name, "phase": "all", "outcome": outcome, "reason": reason})
            continue
        common[name] = contender.common
        for part, call in contender.calls.items():
            if first[part] > limits.call_seconds:
                reason = f"took {first[part]:.1f} s at once, so it was not repeated"
                rows.append(
                    {
                        **contender.common, "attention": name, "phase": part,
                        "outcome": TIME_BUDGET, "reason": reason,
                        **_figures([first[part]], tokens),
                    }
                )  # fmt: skip
            else:
                calls[name, part] = call
    if calls:
        samples = interleave(
            [calls],
            rounds=limits.rounds,
            fewest_rounds=min(limits.fewest_rounds, limits.rounds),
            budget=limits.group_seconds,
            target_spread=limits.target_spread,
            synchronize=_waiter(device),
        )
        for (name, part), values in samples.items():
            row = {**common[name], "attention": name, "phase": part, **_figures(values, tokens)}
            base = samples.get((settings.baseline, part))
            if base is not None and name != settings.baseline:
                row |= dict(
                    zip(("ratio", "ratio_low", "ratio_high"), ratio_interval(values, base),
                        strict=True)
                )  # fmt: skip
            rows.append(row)
    loads = {"load_before": round(load, 2), "load_after": round(load_average(), 2)}
    threads = {"threads": torch.get_num_threads(), "num_cpus": os.cpu_count()}
    return [{**row, **loads, **threads} for row in rows]


def training_calls(
    settings: StudySettings, plan: ModelPlan, length: int, device: torch.device
) -> Contender:
    """Return an update of a model on rows of ``length`` tokens, and its parts."""
    batch = max(1, settings.batch_tokens // length)
    network, common = _network(settings, plan, device, needs_gradient=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    ids = _ids(plan, batch, length + 1, device)

    def loss() -> Tensor:
        hidden, _ = network(ids[:, :-1])
        return network.cross_entropy(hidden.flatten(0, 1), ids[:, 1:].flatten())[0]

    @torch.no_grad()
    def forward() -> None:
        loss()

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()

    def update() -> None:
        forward_backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP)
        optimizer.step()

    update()  # makes the optimizer's state, which is no part of a step
    peak = peak_of(update, iter(_held(network, optimizer, ids)), device)
    common |= {
        "seq_len": length,
        "batch_size": batch,
        "memory_mb": peak / MIB,
        "memory_source": "torch.cuda" if device.type == "cuda" else "counted tensors",
    }
    calls: dict[str, Call] = {
        "step": update,
        "forward": forward,
        "forward+backward": forward_backward,
        "optimizer": optimizer.step,
    }
    return Contender(calls, common)


def prefill_calls(
    settings: StudySettings, plan: ModelPlan, length: int, device: torch.device
) -> Contender:
    """Return reading a prompt of ``length`` tokens, up to the choice of the first token."""
    network, common = _network(settings, plan, device)
    ids = _ids(plan, 1, length, device)

    @torch.no_grad()
    def prefill() -> Tensor:
        hidden, _ = network(ids)
        return network.logits(hidden[:, -1]).argmax(dim=-1)

    return Contender({"prefill": prefill}, {**common, "seq_len": length, "batch_size": 1})


def decode_calls(
    settings: StudySettings, plan: ModelPlan, context: int, device: torch.device
) -> Contender:
    """Return one token after a context; the cache is a value, so every call continues the same."""
    network, common = _network(settings, plan, device, form="step")
    with torch.no_grad():
        _, cache = network(_ids(plan, 1, context, device))
    token = _ids(plan, 1, 1, device)

    @torch.no_grad()
    def decode() -> Tensor:
        hidden, _ = network(token, cache=cache)
        return network.logits(hidden[:, -1]).argmax(dim=-1)

    common |= {"seq_len": context, "batch_size": 1, "state_bytes": cache.num_bytes}
    return Contender({"decode": decode}, common)


def operator_calls(
    settings: StudySettings, plan: ModelPlan, length: int, device: torch.device
) -> Contender:
    """Return a forward pass of the mixer alone, and one with all gradients."""
    dtype = DTYPES[settings.dtype]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_mixer(plan.attention, mixer_settings(plan.config))
        x = torch.randn(1, length, plan.config.dim)
    set_backend(mixer, settings.backend, settings.strict_backend)
    mixer, x = mixer.to(device, dtype), x.to(device, dtype).requires_grad_()
    parameters = [x, *mixer.parameters()]

    @torch.no_grad()
    def forward() -> None:
        mixer(x)

    def forward_backward() -> None:
        output = mixer(x)[0]
        torch.autograd.grad(output, parameters, torch.ones_like(output), allow_unused=True)

    backend = backend_of(
        mixer, settings.backend, device, dtype, needs_gradient=True,
        strict=settings.strict_backend,
    )  # fmt: skip
    common = {**_about(settings, plan, device, backend), "seq_len": length, "batch_size": 1}
    return Contender({"forward": forward, "forward+backward": forward_backward}, common)


def _network(
    settings: StudySettings,
    plan: ModelPlan,
    device: torch.device,
    *,
    form: str = "",
    needs_gradient: bool = False,
) -> tuple[StudyNetwork, Row]:
    dtype = DTYPES[settings.dtype]
    network = build(settings, plan).to(device, dtype)
    backend = backend_of(
        network, settings.backend, device, dtype, form=form, needs_gradient=needs_gradient,
        strict=settings.strict_backend,
    )  # fmt: skip
    return network, _about(settings, plan, device, backend)


def _about(settings: StudySettings, plan: ModelPlan, device: torch.device, backend: Backend) -> Row:
    return {
        "hidden_size": plan.config.dim,
        "num_params": plan.total,
        "non_embedding": plan.non_embedding,
        "device": device.type,
        "dtype": settings.dtype,
        **backend._asdict(),
    }


def _ids(plan: ModelPlan, rows: int, tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (rows, tokens)
    return torch.randint(plan.config.vocab_size, size, generator=generator).to(device)


def _held(network: StudyNetwork, optimizer: torch.optim.Optimizer, ids: Tensor) -> list[Tensor]:
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    gradients = [item.grad for item in network.parameters() if item.grad is not None]
    return [*network.parameters(), *states, *gradients, ids]


def _figures(seconds: Sequence[float], tokens: int) -> Row:
    """Return the columns of one timing; ``tokens`` are those of a call."""
    milliseconds = 1000.0 * np.asarray(seconds)
    median = median_interval(list(milliseconds))
    p20, p25, p75, p80 = (float(x) for x in np.percentile(milliseconds, (20, 25, 75, 80)))
    spread = (p75 - p25) / median.value
    return {
        "step_time_ms": median.value,
        "step_std_ms": float(milliseconds.std(ddof=1)) if len(seconds) > 1 else 0.0,
        "throughput": 1000.0 * tokens / median.value,
        "n": len(seconds),
        "ci_low_ms": median.low,
        "ci_high_ms": median.high,
        "p20_ms": p20,
        "p80_ms": p80,
        "iqr_share": spread,
        "samples": [float(value) for value in milliseconds],
    }


def _first(call: Call, device: torch.device) -> float:
    import time

    wait = _waiter(device)
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def _waiter(device: torch.device) -> Call:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def ok_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that hold a time."""
    return [row for row in rows if row["outcome"] == OK and row.get("step_time_ms")]


def samples_by_length(rows: Sequence[Row], attention: str, **wanted: Any) -> dict[int, list[float]]:
    """Return the samples of a mechanism by length, of the rows with the wanted values."""
    items = {"attention": attention, **wanted}.items()
    return {row["seq_len"]: row["samples"] for row in ok_rows(rows) if items <= row.items()}
