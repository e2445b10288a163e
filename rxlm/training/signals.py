"""Stopping on request: SIGTERM or Ctrl-C ends the run at the next step boundary, after saving."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nstopping after this step, then saving (Ctrl-C again: stop at once, without saving)\n"


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a request read at step boundaries.

    A second SIGINT raises ``KeyboardInterrupt`` at once. Outside the main thread, where Python
    delivers no signals, nothing is installed and :attr:`signal` stays ``None``.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the first signal received; ``None`` = none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            # Neither logging nor print: both may hold a lock or a half-written buffer right now.
            os.write(2, _NOTICE)
