"""How processes share one update: each computes a part of the batch, all make the same step.

What an update *is* does not depend on it: the gradient is that of the mean loss over all targets
of the whole batch, in one process and in many. :class:`Strategy` is one process,
:class:`DataParallel` is DDP, and ``zero.py`` is DeepSpeed.

The whole loss of a micro-batch is one wrapped forward pass (:class:`LossModule`), so that a window
of many turns, which runs decoder and memory once a turn, is reduced once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rxlm.training.compilation import compile_layers
from rxlm.training.device import autocast
from rxlm.training.distributed.world import World
from rxlm.training.master_weights import MasterWeights, broadcast, mean_gradients
from rxlm.training.objective import Objective, StepOutput
from rxlm.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    trainable_parameters,
)
from rxlm.training.settings import TrainSettings


class LossModule(nn.Module):
    """An objective's loss as the forward pass of a module that holds what trains."""

    def __init__(self, objective: Objective, settings: TrainSettings, device: torch.device) -> None:
        super().__init__()
        self.trained = objective.trained_modules()
        self._objective = objective
        self._settings, self._device = settings, device

    def forward(self, batch: Any, step: int) -> StepOutput:
        """Return the loss of a micro-batch that is on the device."""
        with autocast(self._device, self._settings.precision):
            return self._objective.loss(batch, step)


def put_on_device(
    objective: Objective, settings: TrainSettings, device: torch.device
) -> tuple[torch.optim.Optimizer, MasterWeights | None]:
    """Make an objective ready to be trained as the settings say.

    Returns:
        the optimizer, and the masters of weights that are bfloat16.

    Raises:
        UserError: when nothing is trainable, or the stage cannot be trained like that.
    """
    objective.set_gradient_checkpointing(
        layers=settings.gradient_checkpointing in ("layers", "both"),
        turns=settings.gradient_checkpointing in ("turns", "both"),
    )
    if settings.compile:
        compile_layers(objective)
    module = objective.trained_modules().to(device)
    masters = MasterWeights(module) if settings.precision == "bf16_pure" else None
    groups = objective.parameter_groups(settings)
    return build_optimizer(module, groups, settings, masters), masters


class Strategy:
    """One process.

    Attributes:
        objective: what is trained; its weights are on the device.
        optimizer: over the objective's parameters; set its learning rates before each update.
        world: the processes that share the update.
    """

    name = "single"
    """For log lines."""

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        device: torch.device,
        world: World | None = None,
        masters: MasterWeights | None = None,
    ) -> None:
        self.objective = objective
        self._masters = masters
        self.optimizer = optimizer
        self.world = World() if world is None else world
        self._settings, self._device = settings, device
        self._loss = LossModule(objective, settings, device)

    def start(self) -> None:
        """Begin, once the weights are in place; what trains is fixed from here on."""

    def begin_update(self, batches: list[Any]) -> None:
        """Forget the last gradient; ``batches`` are the micro-batches of this process."""
        self.optimizer.zero_grad(set_to_none=True)

    def compute(self, batch: Any, step: int, *, is_last: bool) -> StepOutput:
        """Return the loss of a micro-batch and add its gradient, times its number of targets.

        Args:
            batch: on the device.
            step: index of the update.
            is_last: whether it is the last micro-batch of the update.
        """
        output = self._loss(batch, step)
        # The number of all targets is known only after the last micro-batch: it divides later.
        if output.num_targets > 0:
            (output.loss * output.num_targets).backward()
        if self._masters is not None:
            # After every micro-batch: a sum of many would be rounded each time.
            self._masters.take_gradients()
        return output

    def drop_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leave parameters out of this update: without a gradient, neither moments nor weight decay
        move them. Called in every process, after the last micro-batch.

        Raises:
            UserError: when the strategy cannot do that.
        """
        for param in parameters:
            optimized = param if self._masters is None else self._masters.of(param)
            optimized.grad = None

    def finish_gradient(self, num_targets: int) -> Tensor:
        """Make the gradient that of the mean over the targets of all processes, and clip it.

        Returns:
            its norm before clipping, a scalar.
        """
        scale = self.world.size / num_targets
        return scale_and_clip(self._optimized(), scale, self._settings.grad_clip)

    def step(self) -> None:
        """Change the weights."""
        self.optimizer.step()
        if self._masters is not None:
            self._masters.round()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that this process holds, by parameter name."""
        found = {}
        for name, param in trainable_parameters(self.objective.trained_modules()).items():
            gradient = (param if self._masters is None else self._masters.of(param)).grad
            if gradient is not None:
                found[name] = gradient
        return found

    def _optimized(self) -> list[Tensor]:
        return [item for group in self.optimizer.param_groups for item in group["params"]]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Have all weights in every process for the time of a block (to save or to measure)."""
        yield

    @contextlib.contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Have the weights as precise as they are trained (to save or to load them)."""
        with contextlib.nullcontext() if self._masters is None else self._masters.exact():
            yield

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the whole optimizer state by parameter name; called in every process, of use in
        process 0. It does not depend on the strategy or on the number of processes."""
        module = self.objective.trained_modules()
        return optimizer_tensors(module, self.optimizer, self._masters)

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_tensors` of any strategy returned; after ``start``."""
        module = self.objective.trained_modules()
        load_optimizer_tensors(module, self.optimizer, tensors, self._masters)


