"""Micro-batches built ahead in background threads. No torch.

Correct because a batch is a pure function of its position and of the objective's batch state; when
that state changes, what was built ahead is thrown away (:meth:`BatchLoader.restart`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BatchLoader:
    """Yields the micro-batches of a step while the next ones are being built."""

    def __init__(
        self,
        build: Callable[[int, int], Any],
        num_micro_steps: int,
        num_steps: int,
        depth: int,
        workers: int = 1,
    ) -> None:
        """Prepare to build; nothing is built before it is asked for.

        Args:
            build: ``build(step, micro_step)`` returns one micro-batch.
            num_micro_steps: micro-batches per step.
            num_steps: nothing is built for this step or later ones.
            depth: micro-batches built ahead; 0 builds in the calling thread.
            workers: threads that build them. Reading, tokenising and copying release Python's
                lock, so several do help; batches come in their order all the same.
        """
        self._build = build
        self._num_micro_steps = num_micro_steps
        self._end = num_steps * num_micro_steps
        self._depth = depth
        self._executor = ThreadPoolExecutor(workers, "batches") if depth else None
        self.seconds_waited = 0.0
        """Time in which a batch was asked for and not there: the device had nothing to do."""
        self._ahead: deque[tuple[int, Future[Any]]] = deque()

    def step_batches(self, step: int) -> Iterator[Any]:
        """Yield the micro-batches of one step. An error of the builder surfaces here."""
        first = step * self._num_micro_steps
        for position in range(first, first + self._num_micro_steps):
            begin = time.perf_counter()
            batch = self._get(position)
            self.seconds_waited += time.perf_counter() - begin
            yield batch

    def restart(self) -> None:
        """Throw away what was built ahead."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stop the thread; waits for the batch that is being built."""
        self.restart()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _get(self, position: int) -> Any:
        if self._executor is None:
            return self._build(*divmod(position, self._num_micro_steps))
        if not self._ahead or self._ahead[0][0] != position:
            self.restart()
        for ahead in range(position + len(self._ahead), position + 1 + self._depth):
            if ahead < self._end:
                micro_batch = divmod(ahead, self._num_micro_steps)
                self._ahead.append((ahead, self._executor.submit(self._build, *micro_batch)))
        return self._ahead.popleft()[1].result()
