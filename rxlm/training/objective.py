"""What a training stage is: an object that says what trains, on which batch, and how well it does.

The loop, checkpoints, precision, logging and progress live in the Trainer and exist once; an
objective holds the model and the data of one stage and nothing of the loop.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from rxlm.data.records import DataSummary
from rxlm.errors import UserError
from rxlm.training.optim import decay_groups
from rxlm.training.settings import TrainSettings
from rxlm.training.watch import Watched, WatchSettings


class StepOutput(NamedTuple):
    """What one micro-batch gives to the Trainer."""

    loss: Tensor
    """Scalar, the mean over the targets of the micro-batch, with a graph."""
    num_targets: int
    """Weight of this micro-batch in the accumulated gradient; 0 = nothing to learn here."""
    metrics: Mapping[str, Tensor | float]
    """Scalars, averaged over micro-batches. NaN means: not measured in this micro-batch."""
    num_tokens: int
    """Tokens processed, for tokens per second."""
    weights: Mapping[str, float] = MappingProxyType({})
    """Weight of a metric in that average, where it is not ``num_targets``."""


class MemorySaving(NamedTuple):
    """Which settings of a stage make a step take less memory."""

    batch: str = "objective.batch_size"
    """What says how large a micro-batch is."""
    lengths: str | None = None
    """What makes its rows or windows shorter, as in ``take ...``."""
    checkpointing: tuple[str, ...] = ()
    """Values of ``gradient_checkpointing`` that save something, that which saves least first."""


class Objective(abc.ABC):
    """One training stage.

    ``step`` is the index of the optimizer update, counted from 0, everywhere in this interface.

    Reproducibility rests on :meth:`batch`: it must be a pure function of the data seed, ``step``,
    ``micro_step`` and :meth:`batch_state`, and must not touch the global random generators, since
    it may run in a background thread. Dropout and the like may use the global generators: the
    Trainer saves and restores them. Randomness that :meth:`loss` needs per micro-batch travels in
    the batch (a seed is a fine thing for a batch to hold).
    """

    name: str
    """Name of the stage, for log lines and messages."""
    summaries: Mapping[str, DataSummary] = MappingProxyType({})
    """By split, how much was read and what was skipped; empty for data that cannot be bad."""
    memory_saving = MemorySaving()
    """What a person is told to change when memory has run out."""

    @abc.abstractmethod
    def trained_modules(self) -> nn.Module:
        """Return the module whose ``requires_grad`` parameters are optimised.

        Always the same object, moved to the device by the Trainer. The names of its parameters
        are the keys of the optimizer state in checkpoints, so they must be stable.
        """

    @abc.abstractmethod
    def batch(self, step: int, micro_step: int) -> Any:
        """Return one micro-batch, on the CPU (see the class for what it may depend on).

        Tensors inside dictionaries, lists, tuples and dataclasses are moved to the device before
        :meth:`loss` sees them. For accumulation to equal a larger batch, micro-batch ``m`` of step
        ``s`` holds the examples from position ``(s * accumulation + m) * batch_size`` on.
        """

    @abc.abstractmethod
    def loss(self, batch: Any, step: int) -> StepOutput:
        """Run the forward pass of one micro-batch (the Trainer does the backward pass)."""

    def shard(self, batch: Any, rank: int, size: int) -> Any:
        """Return the part of a micro-batch that process ``rank`` of ``size`` computes, on the CPU.

        The losses of the parts, weighted by their targets, must make that of the whole.

        Raises:
            UserError: when the micro-batch cannot be cut.
        """
        raise UserError(
            f"stage {self.name} cannot cut a micro-batch into {size} parts: set train.accumulation "
            f"to a multiple of the number of processes, {size}."
        )

    def count_targets(self, batch: Any) -> int:
        """Return the ``num_targets`` that :meth:`loss` will report (DeepSpeed asks beforehand).

        Raises:
            UserError: when that is not known.
        """
        raise UserError(
            f"strategy=deepspeed: stage {self.name} cannot count targets in advance; use ddp."
        )

    @abc.abstractmethod
    def save_model(self, directory: Path) -> None:
        """Write a model folder that can be loaded by itself into the existing ``directory``."""

    @abc.abstractmethod
    def load_model_weights(self, directory: Path) -> None:
        """Load, in place and strictly, the weights that :meth:`save_model` wrote."""

    def validate(self) -> dict[str, float]:
        """Return validation metrics such as ``{"loss": 1.2, "accuracy": 0.8}``; ``{}`` for none.

        Called without gradients, in evaluation mode, under freshly seeded global random
        generators that are put back afterwards: validation never changes training.
        """
        return {}

    def watch(self, settings: WatchSettings) -> Watched:
        """Return what else there is to see; called after, and under the terms of, `validate`."""
        return Watched({}, [])

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Update curricula after update ``step``; not called for a step that was skipped.

        Args:
            step: index of the update that was made.
            metrics: ``loss``, ``grad_norm`` and the metrics of the step.
        """

    def left_out(self, step: int) -> Sequence[nn.Parameter]:
        """Return the parameters that update ``step`` must not change, though others do."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know beyond the weights, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ValueError: for a state that this objective did not write.
        """
        if state:
            raise ValueError(f"{self.name} has no state, but the checkpoint holds {sorted(state)}.")

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one state of those of all processes, in the order of their ranks.

        The default is that of the first: all are equal, unless processes read different data.
        """
        return states[0]

    def data_summary(self) -> dict[str, Any]:
        """Return :attr:`summaries` as JSON values."""
        return {split: summary.to_dict() for split, summary in self.summaries.items()}

    def batch_state(self) -> Any:
        """Return the part of the state that :meth:`batch` reads, as a JSON value.

        When it changes after a step, batches that were built ahead are built again. Override it
        when :meth:`state_dict` also holds values that change every step, such as averages.
        """
        return self.state_dict()

    def each_phase(self, num_steps: int) -> Iterator[int]:
        """Put the objective into each phase of its curriculum; yield how many steps that may last.

        For estimates, with an objective that is thrown away. The default is a single phase.

        Args:
            num_steps: of the whole run.
        """
        yield num_steps

    def architecture(self) -> dict[str, Any]:
        """Return what must not change when a run is resumed, as JSON values.

        The default is the shape of every tensor of the trained module. Objectives whose model has
        a configuration return that instead: it also sees changes that keep all shapes.
        """
        state = self.trained_modules().state_dict()
        return {name: list(tensor.shape) for name, tensor in state.items()}

    def parameter_groups(self, settings: TrainSettings) -> list[dict[str, Any]]:
        """Return optimizer groups: ``params``, ``weight_decay`` and optionally ``lr_scale``.

        Every trainable parameter belongs to exactly one group. ``lr_scale`` multiplies the
        learning rate of the schedule. The default is :func:`~rxlm.training.optim.decay_groups`.
        """
        return decay_groups(self.trained_modules(), settings.weight_decay)

    def set_gradient_checkpointing(self, *, layers: bool, turns: bool) -> None:
        """Compute the inside of layers, of turns, or of both again in the backward pass.

        Raises:
            UserError: when this stage does not know how.
        """
        if layers or turns:
            raise UserError(
                f"gradient_checkpointing: stage {self.name} does not offer it; set it to none."
            )

    def layers(self) -> Sequence[nn.Module]:
        """Return the modules that `train.compile` translates; none: the stage does not offer it."""
        return ()

    def set_training_mode(self) -> None:
        """Put the modules into the mode in which they train (default: all in training mode)."""
        self.trained_modules().train()