class DataParallel(Strategy):
    """DDP: every process holds everything; gradients are averaged while they are computed."""

    name = "ddp"

    def start(self) -> None:
        """Give every process the weights of process 0, and wrap the loss."""
        if self._masters is not None:
            # DDP would add up in bfloat16: gradients are exchanged by hand, in float32.
            with self._masters.exact():
                broadcast(list(self.objective.trained_modules().parameters()))
            return
        # Which parameters a step uses depends on the step: a curriculum may begin without memory.
        # A parameter that no process used keeps no gradient, as in a single process.
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, which the versions before do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped = DistributedDataParallel(
                self._loss, broadcast_buffers=False, find_unused_parameters=True
            )

    def compute(self, batch: Any, step: int, *, is_last: bool) -> StepOutput:
        """As :meth:`Strategy.compute`; the last micro-batch makes the processes exchange."""
        if self._masters is not None:
            return super().compute(batch, step, is_last=is_last)
        with contextlib.nullcontext() if is_last else self._wrapped.no_sync():
            output: StepOutput = self._wrapped(batch, step)
            # All processes exchange equally often, also one that has nothing to learn here.
            targets_or_nothing(output).backward()
        return output

    def finish_gradient(self, num_targets: int) -> Tensor:
        """As :meth:`Strategy.finish_gradient`."""
        if self._masters is not None:
            parameters = self._optimized()
            present = self.world.gather([param.grad is not None for param in parameters])
            mean_gradients(parameters, present, self.world.size)
        return super().finish_gradient(num_targets)


def targets_or_nothing(output: StepOutput) -> Tensor:
    """Return the loss times its number of targets; a zero with a graph if there is none."""
    if output.num_targets > 0:
        return output.loss * output.num_targets
    return torch.nan_to_num(output.loss) * 0.0


def scale_and_clip(parameters: Sequence[Tensor], scale: float, max_norm: float | None) -> Tensor:
    """Multiply all gradients by ``scale``, then shrink them to ``max_norm`` if they are longer.

    Returns:
        The norm of the scaled gradient before clipping, a scalar tensor (no synchronisation).
    """
    gradients = [param.grad for param in parameters if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) * scale
    factor = torch.full_like(norm, scale)
    if max_norm is not None:
        shrink = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        # A bad norm must not spread to the good gradients: the error message looks for the bad one.
        factor = factor * torch.where(torch.isfinite(norm), shrink, 1.0)
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return norm
