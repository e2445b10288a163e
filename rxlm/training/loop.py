"""The steps of a run: update, log, validate, save, and the decision to end.

Not here: what is set up before and cleaned up after (``trainer.py``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rxlm.errors import RunError, UserError
from rxlm.training.checkpoint import Score, find_latest
from rxlm.training.compilation import uncompiled
from rxlm.training.device import autocast
from rxlm.training.metrics import MetricSinks, MetricWindow
from rxlm.training.optim import set_learning_rate
from rxlm.training.prefetch import BatchLoader
from rxlm.training.progress import ProgressView
from rxlm.training.resume import RunParts, as_json, save_run, write_run_status
from rxlm.training.rng import derive_seed, isolated_random_state
from rxlm.training.schedule import learning_rate
from rxlm.training.signals import StopRequest
from rxlm.training.training_state import Best, TrainingState
from rxlm.training.update import UpdateOutcome, run_update
from rxlm.training.watching.failures import describe_batches, memory_reported, where_to_resume
from rxlm.training.watching.samples import SampleFile
from rxlm.training.watching.utilization import Utilization

logger = logging.getLogger(__name__)

Ending = Literal["complete", "interrupted", "early_stopped"]


class TrainingLoop:
    """Runs steps until there is a reason to end.

    Attributes:
        state: counters of the run; replaced, never changed, by every step.
        checkpoint: the newest complete checkpoint folder.
    """

    def __init__(
        self,
        parts: RunParts,
        state: TrainingState,
        sinks: MetricSinks,
        loader: BatchLoader,
        view: ProgressView,
        stop: StopRequest,
    ) -> None:
        self.state = state
        self.checkpoint: Path | None = find_latest(parts.run.path)
        self._parts = parts
        self._settings = parts.settings
        self._sinks = sinks
        self._loader = loader
        self._view = view
        self._stop = stop
        self._window = MetricWindow(state.window)
        self._logged = state
        folder = parts.run.path if parts.world.is_main else None
        self._last_batch: Any = None
        self._samples = SampleFile(folder, state.step)
        self._utilization = Utilization(
            parts.objective, parts.strategy, parts.device, parts.settings.precision, folder
        )
        self._logged_wait = 0.0

    def run(self) -> Ending:
        """Make steps; returns why they ended.

        Raises:
            RunError: when training diverges or a checkpoint cannot be written.
            UserError: when ``best_metric`` is not a validation metric.
        """
        objective = self._parts.objective
        objective.set_training_mode()
        batch_state = as_json(objective.batch_state())
        ending = self._find_ending()
        while ending is None:
            self._make_step()
            improved = self._is_due(self._settings.validate_every) and self._validate()
            ending = self._find_ending()
            keep = improved and self._settings.keep_best > 0
            if ending is not None or keep or self._is_due(self._settings.save_every):
                self._save()
            before, batch_state = batch_state, as_json(objective.batch_state())
            if batch_state != before:
                self._loader.restart()
            self._view.advance(self.state.step)
        return ending

    def _make_step(self) -> None:
        """Make one update, count it, and log when it is time."""
        begin = time.perf_counter()
        parts, before = self._parts, self.state
        rate = learning_rate(self._settings, before.step)
        set_learning_rate(parts.optimizer, rate)
        batches = list(self._loader.step_batches(before.step))
        self._last_batch = batches[0]
        doing = f"step {before.step + 1}"
        with self._memory_reported(doing, batches):
            outcome = run_update(parts.strategy, batches, before.step, parts.device)
        if outcome.problem is None:
            self._window.add(outcome.metrics, outcome.num_targets)
            if (limit := self._settings.grad_clip) is not None:
                self._window.add({"clip_rate": float(outcome.metrics["grad_norm"] > limit)}, 1.0)
            parts.objective.after_step(before.step, outcome.metrics)
        skipped = int(outcome.problem is not None)
        self.state = before.model_copy(
            update={
                "step": before.step + 1,
                "num_tokens": before.num_tokens + outcome.num_tokens,
                "seconds": before.seconds + time.perf_counter() - begin,
                "num_skipped": before.num_skipped + skipped,
                "num_skipped_in_a_row": skipped * (before.num_skipped_in_a_row + 1),
            }
        )
        if outcome.problem is not None:
            self._report_problem(outcome, rate, describe_batches(batches))
        if self._is_due(self._settings.log_every):
            self._log(rate)

    def _report_problem(self, outcome: UpdateOutcome, rate: float, batch: str) -> None:
        """Report a skipped step; give up after too many in a row."""
        settings, state = self._settings, self.state
        logger.warning("step %d: skipped, %s (%s)", state.step, outcome.problem, batch)
        if state.num_skipped_in_a_row <= settings.max_bad_steps:
            return
        raise RunError(
            f"step {state.step}: {outcome.problem} ({batch}); "
            f"{state.num_skipped_in_a_row} steps in a row were skipped (max_bad_steps="
            f"{settings.max_bad_steps}). Lower lr (now {rate:.3g}, peak {settings.lr:.3g}), "
            f"lengthen warmup_steps (now {settings.warmup_steps}), lower grad_clip (now "
            f"{settings.grad_clip}) or use precision=fp32 (now {settings.precision}), then start "
            f"the same command again. It will resume from {where_to_resume(self.checkpoint)}."
        )

    def _log(self, rate: float) -> None:
        """Write the means since the last log line."""
        means = self._window.take_means()
        self.state = self.state.model_copy(update={"train": means})
        state, before, self._logged = self.state, self._logged, self.state
        seconds = state.seconds - before.seconds
        waited = self._loader.seconds_waited
        values = {
            **means,
            "lr": rate,
            "num_tokens": state.num_tokens,
            "num_skipped": state.num_skipped,
            "tokens_per_second": (state.num_tokens - before.num_tokens) / max(seconds, 1e-9),
            "seconds": state.seconds,
            "seconds_waited": waited - self._logged_wait,
        }
        if self._settings.watch.mfu:
            speed = values["tokens_per_second"]
            doing = f"measuring mfu after step {state.step}"
            off = "set train.watch.mfu=false"
            with self._memory_reported(doing, [self._last_batch], off):
                values |= self._utilization.measure(self._last_batch, state.step - 1, speed)
        self._logged_wait = waited
        self._sinks.write("train", state.step, values)
        self._view.report("train", state.step, values)

    def _memory_reported(
        self, doing: str, batches: Sequence[Any], first_remedy: str | None = None
    ) -> contextlib.AbstractContextManager[None]:
        saving = self._parts.objective.memory_saving
        return memory_reported(
            doing, batches, self._settings, saving, self.checkpoint, first_remedy
        )

    def _validate(self) -> bool:
        """Validate without a trace on training; return whether the result is the best so far."""
        parts, settings, step = self._parts, self._settings, self.state.step
        seed = derive_seed(settings.seed, "validation")
        parts.module.eval()
        # Every process measures the same: none would have anything else to do, and weights that
        # are cut up are needed from all. The numbers of process 0 count.
        with (
            self._memory_reported(f"validation after step {step}", ()),
            isolated_random_state(seed),
            torch.no_grad(),
            autocast(parts.device, settings.precision),
            parts.strategy.whole_weights(),
            uncompiled(),
        ):
            metrics = {name: float(value) for name, value in parts.objective.validate().items()}
            watched = parts.objective.watch(settings.watch)
        metrics = parts.world.broadcast(metrics)
        parts.objective.set_training_mode()
        if not metrics:
            return False
        if settings.best_metric not in metrics:
            raise UserError(
                f"best_metric='{settings.best_metric}': validation of {parts.objective.name} "
                f"measures {', '.join(sorted(metrics))}. Use one of them."
            )
        self._sinks.write("validation", step, {**watched.metrics, **metrics})
        self._samples.write(step, watched.samples)
        self._view.report("validation", step, metrics)
        return self._note_validation(metrics)

    def _note_validation(self, metrics: dict[str, float]) -> bool:
        """Take the metrics into the state; return whether they are the best so far."""
        settings, step = self._settings, self.state.step
        score = Score(settings.best_metric, settings.best_mode, metrics[settings.best_metric])
        best = self.state.best
        rank_to_beat = math.inf if best is None else score._replace(value=best.value).rank()
        improved = math.isfinite(score.value) and score.rank() < rank_to_beat
        since_best = 0 if improved else self.state.validations_since_best + 1
        update: dict[str, Any] = {
            "validation": metrics,
            "validation_step": step,
            "best": Best(**score._asdict(), step=step) if improved else best,
            "validations_since_best": since_best,
        }
        self.state = self.state.model_copy(update=update)
        return improved

    def _save(self) -> None:
        """Write a checkpoint; the metrics lines before it are on disk first."""
        self._sinks.sync()
        self.state = self.state.model_copy(update={"window": dict(self._window.sums)})
        self.checkpoint = save_run(self._parts, self.state)
        write_run_status(self._parts, "running", self.state)

    def _is_due(self, every: int | None) -> bool:
        """Return whether something done every so many steps is due; always so at the last step."""
        if every is None:
            return False
        return self.state.step % every == 0 or self.state.step == self._settings.steps

    def _find_ending(self) -> Ending | None:
        """Return why the run ends now, or ``None``."""
        if self.state.step >= self._settings.steps:
            return "complete"
        patience = self._settings.early_stop_patience
        if patience is not None and self.state.validations_since_best >= patience:
            return "early_stopped"
        goal, best = self._settings.early_stop_at, self.state.best
        if goal is not None and best is not None:
            found, wanted = (Score(best.metric, best.mode, x) for x in (best.value, goal))
            if best.metric == self._settings.best_metric and found.rank() <= wanted.rank():
                return "early_stopped"
        # All processes stop at the same step, whichever of them got the signal.
        signals = [item for item in self._parts.world.gather(self._stop.signal) if item is not None]
        if signals and self._stop.signal is None:
            self._stop.signal = signals[0]
        return "interrupted" if signals else None
