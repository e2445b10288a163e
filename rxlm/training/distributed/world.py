"""The processes of one run, and the few things that they tell each other.

A run is started in several processes by ``torchrun``; without it, the world has one process and
every function here is trivial. Messages are small Python values (counts, metrics, random states);
gradients and weights travel by a strategy (:mod:`rxlm.training.distributed.strategy`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from rxlm.errors import RunError

Value = TypeVar("Value")


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    """From 0; process 0 writes files and logs."""
    size: int = 1
    """How many processes there are, over all machines."""
    local_rank: int = 0
    """Rank within this machine: the index of the process's GPU."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, in the order of their ranks; everybody gets them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the value of process 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.gather(None)


def launched_world() -> World:
    """Return the world that ``torchrun`` describes in the environment; no torch is started."""
    return World(*(int(os.environ.get(key, default)) for key, default in _VARIABLES))


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def current_world() -> World:
    """Return the world of this process: one process unless a process group is open."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return launched_world()._replace(rank=dist.get_rank(), size=dist.get_world_size())


@contextlib.contextmanager
def open_world() -> Iterator[World]:
    """Join the other processes of the run for the time of a block.

    gloo on CPUs, NCCL between GPUs. A process group that is open already is used and left open.

    Raises:
        RunError: inside the block, in place of what torch raises when another process has ended.
    """
    world = launched_world()
    if world.size == 1 or dist.is_initialized():
        yield current_world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield world
    except (dist.DistError, RuntimeError) as error:
        if not _is_lost_peer(error):
            raise
        raise RunError(
            f"process {world.rank}: another process of this run has ended, so this one stops, too. "
            "The reason is in that process's message."
        ) from error
    finally:
        dist.destroy_process_group()


def _is_lost_peer(error: Exception) -> bool:
    """Return whether an error of a collective says that its partner is gone."""
    # gloo raises plain RuntimeErrors that begin with its source file.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
