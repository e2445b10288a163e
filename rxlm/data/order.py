"""In which order a data set is read: a pure function of (seed, epoch, position).

A run that resumes needs no reader state, only the position; any number of processes agree on the
order. Only the raw bits of a generator are used: numpy promises to keep those, not its shuffles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from rxlm.errors import UserError

if TYPE_CHECKING:
    import numpy


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """Return the order in which ``epoch`` reads ``size`` items: a permutation of their indices."""
    return [int(index) for index in _permutation(*_checked(seed, epoch, size))]


def locate(seed: int, position: int, size: int) -> tuple[int, int]:
    """Return (epoch, index of the item) at ``position`` of the endless reading.

    Args:
        seed: of the run, >= 0.
        position: items read before this one, over all epochs, >= 0.
        size: items in the data set, >= 1.
    """
    _checked(seed, position, size)
    epoch, offset = divmod(position, size)
    return epoch, int(_permutation(seed, epoch, size)[offset])


def sample_index(seed: int, position: int, size: int) -> int:
    """Return the index of the item at ``position`` of the endless reading (see :func:`locate`)."""
    return locate(seed, position, size)[1]


def random_offset(seed: int, position: int, count: int) -> int:
    """Return a number in ``0..count-1`` that depends on the arguments only."""
    import numpy

    seed, position, count = _checked(seed, position, count)
    # The extra word keeps it apart from the epochs' permutations.
    state = numpy.random.SeedSequence((seed, position, 1)).generate_state(1, numpy.uint64)
    return int(state[0]) % count


def block_order(seed: int, epoch: int, first: int, size: int) -> list[int]:
    """Return a permutation of ``size`` items, of the block of ``epoch`` that begins at ``first``.

    For what is read as a stream: only a block at a time can be put out of order.
    """
    import numpy

    _checked(seed, epoch, max(1, size))
    # The last word keeps it apart from the permutations of epochs and from random offsets.
    bits = numpy.random.Philox(numpy.random.SeedSequence((seed, epoch, first, 2))).random_raw(size)
    return [int(index) for index in numpy.argsort(bits, kind="stable")]


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> numpy.ndarray:
    import numpy

    bits = numpy.random.Philox(numpy.random.SeedSequence((seed, epoch))).random_raw(size)
    order = numpy.argsort(bits, kind="stable")
    order.setflags(write=False)
    return order


def _checked(seed: int, number: int, size: int) -> tuple[int, int, int]:
    if seed < 0 or number < 0:
        raise UserError(f"seed={seed}, epoch or position={number}: expected numbers >= 0.")
    if size < 1:
        raise UserError(f"size={size}: there is nothing to read; expected at least 1 item.")
    return seed, number, size
