"""Training the models of a study with the one Trainer, each in a run folder of its own.

A run that was killed goes on from its checkpoint, one that is finished is only read. Trainings run
several at a time, one CPU thread each (one at a time on a GPU); what they return does not depend on
how many.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rxlm.data.synthetic_tasks import ALIASES, TASKS, SequenceTask, build_task
from rxlm.errors import RunError, UserError
from rxlm.evaluation.statistics import wilson_interval
from rxlm.lm.config import LMConfig
from rxlm.lm.model import mixer_settings
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.study.calibration import ModelPlan, build
from rxlm.study.corpus import Corpus, open_corpus
from rxlm.study.mechanisms import backend_of, check_mechanisms
from rxlm.study.memory import DTYPES, is_out_of_memory
from rxlm.study.objectives import (
    TEST_SEED,
    TaskObjective,
    TextObjective,
    predictor,
    row_losses,
    score_task,
    text_metrics,
)
from rxlm.study.results import FAILED, OOM, Row
from rxlm.study.settings import StudySettings, TaskTraining
from rxlm.training.checkpoint import find_latest
from rxlm.training.device import cpu_threads, resolve_device
from rxlm.training.metrics import read_metrics
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer, TrainResult
from rxlm.training.watch import WatchSettings

logger = logging.getLogger(__name__)

RUNS = "training"
"""Folder of the run folders."""


class Job(NamedTuple):
    """One training; plain values, so that another process can receive it."""

    kind: str
    """``task`` or ``ppl``."""
    settings: dict[str, Any]
    attention: str
    config: dict[str, Any]
    target: int
    seed: int
    learning_rate: float
    task: str
    key: str
    folder: str


def tasks_of(name: str, training: TaskTraining) -> list[SequenceTask]:
    """Return the sizes of a task, the easy ones first.

    Raises:
        UserError: for a task that does not exist, or a vocabulary that is too small for it.
    """
    known = ALIASES.get(name, name)
    if known not in TASKS:
        raise UserError(f"task {name!r} does not exist: use one of {', '.join(TASKS)}.")
    sizes = training.sizes or TASKS[known].sizes
    return [build_task(known, size, training.vocab_size) for size in sorted(sizes)]


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, list[Row]]]:
    """Train, and yield each job with its rows as it ends."""
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, run_job(job)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(jobs))) as pool:
        yield from pool.imap_unordered(_numbered, jobs)


def _numbered(job: Job) -> tuple[Job, list[Row]]:
    return job, run_job(job)


def run_job(job: Job) -> list[Row]:
    """Train and test one model; what failed is a row as well."""
    settings = StudySettings(**job.settings)
    check_mechanisms(settings)
    plan = ModelPlan(job.attention, LMConfig(**job.config), 0, 0, 0, job.target)
    train = _train_task if job.kind == "task" else _train_text
    common: Row = {
        "attention": job.attention, "seed": job.seed, "learning_rate": job.learning_rate,
        "device": settings.device, "dtype": settings.dtype,
    }  # fmt: skip
    if job.kind == "task":
        common["task"] = job.task
    try:
        with cpu_threads(1 if settings.device == "cpu" else None):
            return [{**common, **row} for row in train(settings, plan, job)]
    except (MemoryError, RuntimeError, RunError) as error:
        outcome = OOM if is_out_of_memory(error) else FAILED
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        logger.warning("%s, %s: %s", job.attention, job.kind, reason)
        return [{**common, "outcome": outcome, "reason": reason}]


def _train_task(settings: StudySettings, plan: ModelPlan, job: Job) -> list[Row]:
    training = settings.tasks[job.task]
    tasks = tasks_of(job.task, training)
    network = build(settings, plan, job.seed)
    objective = TaskObjective(network, tasks, job.seed, training.tokens_per_step)
    result = _fit(
        objective,
        settings,
        job,
        steps=training.steps,
        schedule="wsd",
        decay_fraction=0.35,
        final_lr_ratio=0.05,
        warmup_steps=min(50, max(1, training.steps // 10)),
        betas=(0.9, 0.98),
        validate_every=min(training.validate_every, training.steps),
        best_metric="accuracy_worst",
        best_mode="max",
        early_stop_at=training.stop_at,
        log_every=min(50, training.validate_every),
    )
    with evaluation_mode(network):
        predict = predictor(network)
        scores = [
            score_task(predict, task, TEST_SEED + job.seed, training.test_rows) for task in tasks
        ]
    rows = []
    for task, score in zip(tasks, scores, strict=True):
        low, high = wilson_interval(score.right_tokens, score.tokens)
        row_low, row_high = wilson_interval(score.right_rows, score.rows)
        rows.append({
            "size": task.size,
            "accuracy": 100.0 * score.accuracy,
            "final_loss": result.metrics.get("train/loss"),
            "accuracy_low": 100.0 * low,
            "accuracy_high": 100.0 * high,
            "exact_match": 100.0 * score.right_rows / score.rows,
            "exact_low": 100.0 * row_low,
            "exact_high": 100.0 * row_high,
            "chance": 100.0 * task.chance,
            "right": score.right_tokens,
            "asked": score.tokens,
            "tokens": task.length,
            "steps": result.step,
            "ended": result.status,
            "validation_accuracy": result.metrics.get("validation/accuracy_worst"),
            **_costs(settings, plan, network, result),
        })  # fmt: skip
    return rows


def _train_text(settings: StudySettings, plan: ModelPlan, job: Job) -> list[Row]:
    text, corpus = settings.text, open_corpus(settings.text)
    network = build(settings, plan, job.seed)
    objective = TextObjective(
        network, corpus, seed=job.seed, seq_len=text.seq_len, batch_tokens=text.batch_tokens,
        validation_tokens=text.validation_tokens,
    )  # fmt: skip
    result = _fit(
        objective,
        settings,
        job,
        steps=text.steps,
        schedule="cosine",
        warmup_steps=max(1, text.steps // 20),
        validate_every=min(text.validate_every, text.steps),
        log_every=min(25, text.validate_every),
    )
    return [{**_text_row(settings, network, corpus, job, result),
             **_costs(settings, plan, network, result)}]  # fmt: skip


def _text_row(
    settings: StudySettings, network: Any, corpus: Corpus, job: Job, result: TrainResult
) -> Row:
    text = settings.text
    with evaluation_mode(network):
        losses, num_bytes = row_losses(network, corpus, text.seq_len, text.validation_tokens)
    final = text_metrics(losses, num_bytes, text.seq_len)
    history = read_history(Path(job.folder))
    return {
        "final_ppl": final["perplexity"],
        "best_ppl": min([*history["val_ppl"], final["perplexity"]]),
        "final_loss": final["loss"],
        "bits_per_byte": final["bits_per_byte"],
        "unknown_rate": corpus.unknown_rate,
        "source": corpus.source,
        "tokens": corpus.kind,
        "vocab_size": corpus.vocab_size,
        "steps": result.step,
        "validation_rows": len(losses),
        "samples": losses,
    }


def _costs(settings: StudySettings, plan: ModelPlan, network: Any, result: TrainResult) -> Row:
    device = resolve_device(settings.device)
    backend = backend_of(
        network, settings.backend, device, DTYPES[settings.dtype], needs_gradient=True,
        strict=settings.strict_backend,
    )  # fmt: skip
    return {
        "train_seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "num_params": sum(item.numel() for item in network.parameters()),
        "head_dim": mixer_settings(plan.config).dim // plan.config.num_heads,
        **backend._asdict(),
    }


def _fit(
    objective: TaskObjective | TextObjective, settings: StudySettings, job: Job, **changes: Any
) -> TrainResult:
    values = {
        "seed": job.seed,
        "lr": job.learning_rate,
        "precision": "bf16" if settings.dtype == "bfloat16" else "fp32",
        "device": settings.device,
        "keep_best": 0,
        "keep_last": 1,
        "loggers": (),
        "watch": WatchSettings(mfu=False),
        # The processor has one core for this training: nothing to build batches on beside it.
        "prefetch": 0,
        **changes,
    }
    train = TrainSettings(**values)
    folder = Path(job.folder)
    config = {"study": job._asdict() | {"settings": None}, "train": train.model_dump(mode="json")}
    run = RunFolder.open(folder, stage=objective.name, config=config)
    result = Trainer(objective, train, run).train()
    if result.status == "interrupted":
        raise KeyboardInterrupt
    latest = find_latest(folder)
    assert latest is not None, "a run that ended has a checkpoint"
    objective.load_model_weights(latest)  # of a run that was finished before
    objective.network.to(torch.device(resolve_device(settings.device)))
    return result


def read_history(folder: Path) -> dict[str, Any]:
    """Return the curves of a run folder, by the playbook's names and more."""
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "validation"]
    history: dict[str, Any] = {
        "step": [record["step"] for record in train],
        "train_loss": [record.get("loss") for record in train],
        "train_accuracy": [record.get("accuracy") for record in train],
        "grad_norm": [record.get("grad_norm") for record in train],
        "clip_fraction": [record.get("clip_rate") for record in train],
        "skipped_steps": [record.get("num_skipped") for record in train],
        "lr": [record.get("lr") for record in train],
        "val_step": [record["step"] for record in valid],
        "val_loss": [record["loss"] for record in valid if "loss" in record],
        "val_ppl": [record["perplexity"] for record in valid if "perplexity" in record],
        "val_accuracy": [record["accuracy"] for record in valid if "accuracy" in record],
    }
    return history
