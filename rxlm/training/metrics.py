"""Metrics of a run: averages between log lines, and ``metrics.jsonl``. No torch.

``metrics.jsonl`` holds one object per line with ``kind`` (``train`` or ``validation``) and ``step``
(updates made so far). A resumed run cuts off the lines after its checkpoint, so that the file
equals that of a run that was never interrupted, except for the fields in ``TIMING_FIELDS``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import UserError
from rxlm.training.loggers import MetricLogger

logger = logging.getLogger(__name__)

TIMING_FIELDS = ("seconds", "seconds_waited", "tokens_per_second", "mfu", "flops_per_token")
"""Fields of a line that depend on the machine (or on where a run was interrupted)."""


class MetricWindow:
    """Weighted means of the steps since the last log line. Its content survives a checkpoint."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sums: dict[str, tuple[float, float]] = dict(sums or {})
        """Metric name -> (sum of value * weight, sum of weights)."""

    def add(self, metrics: Mapping[str, float], weight: float) -> None:
        """Add the metrics of one step."""
        for name, value in metrics.items():
            total, weights = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (total + value * weight, weights + weight)

    def take_means(self) -> dict[str, float]:
        """Return the means and begin a new window."""
        means = {name: total / weights for name, (total, weights) in self.sums.items()}
        self.sums = {}
        return means


class MetricSinks:
    """Writes every metrics line to ``metrics.jsonl`` and to the loggers."""

    def __init__(self, path: Path | None, loggers: Sequence[MetricLogger], after_step: int) -> None:
        """Open the sinks.

        Args:
            path: the JSONL file; lines after ``after_step`` are cut off. None: nothing is written
                (another process of the run does).
            loggers: other places that show metrics; closed together with this.
            after_step: number of updates that were made before.
        """
        self._file = None
        if path is not None:
            truncate_metrics(path, after_step)
            self._file = path.open("a", encoding="utf-8")
        self._loggers = list(loggers)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one line; numbers that JSON cannot hold (NaN, infinities) become ``null``."""
        if self._file is None:
            return
        record = {"kind": kind, "step": step, **values}
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        for place in self._loggers:
            place.write({f"{kind}/{name}": value for name, value in values.items()}, step)

    def sync(self) -> None:
        """Force everything to disk: a checkpoint relies on the lines before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        for place in self._loggers:
            place.flush()

    def close(self) -> None:
        """Close the file and the loggers."""
        if self._file is not None:
            self._file.close()
        for place in self._loggers:
            place.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl`` as mappings; an unfinished last line is left out.

    Raises:
        UserError: when the file does not exist or a line in the middle is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. A run writes it at its first log step.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    # A line is finished by its newline, so what follows the last newline is unfinished.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error}). Delete it.") from None
    return records


def truncate_metrics(path: Path, after_step: int) -> None:
    """Drop the lines after ``after_step`` updates, and an unfinished last line; atomically."""
    if not path.exists():
        return
    records = read_metrics(path)
    kept = [record for record in records if record["step"] <= after_step]
    if len(kept) < len(records):
        logger.info(
            "%s: dropped %d lines after step %d, which will be run again",
            path.name,
            len(records) - len(kept),
            after_step,
        )
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
