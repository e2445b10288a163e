"""Which part of an update's batch each process computes.

The batch of an update is a function of the seed and the step, whatever the number of processes:
``train.accumulation`` micro-batches. If they can be dealt out evenly, each process builds its own
only. Otherwise each micro-batch is cut: every process builds it and keeps its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rxlm.training.distributed.world import World
from rxlm.training.objective import Objective


def num_local_micro_batches(accumulation: int, size: int) -> int:
    """Return how many micro-batches of an update each of ``size`` processes computes."""
    return accumulation if accumulation % size else accumulation // size


def local_batches(
    objective: Objective, accumulation: int, world: World
) -> Callable[[int, int], Any]:
    """Return what builds micro-batch ``index`` of this process: ``(step, index) -> batch``."""
    if world.size == 1:
        return objective.batch
    if accumulation % world.size == 0:
        return lambda step, index: objective.batch(step, index * world.size + world.rank)
    return lambda step, index: objective.shard(objective.batch(step, index), world.rank, world.size)
