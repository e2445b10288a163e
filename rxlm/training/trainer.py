"""The Trainer: sets a run up, resumes it when there is something to resume, runs the loop.

A stage is an :class:`~rxlm.training.objective.Objective`; nothing here knows of models or data. A
run that was stopped at any instant continues from its newest complete checkpoint, on the CPU with
bit-identical results.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from rxlm.errors import RunError, UserError
from rxlm.training.checkpoint import clean_leftovers, find_latest
from rxlm.training.device import cpu_threads, resolve_device
from rxlm.training.distributed.sharding import local_batches, num_local_micro_batches
from rxlm.training.distributed.strategy import DataParallel, Strategy, put_on_device
from rxlm.training.distributed.world import World, current_world
from rxlm.training.distributed.zero import ZeRO, check_deepspeed
from rxlm.training.loggers import check_loggers, open_loggers
from rxlm.training.loop import Ending, TrainingLoop
from rxlm.training.master_weights import MasterWeights
from rxlm.training.metrics import MetricSinks
from rxlm.training.objective import Objective
from rxlm.training.optim import trainable_parameters
from rxlm.training.prefetch import BatchLoader
from rxlm.training.progress import PlainProgress, open_progress
from rxlm.training.resume import RunParts, restore_run, result_metrics, write_run_status
from rxlm.training.rng import process_seed, seed_everything
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.signals import StopRequest
from rxlm.training.training_state import TrainingState

logger = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """How a call of :meth:`Trainer.train` ended."""

    step: int
    """Updates made since the beginning of the run."""
    status: Ending
    """``complete``, ``interrupted`` or ``early_stopped``."""
    metrics: dict[str, float | None]
    """Last ``train/<name>`` and ``validation/<name>``; ``None`` = not a finite number."""
    checkpoint: Path | None
    """The newest complete checkpoint folder; ``None`` only when interrupted before step 1."""
    seconds: float
    """Time in updates over all starts of the run."""
    tokens_per_second: float
    """Over all starts of the run."""
    signal: int | None = None
    """The signal that interrupted the run (exit status of a command: 128 + signal)."""


def make_strategy(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    device: torch.device,
    world: World,
    masters: MasterWeights | None = None,
) -> Strategy:
    """Return how the processes of the run share their updates.

    Raises:
        UserError: when DeepSpeed is asked for and is not installed, or its file is not valid.
    """
    kind: type[Strategy] = DataParallel if world.size > 1 else Strategy
    if settings.strategy == "deepspeed":
        if world.size == 1:
            raise UserError(
                "strategy=deepspeed shares a run between processes, and there is one: start it "
                "with `torchrun --nproc-per-node 2 -m rxlm train ...`, or use strategy=auto."
            )
        check_deepspeed(settings)
        kind = ZeRO
    return kind(objective, optimizer, settings, device, world, masters)


class Trainer:
    """Trains one objective into one run folder.

    Example::

        run = RunFolder.open("runs/demo", stage=objective.name, config=recipe)
        result = Trainer(objective, TrainSettings(steps=500), run).train()
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainSettings,
        run: RunFolder,
        console: Console | None = None,
    ) -> None:
        """Put the objective's module on the device and build the optimizer.

        Args:
            objective: the stage.
            settings: how it is trained.
            run: where results go; a run that is there is resumed.
            console: where the progress bar goes; default standard error.

        Raises:
            UserError: when the device or a logger is not there, or nothing is trainable.
        """
        check_loggers(settings)
        world = current_world()
        device = resolve_device(settings.device, world.local_rank if world.size > 1 else None)
        optimizer, masters = put_on_device(objective, settings, device)
        module = objective.trained_modules()
        strategy = make_strategy(objective, optimizer, settings, device, world, masters)
        self._parts = RunParts(objective, settings, run, device, module, optimizer, strategy)
        # Counted now: some strategies cut parameters up.
        self._num_trained = sum(item.numel() for item in trainable_parameters(module).values())
        self._num_parameters = sum(item.numel() for item in module.parameters())
        self._console = console

    def train(self) -> TrainResult:
        """Train until the last step, an early stop, or a stop on request; resume if possible.

        A run that is already finished is recognised and left alone. SIGTERM and Ctrl-C end the
        run at the next step boundary, after saving; a second Ctrl-C ends it at once.

        Raises:
            UserError: when the run in the folder has another architecture, or ``best_metric`` is
                not a validation metric.
            RunError: when training diverges or a checkpoint cannot be read or written.
            KeyboardInterrupt: on the second Ctrl-C.
        """
        return self._find_finished() or self._train()

    def _train(self) -> TrainResult:
        parts, settings = self._parts, self._parts.settings
        with contextlib.ExitStack() as stack:
            stack.enter_context(cpu_threads(settings.threads))
            stop = stack.enter_context(StopRequest())
            state = self._begin()
            world = parts.world
            loggers = open_loggers(settings, parts.run, state.step) if world.is_main else []
            metrics_path = parts.run.metrics_path if world.is_main else None
            sinks = MetricSinks(metrics_path, loggers, state.step)
            stack.callback(sinks.close)
            loader = BatchLoader(
                local_batches(parts.objective, settings.accumulation, world),
                num_local_micro_batches(settings.accumulation, world.size),
                settings.steps,
                settings.prefetch,
                settings.prefetch_workers,
            )
            stack.callback(loader.close)
            name = parts.objective.name
            view = (
                open_progress(name, state.step, settings.steps, self._console)
                if world.is_main
                else PlainProgress(name, settings.steps)
            )
            stack.callback(view.close)
            loop = TrainingLoop(parts, state, sinks, loader, view, stop)
            try:
                ending = loop.run()
            except (RunError, UserError):
                write_run_status(parts, "failed", loop.state)
                raise
        write_run_status(parts, ending, loop.state)
        logger.info(
            "%s: %s at step %d, %.0f s", parts.run.path, ending, loop.state.step, loop.state.seconds
        )
        return TrainResult(
            step=loop.state.step,
            status=ending,
            metrics=result_metrics(loop.state),
            checkpoint=loop.checkpoint,
            seconds=loop.state.seconds,
            tokens_per_second=loop.state.tokens_per_second,
            signal=stop.signal if ending == "interrupted" else None,
        )

    def _find_finished(self) -> TrainResult | None:
        """Return the result of a run that has nothing left to do."""
        run = self._parts.run
        status = run.read_status()
        if status is None or not status.is_finished(self._parts.settings):
            return None
        latest = find_latest(run.path)
        if latest is None:
            logger.warning(
                "%s: is %s but has no checkpoint, so it runs again", run.path, status.status
            )
            return None
        logger.info("%s: already %s at step %d", run.path, status.status, status.step)
        return TrainResult(
            step=status.step,
            status="complete" if status.status == "complete" else "early_stopped",
            metrics=status.metrics,
            checkpoint=latest,
            seconds=status.seconds,
            tokens_per_second=status.tokens_per_second,
        )

    def _begin(self) -> TrainingState:
        """Restore the newest checkpoint, or begin at step 0; then record what this start uses."""
        parts = self._parts
        latest = find_latest(parts.run.path)
        # Process 0 changes the folder when the others have looked at it.
        parts.world.wait()
        if parts.world.is_main:
            clean_leftovers(parts.run.path)
        if latest is None:
            parts.strategy.start()
            seed_everything(process_seed(parts.settings.seed, parts.world.rank))
            state = TrainingState()
        else:
            state = restore_run(parts, latest)
        parts.run.write_config()
        parts.run.write_environment(str(parts.device), torch.get_num_threads())
        write_run_status(parts, "running", state)
        self._log_plan()
        return state

    def _log_plan(self) -> None:
        """Log what is derived from the settings, so that nobody has to guess it."""
        parts, settings = self._parts, self._parts.settings
        logger.info(
            "%s: %d steps of %d micro-batch(es) on %d x %s (%s), %s, %d threads; "
            "%s of %s parameters train",
            parts.objective.name,
            settings.steps,
            settings.accumulation,
            parts.world.size,
            parts.device,
            parts.strategy.name,
            settings.precision,
            torch.get_num_threads(),
            f"{self._num_trained:,}",
            f"{self._num_parameters:,}",
        )
