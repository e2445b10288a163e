"""Memory of one mechanism by length: what the operator needs forward and backward, and holds.

Three figures, because none tells all:

    resident     most that a fresh process holds on top of what it held before (of a CPU; it has the
                 allocator's pages and the kernels' scratch space in it, and is lost in noise when
                 small); of a GPU, what torch allocated
    counted      most bytes of tensors alive at once, by watching every operator: exact and
                 repeatable, but blind to scratch space inside a kernel
    saved        bytes that autograd keeps for the backward pass, each storage once

A measurement that does not fit is an outcome; the longest length that fits is then sought.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rxlm.evaluation.timing import extra_memory, in_fresh_process
from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.study.mechanisms import backend_of, check_mechanisms, set_backend
from rxlm.study.results import FAILED, OK, OOM, Row
from rxlm.study.settings import StudySettings

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SEARCH_STEPS = 4


class AllocationCounter(TorchDispatchMode):
    """Counts bytes of tensor storages that operators make inside its block.

    Attributes:
        held: alive now.
        peak: most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Leave out what existed before."""
        for tensor in tensors:
            self._enter(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._enter(leaf, counted=True)
        return output

    def _enter(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known:
            return
        self._known.add(identity)
        size = storage.nbytes() if counted else 0
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, identity, size)

    def _leave(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.held -= size


def saved_bytes(call: Callable[[], Any], known: Iterator[Tensor]) -> tuple[int, Any]:
    """Return the bytes that autograd keeps of a call, and the call's result.

    Args:
        call: a forward pass.
        known: tensors that exist anyway (weights, inputs), not counted.
    """
    seen = {tensor.untyped_storage()._cdata for tensor in known}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        identity = tensor.untyped_storage()._cdata
        if identity not in seen:
            seen.add(identity)
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return total, result


def peak_of(call: Callable[[], Any], known: Iterator[Tensor], device: torch.device) -> int:
    """Return the most bytes that a call needs at once on top of ``known``."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    counter = AllocationCounter()
    counter.know(known)
    with counter:
        call()
    return counter.peak


def measure_memory(
    settings: StudySettings, name: str, mixers: MixerSettings, length: int, device: torch.device
) -> Row:
    """Return the row of a mechanism at one length; it never raises for want of memory."""
    row: Row = {
        "attention": name,
        "seq_len": length,
        "batch_size": 1,
        "hidden_size": mixers.dim,
        "device": device.type,
        "dtype": settings.dtype,
    }
    fresh = _run_fresh(settings, name, mixers, length, device)
    if fresh["outcome"] == OOM:
        return {**row, **fresh, "largest_length": _largest(settings, name, mixers, length, device)}
    row |= fresh
    try:
        row |= _counted(settings, name, mixers, length, device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        row |= {"outcome": OOM, "reason": str(error).splitlines()[0]}
    return row


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _counted(
    settings: StudySettings, name: str, mixers: MixerSettings, length: int, device: torch.device
) -> Row:
    mixer, x = _operator(settings, name, mixers, length, device)
    known = [*mixer.parameters(), x]
    saved, output = saved_bytes(lambda: mixer(x)[0], iter(known))
    del output

    def forward_backward() -> None:
        mixer(x)[0].sum().backward()
        mixer.zero_grad(set_to_none=True)
        x.grad = None

    with torch.no_grad():
        forward = peak_of(lambda: mixer(x), iter(known), device)
        _, cache = mixer(x)
    total = peak_of(forward_backward, iter(known), device)
    state = sum(
        leaf.numel() * leaf.element_size() for leaf in tree_leaves(cache) if _is_tensor(leaf)
    )
    dtype = DTYPES[settings.dtype]
    return {
        "counted_forward_mb": forward / MIB,
        "counted_total_mb": total / MIB,
        "saved_mb": saved / MIB,
        "state_bytes": state,
        **backend_of(
            mixer, settings.backend, device, dtype, needs_gradient=True,
            strict=settings.strict_backend,
        )._asdict(),
    }  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _operator(
    settings: StudySettings, name: str, mixers: MixerSettings, length: int, device: torch.device
) -> tuple[torch.nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_mixer(name, mixers)
        x = torch.randn(1, length, mixers.dim)
    set_backend(mixer, settings.backend, settings.strict_backend)
    dtype = DTYPES[settings.dtype]
    return mixer.to(device, dtype), x.to(device, dtype).requires_grad_()


def _run_fresh(
    settings: StudySettings, name: str, mixers: MixerSettings, length: int, device: torch.device
) -> Row:
    values = settings.model_dump(mode="json")
    found = in_fresh_process(
        _in_process, values, name, mixers, length, str(device), preload=("torch", __name__)
    )
    if found is None:
        # The kernel ends what takes too much; nobody is left to say so.
        return {"outcome": OOM, "reason": "the process of the measurement was ended"}
    result: Row = found
    return result


def _in_process(
    values: dict[str, Any], name: str, mixers: MixerSettings, length: int, device: str
) -> Row:
    """Measure resident memory; runs in a process of its own."""
    torch.set_num_threads(1)
    settings = StudySettings(**values)
    try:
        check_mechanisms(settings.model_copy(update={"attention": (name,)}))
    except ValueError as error:
        return {"outcome": FAILED, "reason": f"{error} (resident memory is that of a new process)"}
    try:
        with torch.enable_grad():
            _operator(settings, name, mixers, 8, torch.device(device))[0].requires_grad_(False)
            small, few = _operator(settings, name, mixers, 8, torch.device(device))
            small(few)[0].sum().backward()  # loads what the first call loads
        _limit(settings)
        forward = extra_memory(
            lambda: _forward(settings, name, mixers, length, device, gradient=False), device[:4]
        )
        total = extra_memory(
            lambda: _forward(settings, name, mixers, length, device, gradient=True), device[:4]
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"outcome": OOM, "reason": str(error).splitlines()[0][:200]}
    if forward is None or total is None:
        return {"outcome": OK, "reason": "resident memory needs Linux's /proc"}
    return {
        "outcome": OK,
        "forward_mb": forward / MIB,
        "backward_mb": max(0, total - forward) / MIB,
        "total_mb": total / MIB,
    }


def _forward(
    settings: StudySettings,
    name: str,
    mixers: MixerSettings,
    length: int,
    device: str,
    *,
    gradient: bool,
) -> Callable[[], object]:
    mixer, x = _operator(settings, name, mixers, length, torch.device(device.partition(":")[0]))

    def call() -> None:
        if not gradient:
            with torch.no_grad():
                mixer(x)
            return
        mixer(x)[0].sum().backward()

    return call


def _limit(settings: StudySettings) -> None:
    """Let this process have no more than ``memory_limit_mb`` on top of what it has."""
    if settings.memory_limit_mb is None or settings.device != "cpu":
        return
    used = 0
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                used = int(line.split()[1]) * 1024
    limit = used + int(settings.memory_limit_mb * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _largest(
    settings: StudySettings, name: str, mixers: MixerSettings, too_long: int, device: torch.device
) -> int:
    """Return a length that fits, near the largest one that does, by bisection; 0 if none was
    found."""
    low, high = 0, too_long
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) // 2
        if middle <= low:
            break
        if _run_fresh(settings, name, mixers, middle, device)["outcome"] == OK:
            low = middle
        else:
            high = middle
    return low
