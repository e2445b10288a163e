"""What is measured in which order, and resuming: points without a line are measured, others not.

Timing comes first and alone, trainings after it, several at a time. Every point is written as it
ends; the tables, figures and pages are made of the lines (:mod:`rxlm.study.report`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rxlm.errors import RunError
from rxlm.evaluation.timing import machine_name
from rxlm.lm.model import mixer_settings
from rxlm.storage.files import json_bytes, read_json, write_bytes
from rxlm.study.bench import (
    Contender,
    decode_calls,
    operator_calls,
    prefill_calls,
    time_group,
    training_calls,
)
from rxlm.study.calibration import (
    ModelPlan,
    costs_of,
    depth_of,
    model_row,
    plan_model,
)
from rxlm.study.corpus import open_corpus
from rxlm.study.gates import check_mechanism
from rxlm.study.manifest import write_manifest
from rxlm.study.mechanisms import check_mechanisms
from rxlm.study.memory import measure_memory
from rxlm.study.profiling import profile_mechanism
from rxlm.study.results import FAILED, OK, TIME_BUDGET, ResultStore, Row, point_key
from rxlm.study.settings import StudySettings
from rxlm.study.training import RUNS, Job, run_jobs, tasks_of
from rxlm.training.device import cpu_threads, resolve_device

logger = logging.getLogger(__name__)

MODELS_FILE = "model_configs.json"
BENCH_VOCABULARY = 256
"""Token ids of the models that are timed: with more, the scores hide the mixers."""
_TIMED = ("efficiency", "prefill", "decode", "op", "scaling")
_WARM_UP_SECONDS = 3.0
Prepare = Callable[[StudySettings, ModelPlan, int, torch.device], Contender]


class Point(NamedTuple):
    """Something to measure: rows that come together."""

    kind: str
    key: str
    label: str
    identity: Row
    """What its rows say if it is not measured."""
    measure: Callable[[], list[Row]]


class Study:
    """One study in one folder."""

    def __init__(self, settings: StudySettings, folder: str | Path) -> None:
        """Check what can be checked before anything runs.

        Raises:
            UserError: for mechanisms, tasks, sizes, data or a device that are not there.
        """
        check_mechanisms(settings)
        self.device = resolve_device(settings.device)
        self.settings = settings.model_copy(update={"device": str(self.device)})
        self.folder = Path(folder)
        for name, training in settings.tasks.items():
            tasks_of(name, training)
        self._plans: dict[Any, ModelPlan] = {}
        for attention in settings.attention:
            self.plan(attention)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = ResultStore(self.folder)

    def plan(self, attention: str, vocab_size: int = BENCH_VOCABULARY, **options: Any) -> ModelPlan:
        """Return the model of a mechanism; see :func:`~rxlm.study.calibration.plan_model`."""
        key = (attention, vocab_size, tuple(sorted(options.items())))
        if key not in self._plans:
            self._plans[key] = plan_model(self.settings, attention, vocab_size, **options)
        return self._plans[key]

    def run(self) -> bool:
        """Measure what is missing; returns whether all validity gates hold.

        Raises:
            UserError: for data that cannot be read, or (strict) a backend that cannot run.
            KeyboardInterrupt: on Ctrl-C; what was measured is on disk.
        """
        begin = time.monotonic()
        settings = self.settings
        write_manifest(self.folder, self.settings, self.device, begin, "running")
        self._write_models()
        deadline = None if settings.time_budget is None else begin + settings.time_budget
        points = list(self._points())
        self._log_estimate(points)
        with cpu_threads(settings.threads):
            for number, point in enumerate(points, start=1):
                if self.store.has(point.key):
                    continue
                if self._is_late(deadline, point.kind, point.key, [point.identity]):
                    continue
                logger.info("%d/%d %s", number, len(points), point.label)
                self.store.add(point.key, point.kind, point.measure())
        if {"pretrain", "tasks"} & set(settings.stages):
            self._train(deadline)
        write_manifest(self.folder, self.settings, self.device, begin, "complete")
        return self.gates_hold()

    def _log_estimate(self, points: list[Point]) -> None:
        """Say what is to be done, and how long timing takes at most; trainings follow later."""
        missing = [point for point in points if not self.store.has(point.key)]
        timed = sum(point.kind in _TIMED for point in missing)
        most = timed * (self.settings.timing.group_seconds + _WARM_UP_SECONDS) / 60
        logger.info(
            "%d of %d points are to be measured; timing takes about %.0f minutes at most",
            len(missing), len(points), most,
        )  # fmt: skip

    def _log_training_estimate(self, jobs: list[Job], processes: int) -> None:
        """Say how long trainings take, by the throughput that was timed."""
        speeds: dict[str, float] = {}
        for row in self.store.rows("efficiency", phase="step", outcome=OK):
            name = row["attention"]
            speeds[name] = max(speeds.get(name, 0.0), row["throughput"])
        if not jobs or any(job.attention not in speeds for job in jobs):
            logger.info("%d trainings", len(jobs))
            return
        seconds = 0.0
        for job in jobs:
            task = self.settings.tasks.get(job.task)
            steps = self.settings.text.steps if task is None else task.steps
            tokens = self.settings.text.batch_tokens if task is None else task.tokens_per_step
            seconds += steps * tokens / speeds[job.attention]
        logger.info(
            "%d trainings, %d at a time: about %.0f minutes, less if tasks are learned early",
            len(jobs), processes, seconds / processes / 60,
        )  # fmt: skip

    def gates_hold(self) -> bool:
        """Return whether no gate of the study's mechanisms failed."""
        rows = [r for r in self.store.rows("gate") if r["attention"] in self.settings.attention]
        return all(row["passed"] for row in rows)

    def _is_late(self, deadline: float | None, kind: str, key: str, rows: list[Row]) -> bool:
        if deadline is None or time.monotonic() < deadline:
            return False
        reason = f"the time budget of {self.settings.time_budget:g} s was used up"
        late = {"outcome": TIME_BUDGET, "reason": reason, "pending": True}
        self.store.add(key, kind, [{**row, **late} for row in rows])
        return True

    # --- what is measured ---------------------------------------------------------------------

    def _points(self) -> Iterator[Point]:
        stages = self.settings.stages
        makers = {
            "gates": self._gate_points,
            "train": lambda: self._timed("efficiency", training_calls, self.settings.seq_lens),
            "prefill": lambda: self._timed("prefill", prefill_calls, self.settings.contexts),
            "decode": lambda: self._timed("decode", decode_calls, self.settings.contexts),
            "op": lambda: self._timed("op", operator_calls, self.settings.op_lens),
            "memory": self._memory_points,
            "scale": self._scale_points,
            "profile": self._profile_points,
        }
        for stage, make in makers.items():
            if stage in stages:
                yield from make()

    def _common(self) -> dict[str, Any]:
        """Return what decides every measurement."""
        names = ("params", "depth", "dim", "head_dim", "window", "conv_size", "equal_convolution",
                 "device", "dtype", "backend", "threads")  # fmt: skip
        return {
            **{name: getattr(self.settings, name) for name in names},
            "torch": torch.__version__,
            "machine": machine_name(self.device.type),
        }

    def _point(
        self,
        kind: str,
        label: str,
        identity: Row,
        decides: dict[str, Any],
        measure: Callable[[], list[Row]],
    ) -> Point:
        key = point_key(kind, {**self._common(), **identity, **decides})
        return Point(kind, key, label, identity, measure)

    def _gate_points(self) -> Iterator[Point]:
        for name in self.settings.attention:
            plan = self.plan(name)

            def measure(plan: ModelPlan = plan) -> list[Row]:
                gates = check_mechanism(self.settings, plan, self.device)
                return [
                    {
                        **gate._asdict(), "passed": gate.passed,
                        "outcome": OK if gate.passed else FAILED, "reason": gate.note,
                    }
                    for gate in gates
                ]  # fmt: skip

            identity = {"attention": name}
            config = plan.config.model_dump(mode="json")
            yield self._point("gate", f"gates of {name}", identity, {"config": config}, measure)

    def _timed(self, kind: str, prepare: Prepare, lengths: tuple[int, ...]) -> Iterator[Point]:
        settings = self.settings
        for length in lengths:
            rows = max(1, settings.batch_tokens // length) if kind == "efficiency" else 1
            tokens = 1 if kind == "decode" else rows * length

            def measure(length: int = length, tokens: int = tokens) -> list[Row]:
                def contender(name: str) -> Callable[[], Contender]:
                    return lambda: prepare(settings, self.plan(name), length, self.device)

                calls = {name: contender(name) for name in settings.attention}
                rows = time_group(settings, calls, self.device, tokens)
                return [{"seq_len": length, **row} for row in rows]

            decides = {
                "attentions": settings.attention,
                "timing": settings.timing.model_dump(),
                "batch_tokens": settings.batch_tokens if kind == "efficiency" else None,
                "plans": [self.plan(name).config.model_dump() for name in settings.attention],
            }
            identity = {"attention": "all", "seq_len": length}
            yield self._point(kind, f"{kind} at {length} tokens", identity, decides, measure)

    def _memory_points(self) -> Iterator[Point]:
        for length in self.settings.memory_lens:
            for name in self.settings.attention:
                mixers = mixer_settings(self.plan(name).config)

                def measure(
                    name: str = name, length: int = length, mixers: Any = mixers
                ) -> list[Row]:
                    return [measure_memory(self.settings, name, mixers, length, self.device)]

                yield self._point(
                    "memory",
                    f"memory of {name} at {length} tokens",
                    {"attention": name, "seq_len": length},
                    {"limit": self.settings.memory_limit_mb, "mixers": str(mixers)},
                    measure,
                )

    def _scale_points(self) -> Iterator[Point]:
        settings = self.settings
        length = min(512, max(settings.seq_lens))
        for params in settings.scale_params:
            depth = depth_of(params)
            sized = settings.model_copy(update={"dim": None})

            def plan(
                name: str, params: int = params, depth: int = depth, sized: StudySettings = sized
            ) -> ModelPlan:
                return plan_model(
                    sized, name, BENCH_VOCABULARY, params=params, depth=depth,
                    tolerance=settings.scale_tolerance,
                )  # fmt: skip

            def measure(
                params: int = params,
                plan: Callable[[str], ModelPlan] = plan,
                sized: StudySettings = sized,
            ) -> list[Row]:
                def contender(name: str) -> Callable[[], Contender]:
                    def make() -> Contender:
                        found = training_calls(sized, plan(name), length, self.device)
                        return found._replace(calls={"step": found.calls["step"]})

                    return make

                calls = {name: contender(name) for name in settings.attention}
                tokens = max(1, settings.batch_tokens // length) * length
                rows = time_group(settings, calls, self.device, tokens)
                return [
                    {"target_params": params, "num_layers": depth_of(params), **row} for row in rows
                ]

            identity = {"attention": "all", "target_params": params}
            decides = {
                "attentions": settings.attention,
                "timing": settings.timing.model_dump(),
                "length": length,
                "batch_tokens": settings.batch_tokens,
            }
            yield self._point(
                "scaling", f"scaling, {params:,} parameters", identity, decides, measure
            )

    def _profile_points(self) -> Iterator[Point]:
        for name in self.settings.attention:
            plan = self.plan(name)

            def measure(plan: ModelPlan = plan) -> list[Row]:
                folder = self.folder / "profiler_results"
                return [profile_mechanism(self.settings, plan, folder, self.device)]

            yield self._point(
                "profile",
                f"profile of {name}",
                {"attention": name, "seq_len": self.settings.profile_len},
                {"config": plan.config.model_dump(), "batch_tokens": self.settings.batch_tokens},
                measure,
            )

    # --- trainings ----------------------------------------------------------------------------

    def _train(self, deadline: float | None) -> None:
        jobs = [job for job in self.jobs() if not self.store.has(job.key)]
        # Small parts of the work at a time, so that a time budget can end it between them.
        processes = self.settings.processes if self.device.type == "cpu" else 1
        self._log_training_estimate(jobs, processes)
        size = max(1, len(jobs)) if deadline is None else processes
        for first in range(0, len(jobs), size):
            part = jobs[first : first + size]
            late = [
                job for job in part if self._is_late(deadline, job.kind, job.key, [_identity(job)])
            ]
            if late:
                continue
            for job, rows in run_jobs(part, processes):
                self.store.add(job.key, job.kind, rows)
                logger.info("trained: %s %s, seed %d", job.attention, job.task, job.seed)

    def jobs(self) -> list[Job]:
        """Return every training of the study, tasks first, the longest ones spread evenly."""
        settings = self.settings
        found = []
        for seed in settings.seeds:
            if "tasks" in settings.stages:
                for task, training in settings.tasks.items():
                    for rate in training.learning_rates:
                        for name in settings.attention:
                            plan = self.plan(name, training.vocab_size)
                            decides = training.model_dump(mode="json", exclude={"learning_rates"})
                            found.append(self._job("task", plan, seed, rate, task, decides))
            if "pretrain" in settings.stages:
                text = settings.text
                corpus = open_corpus(text)
                for name in settings.attention:
                    plan = self.plan(name, corpus.vocab_size)
                    decides = {**text.model_dump(mode="json"), "sha256": corpus.sha256}
                    found.append(self._job("ppl", plan, seed, text.learning_rate, "", decides))
        return found

    def _job(
        self, kind: str, plan: ModelPlan, seed: int, rate: float, task: str, decides: Any
    ) -> Job:
        config = plan.config.model_dump(mode="json")
        values = [self._common() | {"threads": None}, config, seed, rate, task, decides]
        key = point_key(kind, values)
        name = "-".join(
            part for part in ("pretrain" if kind == "ppl" else task, plan.attention, f"seed{seed}")
        )
        return Job(
            kind, self.settings.model_dump(mode="json"), plan.attention, config, plan.target, seed,
            rate, task, key, str(self.folder / RUNS / f"{name}-{key[:8]}"),
        )  # fmt: skip

    # --- files --------------------------------------------------------------------------------

    def _write_models(self) -> None:
        tokens = max(self.settings.seq_lens)
        path = self.folder / MODELS_FILE
        plans = [self.plan(name) for name in self.settings.attention]
        known = read_json(path).get("key") if path.is_file() else None
        key = point_key("models", [self._common(), tokens, [plan._asdict() for plan in plans]])
        if known == key:
            return
        rows = [model_row(plan, costs_of(self.settings, plan, tokens), tokens) for plan in plans]
        values = {"key": key, "models": {row["attention"]: row for row in rows}}
        write_bytes(path, json_bytes(values))


def _identity(job: Job) -> Row:
    return {"attention": job.attention, "seed": job.seed, "learning_rate": job.learning_rate,
            "task": job.task or None}  # fmt: skip


def require_gates(holds: bool) -> None:
    """Raise ``RunError`` if a validity gate failed."""
    if not holds:
        raise RunError("a validity gate failed: see the report; its mechanism is not comparable.")
