"""What a person sees of a run: a bar with the time left on a terminal, plain lines in a pipe.

Not here: metrics on disk (``metrics.py``). No torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

logger = logging.getLogger(__name__)


class StepClock:
    """Smoothed duration of a step, from which the time left follows.

    An exponential average with bias correction (as in Adam), so that it is right from its first
    value on. The first steps are left out: they include compilation and cold caches.
    """

    def __init__(
        self,
        num_ignored: int = 2,
        smoothing: float = 0.97,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_ignored = num_ignored
        self._smoothing = smoothing
        self._clock = clock
        self._before = clock()
        self._average = 0.0
        self._weight = 0.0

    def tick(self) -> None:
        """Note the end of a step, with whatever validation and saving came after it."""
        now = self._clock()
        duration, self._before = now - self._before, now
        if self._num_ignored > 0:
            self._num_ignored -= 1
            return
        self._average = self._smoothing * self._average + (1 - self._smoothing) * duration
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)

    def seconds_left(self, num_steps: int) -> float | None:
        """Return the expected seconds for ``num_steps`` more steps; ``None`` = not known yet."""
        return None if self._weight == 0.0 else num_steps * self._average / self._weight


class ProgressView(Protocol):
    """A way to show progress."""

    def advance(self, step: int) -> None:
        """Show that ``step`` updates are made."""

    def report(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a log line."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class TerminalProgress:
    """A rich progress bar with the latest metrics and the time left."""

    def __init__(self, name: str, step: int, num_steps: int, console: Console) -> None:
        self._clock = StepClock()
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            # Takes what is left of the line, so that a narrow terminal cuts here and nowhere else.
            TextColumn(
                "{task.fields[metrics]}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            name, total=num_steps, completed=step, metrics="", left="-:--"
        )
        self._shown: dict[str, str] = {}
        self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._clock.tick()
        left = format_duration(self._clock.seconds_left(self._num_steps - step))
        self._progress.update(self._task, completed=step, left=left)

    def report(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Show the latest line of each kind beside the bar, the loss first."""
        shown = {name: value for name, value in values.items() if name != "tokens_per_second"}
        if kind == "train":
            self._shown[kind] = format_metrics(shown, limit=1)
            self._shown["rate"] = f"{values['tokens_per_second']:,.0f} tokens/s"
        else:
            self._shown[kind] = f"{kind}: {format_metrics(shown, limit=2)}"
        order = sorted(self._shown, key=["train", "validation", "rate"].index)
        text = " | ".join(self._shown[name] for name in order)
        self._progress.update(self._task, metrics=text)

    def close(self) -> None:
        """Stop the bar, leaving its last state on the screen."""
        self._progress.stop()


class PlainProgress:
    """One log line per metrics line, for pipes and log files."""

    def __init__(self, name: str, num_steps: int) -> None:
        self._clock = StepClock()
        self._name = name
        self._num_steps = num_steps

    def advance(self, step: int) -> None:
        """Keep the time."""
        self._clock.tick()

    def report(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log one line."""
        logger.info(
            "%s %d/%d (%d%%) %s: %s, %s left",
            self._name,
            step,
            self._num_steps,
            100 * step // self._num_steps,
            kind,
            format_metrics(values),
            format_duration(self._clock.seconds_left(self._num_steps - step)),
        )

    def close(self) -> None:
        """Nothing to leave behind."""


def open_progress(name: str, step: int, num_steps: int, console: Console | None) -> ProgressView:
    """Return the bar on a terminal and plain lines otherwise.

    Args:
        name: what is trained.
        step: number of updates already made.
        num_steps: number of updates of the whole run.
        console: where the bar goes; default standard error.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        return TerminalProgress(name, step, num_steps, console)
    return PlainProgress(name, num_steps)


def format_metrics(values: Mapping[str, float], limit: int | None = None) -> str:
    """Return ``loss 1.234, lr 0.001, 1,234 tokens/s``: the first ``limit`` metrics and the rate."""
    shown = {key: value for key, value in values.items() if key not in _OWN_FORM}
    parts = [f"{name} {value:.4g}" for name, value in list(shown.items())[:limit]]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


_OWN_FORM = (
    "tokens_per_second", "seconds", "seconds_waited", "num_tokens", "num_skipped",
    "flops_per_token",
)  # fmt: skip


def format_duration(seconds: float | None) -> str:
    """Return ``1:02:03`` or ``2:03``; ``-:--`` when not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
