"""Model FLOPs utilization: operations that the model needs, over what the device could have done.

    MFU = operations a token * tokens a second / (processes * peak of the device)

*Operations a token* are counted, not estimated: of one forward pass every matrix product, softmax
attention as products of whole matrices (causal or not). A backward pass costs twice its forward
pass, so that what trains counts three times and a frozen component, which needs no backward pass,
once; what gradient checkpointing computes again does not count (PaLM, arXiv 2204.02311, appendix
B). They are counted on one batch whenever the objective enters a new phase, so ``mfu`` is as exact
as the mean length of that batch. Counting computes that forward pass once more, without a graph and
with the kernels of a step, so that it holds less than a step. *Peak* is measured: the fastest of a
few large matrix products of this device in the precision of the run, not a data sheet's number.
Elementwise work is not counted, neither above nor below: on a CPU a small model that never waits
still stays far under 1.

Not here: tokens per second (the loop knows them).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rxlm.training.compilation import uncompiled
from rxlm.training.device import autocast, move_to_device
from rxlm.training.distributed.strategy import Strategy
from rxlm.training.objective import Objective
from rxlm.training.rng import isolated_random_state
from rxlm.training.run_folder import write_atomically

logger = logging.getLogger(__name__)

PEAK_FILE = "peak.json"
"""In the run folder: the measured peak, and how it was measured."""
_SIZES = {"cpu": 1024, "cuda": 8192}
_SMALLEST = 128
_LONGEST = 0.5
"""Seconds that a product may take; where it would take longer, a smaller one is measured (on a CPU
without bfloat16 arithmetic those products are a hundred times slower)."""
_REPETITIONS = 4
_QKV = ("query", "key", "value")


class Peak(NamedTuple):
    """What a device does at most: operations a second, and how that was found out."""

    flops_per_second: float
    how: str


class Counted(NamedTuple):
    """Operations of the forward pass of one batch, those in frozen modules, and its tokens."""

    forward: int
    frozen: int
    num_tokens: int

    @property
    def per_token(self) -> float:
        """Operations of training a token: forward and backward."""
        return (3 * self.forward - 2 * self.frozen) / max(1, self.num_tokens)


@functools.cache
def measured_peak(device: torch.device, precision: str, num_threads: int) -> Peak:
    """Return the peak of matrix products of a device; measured once in a process.

    Args:
        device: which.
        precision: of a run: ``fp32``, ``bf16`` or ``bf16_pure``.
        num_threads: CPU threads that are in use (part of what is measured on a CPU).
    """
    kind = "fp32" if precision == "fp32" else "bf16"
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    largest = _SIZES.get(device.type, 1024)
    size = min(_SMALLEST, largest)
    while True:
        # Constants: this must not draw random numbers.
        matrix = torch.full((size, size), 0.5, dtype=dtype, device=device)
        # The first one also loads what it needs.
        fastest = min(_seconds_of_product(matrix) for _ in range(2))
        if size == largest or 8 * fastest > _LONGEST:
            break
        size *= 2
    fastest = min(fastest, *(_seconds_of_product(matrix) for _ in range(_REPETITIONS - 1)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {num_threads} threads" if device.type == "cpu" else ""
    how = f"{name}, {kind}{threads}: fastest of {_REPETITIONS} products of matrices {size} x {size}"
    return Peak(2.0 * size**3 / fastest, how)


def _seconds_of_product(matrix: torch.Tensor) -> float:
    _synchronize(matrix.device)
    begin = time.perf_counter()
    matrix @ matrix
    _synchronize(matrix.device)
    return time.perf_counter() - begin


class OperationCounter(contextlib.AbstractContextManager["OperationCounter"]):
    """Adds up the operations of the matrix products inside its block.

    Softmax attention counts as its two products of whole matrices, whichever kernel computes it
    and whatever that pads or leaves out. (torch's own ``FlopCounterMode`` cannot follow modules
    that return parameters without a gradient, and skips attention on the CPU.)

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._in_attention = False
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> OperationCounter:
        self._modes.enter_context(_Products(self))
        self._modes.enter_context(_Attention(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()

    def add(self, num_operations: int) -> None:
        """Add what an operator outside attention does; inside it nothing counts twice."""
        if not self._in_attention:
            self.total += num_operations

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Leave the products of a block out: :meth:`add` has told of them as a whole."""
        self._in_attention = True
        try:
            yield
        finally:
            self._in_attention = False


class _Attention(TorchFunctionMode):
    """Counts calls of ``scaled_dot_product_attention``."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **options)
        query, key, value = (*args, *(options[name] for name in _QKV[len(args) :]))[:3]
        with self._counter.attention():
            output = func(*args, **options)
        # [..., T, S] scores of K numbers each, then [..., T, V] sums of S numbers each.
        products = output.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self._counter.add(2 * products)
        return output


class _Products(TorchDispatchMode):
    """Counts what torch has a formula for."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            # Composite operators are counted by their parts.
            with self:
                output = func.decompose(*args, **options)
            if output is not NotImplemented:
                return output
        output = func(*args, **options)
        if packet in flop_registry:
            self._counter.add(int(flop_registry[packet](*args, **options, out_val=output)))
        return output


def count_forward(
    objective: Objective, batch: Any, step: int, device: torch.device, precision: str
) -> Counted:
    """Count the operations of the forward pass of a batch; leaves no trace on training.

    Args:
        objective: in any mode; comes back in training mode.
        batch: of that objective, on any device.
        step: for which step.
        device: where its modules are.
        precision: of the run.
    """
    module = objective.trained_modules()
    counter = OperationCounter()
    frozen = 0
    entered = 0

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = counter.total

    def leave(*_: Any) -> None:
        nonlocal frozen
        frozen += counter.total - entered

    handles = []
    for part in _frozen_parts(module):
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    module.eval()
    try:
        with (
            isolated_random_state(0),
            torch.no_grad(),
            autocast(device, precision),
            uncompiled(),
            counter,
        ):
            output = objective.loss(move_to_device(batch, device), step)
    finally:
        for handle in handles:
            handle.remove()
        objective.set_training_mode()
    return Counted(counter.total, frozen, output.num_tokens)


class Utilization:
    """Measures ``mfu`` at log lines.

    Args:
        objective: what is trained.
        strategy: how the processes of the run share an update.
        device: where.
        precision: of the run.
        folder: the run folder; None: nothing is written (another process does).
    """

    def __init__(
        self,
        objective: Objective,
        strategy: Strategy,
        device: torch.device,
        precision: str,
        folder: Path | None,
    ) -> None:
        self._objective, self._device, self._precision = objective, device, precision
        self._strategy, self._folder = strategy, folder
        self._phase: Any = None
        self._per_token: float | None = None

    def measure(self, batch: Any, step: int, tokens_per_second: float) -> dict[str, float]:
        """Return ``mfu`` and ``flops_per_token``; nothing where no matrix product was counted.

        Args:
            batch: a micro-batch of that update, or this process's part of it; on any device.
            step: index of an update of the present phase.
            tokens_per_second: of all processes together.
        """
        peak = self._peak()
        phase = json.dumps(self._objective.batch_state())
        if self._per_token is None or phase != self._phase:
            with self._strategy.whole_weights():
                counted = count_forward(self._objective, batch, step, self._device, self._precision)
            self._per_token, self._phase = counted.per_token, phase
        if not self._per_token:
            return {}
        available = peak.flops_per_second * self._strategy.world.size
        return {
            "mfu": self._per_token * tokens_per_second / available,
            "flops_per_token": self._per_token,
        }

    def _peak(self) -> Peak:
        peak = measured_peak(self._device, self._precision, torch.get_num_threads())
        if self._per_token is None:
            logger.info("peak %.3g FLOP/s (%s)", *peak)
            if self._folder is not None:
                write_atomically(
                    self._folder / PEAK_FILE, json.dumps(peak._asdict(), indent=2) + "\n"
                )
        return peak


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules that have parameters and train none of them."""
    parameters = list(module.parameters())
    if parameters and not any(item.requires_grad for item in parameters):
        yield module
        return
    for child in module.children():
        yield from _frozen_parts(child)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
