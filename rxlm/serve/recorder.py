"""What the service counts: turns, tokens, durations. Safe for threads; no labels, no text."""

from __future__ import annotations

import bisect
import threading
import time

from rxlm.serve.interface import Histogram

BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Seconds."""


class Durations:
    """A histogram that grows."""

    def __init__(self) -> None:
        """Begin empty."""
        self._counts, self._total = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def value(self) -> Histogram:
        """Return it as it is now."""
        return Histogram(BOUNDS, tuple(self._counts), self._total)


class Recorder:
    """All counters of a service."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.lock = threading.Lock()
        self.started = time.time()
        self.turns = self.failed = self.refused = self.cancelled = 0
        self.prompt_tokens = self.answer_tokens = 0
        self.steps = self.step_rows = 0
        self.first_token, self.turn = Durations(), Durations()
        self.commit, self.queue = Durations(), Durations()
