"""Synthetic tasks that tell sequence mechanisms apart, each in sizes of growing difficulty.

A row is a function of (seed, position) and nothing else. Targets say which token is right *after*
reading the one at the same place, and :data:`~rxlm.data.mqar.IGNORED` where nothing is asked: the
loss is on answers only. Pad, blank and delimiter are tokens of their own, never symbols, and what
is to be repeated stands at a random offset, so that no position gives an answer away.

    mqar            key-value pairs, then every key once (Zoology, arXiv:2312.04927)
    copy            symbols, delimiter, the same symbols (Repeat After Me, arXiv:2402.01032)
    selective-copy  symbols among blanks, delimiter, the symbols (MAD, arXiv:2403.17844)
    palindrome      symbols, delimiter, the symbols backwards (Kimi Linear, arXiv:2510.26692)
    stack           pushes to and pops from four stacks; a pop names what it takes (Kimi Linear)
    needle          one key and value in a haystack, asked at the end (RULER, arXiv:2404.06654)
    parity          bits; after each, whether the number of ones so far is odd

A new task is one decorated function (:func:`register_task`). numpy only; not here: models and
scores (``rxlm.study``).

Shapes: B rows, T tokens, N size of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rxlm.data.mqar import IGNORED, MqarRows, MqarSettings, mqar_rows
from rxlm.errors import UserError

PAD, DELIMITER, BLANK, FIRST_SYMBOL = 0, 1, 2, 3
NUM_STACKS = 4
PUSH, POP = 1, 2
NEEDLE_LENGTH = 4
"""Tokens of the value that a needle hides."""
Rows = MqarRows
"""``tokens`` and ``targets``, both int64 ``[B, T]``."""


@dataclass(frozen=True)
class SequenceTask:
    """One size of one task.

    Attributes:
        name: of the task.
        size: N, how much is to be kept in mind.
        length: T of a row.
        vocab_size: number of token ids.
        chance: share of tokens that someone gets right who knows which tokens are answers.
        row: makes one row of a generator: tokens and targets ``[T]`` each.
    """

    name: str
    size: int
    length: int
    vocab_size: int
    chance: float
    row: Callable[[np.random.Generator], tuple[NDArray[np.int64], NDArray[np.int64]]]

    def rows(self, seed: int, positions: Iterable[int]) -> Rows:
        """Return the rows at ``positions`` of the endless data set that ``seed`` names.

        Args:
            seed: >= 0.
            positions: each >= 0, in any order.
        """
        made = [self.row(_generator(seed, position)) for position in positions]
        shape = (len(made), self.length)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for index, (row, answers) in enumerate(made):
            tokens[index], targets[index] = row, answers
        return Rows(tokens, targets)


class TaskKind(NamedTuple):
    """An entry of the table: how to make a size of it, and one line about it."""

    build: Callable[[int, int], SequenceTask]
    summary: str
    sizes: tuple[int, ...]
    """Sizes that a model of two small layers can be asked for, the easy ones first."""


TASKS: dict[str, TaskKind] = {}
"""Name -> task, in the order of registration."""
ALIASES = {"ar": "mqar", "assoc": "mqar"}
"""Other names that people use."""


def register_task(
    name: str, *, summary: str, sizes: tuple[int, ...]
) -> Callable[[Callable[[int, int], SequenceTask]], Callable[[int, int], SequenceTask]]:
    """Return a decorator that enters a builder ``(size, vocab_size) -> SequenceTask``.

    Raises:
        UserError: if the name is taken.
    """

    def enter(build: Callable[[int, int], SequenceTask]) -> Callable[[int, int], SequenceTask]:
        if name in TASKS:
            raise UserError(f"a task named {name!r} exists: choose another name.")
        TASKS[name] = TaskKind(build, summary, sizes)
        return build

    return enter


def build_task(name: str, size: int, vocab_size: int) -> SequenceTask:
    """Return one size of a task.

    Args:
        name: a key of :data:`TASKS` or of :data:`ALIASES`.
        size: N, >= 1.
        vocab_size: number of token ids, special ones included.

    Raises:
        UserError: for a name that is not in the table, or sizes that do not fit.
    """
    known = ALIASES.get(name, name)
    if known not in TASKS:
        raise UserError(f"task {name!r} does not exist: use one of {', '.join(TASKS)}.")
    if size < 1:
        raise UserError(f"task {name}: size={size}, expected at least 1.")
    return TASKS[known].build(size, vocab_size)


def _generator(seed: int, position: int) -> np.random.Generator:
    if seed < 0 or position < 0:
        raise UserError(f"seed={seed}, position={position}: expected numbers >= 0.")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position))))


def _num_symbols(name: str, vocab_size: int, special: int, least: int = 2) -> int:
    if vocab_size - special < least:
        raise UserError(
            f"task {name}: vocab_size={vocab_size} leaves {vocab_size - special} symbols, "
            f"expected at least {least}: use {special + least} or more."
        )
    return vocab_size - special


@register_task("mqar", summary="multi-query associative recall", sizes=(4, 8, 16, 32, 64))
def _mqar(size: int, vocab_size: int) -> SequenceTask:
    settings = MqarSettings(size, max(16, 4 * size), vocab_size)

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # mqar_rows draws of (seed, position), so one number of the generator names a row.
        rows = mqar_rows(settings, int(generator.integers(2**31)), [0])
        return rows.tokens[0], rows.targets[0]

    # Of the values that were told: better than of all values, and open to whoever cannot recall.
    return SequenceTask("mqar", size, settings.length, vocab_size, 1.0 / size, row)


def _repeating(
    name: str, size: int, vocab_size: int, answer: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> SequenceTask:
    symbols = _num_symbols(name, vocab_size, FIRST_SYMBOL)
    length = 3 * size + 1

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        told = FIRST_SYMBOL + generator.integers(symbols, size=size)
        start = int(generator.integers(size + 1))
        tokens, targets = np.full(length, PAD), np.full(length, IGNORED)
        ask, repeated = start + size, answer(told)
        tokens[start:ask], tokens[ask] = told, DELIMITER
        tokens[ask + 1 : ask + 1 + size] = repeated
        targets[ask : ask + size] = repeated
        return tokens, targets

    return SequenceTask(name, size, length, vocab_size, 1.0 / symbols, row)


@register_task("copy", summary="repeat symbols after a delimiter", sizes=(5, 10, 20, 30, 50))
def _copy(size: int, vocab_size: int) -> SequenceTask:
    return _repeating("copy", size, vocab_size, lambda told: told)


@register_task("palindrome", summary="repeat symbols backwards", sizes=(5, 10, 20, 30, 50))
def _palindrome(size: int, vocab_size: int) -> SequenceTask:
    return _repeating("palindrome", size, vocab_size, lambda told: told[::-1])


@register_task(
    "selective-copy", summary="repeat symbols that stand among blanks", sizes=(4, 8, 16, 32)
)
def _selective_copy(size: int, vocab_size: int) -> SequenceTask:
    symbols = _num_symbols("selective-copy", vocab_size, FIRST_SYMBOL)
    context = 4 * size

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        told = FIRST_SYMBOL + generator.integers(symbols, size=size)
        places = np.sort(generator.permutation(context)[:size])
        tokens, targets = np.full(context + size, BLANK), np.full(context + size, IGNORED)
        tokens[places] = told
        tokens[context], tokens[context + 1 :] = DELIMITER, told[:-1]
        targets[context:] = told
        return tokens, targets

    return SequenceTask(
        "selective-copy", size, context + size, vocab_size, 1.0 / symbols, row
    )  # fmt: skip


@register_task("stack", summary="push to and pop from four stacks", sizes=(4, 8, 16, 32))
def _stack(size: int, vocab_size: int) -> SequenceTask:
    first = 1 + PUSH + 1 + NUM_STACKS  # pad, push and pop, then the stacks
    symbols = _num_symbols("stack", vocab_size, first)

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens, targets = np.full(6 * size, PAD), np.full(6 * size, IGNORED)
        stacks: list[list[int]] = [[] for _ in range(NUM_STACKS)]
        pushes = 0
        for place in range(0, 6 * size, 3):
            held = [number for number, stack in enumerate(stacks) if stack]
            push = pushes < size and (not held or generator.random() < 0.5)
            if push:
                number = int(generator.integers(NUM_STACKS))
                symbol = first + int(generator.integers(symbols))
                stacks[number].append(symbol)
                pushes += 1
            else:
                number = held[int(generator.integers(len(held)))]
                symbol = stacks[number].pop()
                targets[place + 1] = symbol
            tokens[place : place + 3] = PUSH if push else POP, POP + 1 + number, symbol
        return tokens, targets

    return SequenceTask("stack", size, 6 * size, vocab_size, 1.0 / symbols, row)


@register_task("needle", summary="one key and value in a haystack", sizes=(16, 32, 64, 128, 256))
def _needle(size: int, vocab_size: int) -> SequenceTask:
    symbols = _num_symbols("needle", vocab_size, FIRST_SYMBOL, least=4)
    hay = FIRST_SYMBOL + symbols // 2  # the first half is hidden, the second half is hay
    hidden = hay - FIRST_SYMBOL
    length = size + 2 * NEEDLE_LENGTH + 1

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = hay + generator.integers(vocab_size - hay, size=length)
        targets = np.full(length, IGNORED)
        value = FIRST_SYMBOL + generator.integers(hidden, size=NEEDLE_LENGTH)
        depth = int(generator.integers(size))
        tokens[depth], tokens[depth + 1 : depth + 1 + NEEDLE_LENGTH] = DELIMITER, value
        ask = length - NEEDLE_LENGTH
        tokens[ask], tokens[ask + 1 :] = DELIMITER, value[:-1]
        targets[ask:] = value
        return tokens, targets

    return SequenceTask("needle", size, length, vocab_size, 1.0 / hidden, row)


@register_task("parity", summary="whether the number of ones is odd", sizes=(8, 16, 32, 64))
def _parity(size: int, vocab_size: int) -> SequenceTask:
    _num_symbols("parity", vocab_size, 3, least=0)

    def row(generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        bits = generator.integers(2, size=size)
        return 1 + bits, 1 + bits.cumsum() % 2

    return SequenceTask("parity", size, size, vocab_size, 0.5, row)
