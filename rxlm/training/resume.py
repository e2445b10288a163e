"""Saving a run into a checkpoint and continuing it from one.

Not here: how a folder is written safely (``checkpoint.py``), what the files in it look like
(``training_state.py``), and when to save (``loop.py``).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from rxlm.errors import UserError
from rxlm.training.checkpoint import Score, remove_surplus, save_checkpoint
from rxlm.training.distributed.strategy import Strategy
from rxlm.training.distributed.world import World
from rxlm.training.objective import Objective
from rxlm.training.optim import trainable_parameters
from rxlm.training.recipe import diff_mappings, fingerprint
from rxlm.training.rng import (
    capture_random_state,
    isolated_random_state,
    process_seed,
    restore_random_state,
    seed_everything,
)
from rxlm.training.run_folder import RunFolder, RunStatus
from rxlm.training.settings import TrainSettings
from rxlm.training.training_state import (
    Snapshot,
    TrainingState,
    read_snapshot,
    write_snapshot,
)

logger = logging.getLogger(__name__)


class RunParts(NamedTuple):
    """The objects that one run works on."""

    objective: Objective
    settings: TrainSettings
    run: RunFolder
    device: torch.device
    module: nn.Module
    optimizer: torch.optim.Optimizer
    strategy: Strategy

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.strategy.world


def save_run(parts: RunParts, state: TrainingState) -> Path:
    """Write a checkpoint of ``state`` and delete those that are no longer kept.

    Called in every process; process 0 writes.

    Returns:
        The complete checkpoint folder.

    Raises:
        RunError: when the disk refuses.
    """
    random_states = parts.world.gather(capture_random_state())
    states = parts.world.gather(parts.objective.state_dict())
    objective_state = parts.objective.merge_states(states)
    snapshot = Snapshot(
        state=state,
        optimizer=parts.strategy.optimizer_tensors(),
        random_states=random_states,
        objective=objective_state,
        architecture=as_json(parts.objective.architecture()),
        settings=as_json(parts.settings.model_dump()),
        trained=sorted(trainable_parameters(parts.module)),
        config_fingerprint=fingerprint(parts.run.config),
    )

    with parts.strategy.whole_weights(), parts.strategy.exact_weights():
        path = _write(parts, state, snapshot) if parts.world.is_main else None
    # The others go on when the files are there.
    saved = parts.world.broadcast(path)
    assert saved is not None, "process 0 has written it"
    return saved


def _write(parts: RunParts, state: TrainingState, snapshot: Snapshot) -> Path:
    settings = parts.settings

    def write(directory: Path) -> None:
        parts.objective.save_model(directory)
        write_snapshot(directory, snapshot)

    tensors = [*parts.module.state_dict().values(), *snapshot.optimizer.values()]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Whether and when a run saves must not change the numbers it draws.
    with isolated_random_state():
        score = _score(settings, state)
        path = save_checkpoint(parts.run.path, state.step, score, write, num_bytes)
    remove_surplus(parts.run.path, settings.keep_last, settings.keep_best)
    return path


def restore_run(parts: RunParts, checkpoint: Path) -> TrainingState:
    """Put model, optimizer, objective and random generators into the state of a checkpoint.

    Changed training settings are allowed and logged.

    Raises:
        UserError: when the checkpoint is of another architecture; the message lists the changes.
        RunError: when the checkpoint is damaged.
    """
    snapshot = read_snapshot(checkpoint)
    changed = diff_mappings(snapshot.architecture, as_json(parts.objective.architecture()))
    if changed:
        raise UserError(
            f"{parts.run.path} cannot be resumed, the architecture has changed:\n  "
            + "\n  ".join(changed)
            + "\nUndo the change, or train into another folder."
        )
    logger.info("resuming %s at step %d", parts.run.path, snapshot.state.step)
    for line in diff_mappings(snapshot.settings, as_json(parts.settings.model_dump())):
        logger.info("training settings changed: %s", line)
    trained = sorted(trainable_parameters(parts.module))
    if trained != snapshot.trained:
        fresh = sorted(set(trained) - set(snapshot.trained))
        stopped = sorted(set(snapshot.trained) - set(trained))
        logger.warning("what trains has changed: new %s, no longer %s", fresh, stopped)
    with parts.strategy.exact_weights():
        parts.objective.load_model_weights(checkpoint)
    parts.objective.load_state_dict(snapshot.objective)
    parts.strategy.start()
    parts.strategy.load_optimizer_tensors(snapshot.optimizer)
    # Last, since what comes before may draw random numbers.
    rank, before = parts.world.rank, len(snapshot.random_states)
    if parts.world.size != before:
        logger.info("the run had %d processes and goes on in %d", before, parts.world.size)
    if rank < before:
        restore_random_state(snapshot.random_states[rank])
    else:
        seed_everything(process_seed(parts.settings.seed, rank, snapshot.state.step))
    return _adapt_best(parts.settings, snapshot.state)


def write_run_status(
    parts: RunParts,
    status: Literal["running", "interrupted", "failed", "complete", "early_stopped"],
    state: TrainingState,
) -> None:
    """Record in ``run.json`` how far the run is."""
    parts.run.write_status(
        RunStatus(
            stage=parts.run.stage,
            status=status,
            step=state.step,
            metrics=result_metrics(state),
            seconds=state.seconds,
            tokens_per_second=state.tokens_per_second,
            early_stop_patience=parts.settings.early_stop_patience,
            early_stop_at=parts.settings.early_stop_at,
            data=parts.objective.data_summary(),
        )
    )


def result_metrics(state: TrainingState) -> dict[str, float | None]:
    """Return the last metrics as ``train/<name>`` and ``validation/<name>``.

    A number that is not finite becomes ``None``, since JSON has no such number.
    """
    metrics = {f"train/{name}": value for name, value in state.train.items()}
    metrics |= {f"validation/{name}": value for name, value in state.validation.items()}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def as_json(value: Any) -> Any:
    """Return ``value`` as it looks after a round trip through JSON (tuples become lists)."""
    return json.loads(json.dumps(value))


def _score(settings: TrainSettings, state: TrainingState) -> Score | None:
    """Return the best-metric value if there was a validation at this very step."""
    value = state.validation.get(settings.best_metric, math.nan)
    if state.validation_step != state.step or not math.isfinite(value):
        return None
    return Score(settings.best_metric, settings.best_mode, value)


def _adapt_best(settings: TrainSettings, state: TrainingState) -> TrainingState:
    """Forget the best value when another metric decides from now on."""
    best = state.best
    if best is None or (best.metric, best.mode) == (settings.best_metric, settings.best_mode):
        return state
    return state.model_copy(update={"best": None, "validations_since_best": 0})
