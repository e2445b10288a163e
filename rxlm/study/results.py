"""The rows of a study on disk: ``results.jsonl`` with raw samples, and tidy tables made of it.

A line is one measurement. ``key`` names the point that it is part of, a hash of everything that
decides it: a study that was killed, or is asked for more, measures only what has no line yet. What
could not be measured has a line as well: ``outcome`` is ``ok``, ``oom``, ``time_budget`` or
``failed``, and ``reason`` says more. No torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import UserError
from rxlm.storage.files import write_bytes

Row = dict[str, Any]
RESULTS_FILE = "results.jsonl"
OK, OOM, TIME_BUDGET, FAILED = "ok", "oom", "time_budget", "failed"
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    # kind -> file under results/, what tells its rows apart
    "gate": ("gates", ("attention", "gate")),
    "efficiency": ("efficiency", ("attention", "seq_len", "phase")),
    "prefill": ("prefill", ("attention", "seq_len")),
    "decode": ("decode", ("attention", "seq_len")),
    "op": ("operator", ("attention", "seq_len", "phase")),
    "memory": ("memory", ("attention", "seq_len")),
    "scaling": ("scaling", ("attention", "target_params")),
    "profile": ("profile", ("attention", "seq_len")),
    "task": ("tasks", ("attention", "task", "size", "seed", "learning_rate")),
    "ppl": ("ppl", ("attention", "seed")),
}
TASK_FILES = {"copy": "copy", "mqar": "assoc"}
"""Tasks that have a file of their own, by the playbook's names."""
FIRST_COLUMNS: dict[str, tuple[str, ...]] = {
    "efficiency": ("attention", "seq_len", "hidden_size", "num_params", "step_time_ms",
                   "step_std_ms", "throughput", "memory_mb"),
    "memory": ("attention", "seq_len", "forward_mb", "backward_mb", "total_mb"),
    "copy": ("attention", "size", "accuracy", "final_loss"),
    "assoc": ("attention", "size", "accuracy", "final_loss"),
    "ppl": ("attention", "final_ppl", "best_ppl"),
    "scaling": ("attention", "num_params", "step_time_ms", "memory_mb", "throughput"),
    "profile": ("attention", "seq_len", "cuda_time_ms", "cpu_time_ms", "peak_memory_mb"),
}  # fmt: skip
"""Columns of the playbook's files, which come first; others follow."""
_NOT_IN_TABLES = frozenset({"key", "kind", "samples", "curve", "scores"})


def point_key(kind: str, values: Any) -> str:
    """Return the name of a point: a hash of what decides it."""
    text = json.dumps([kind, values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ResultStore:
    """The lines of one study. Reads what is there; adds the rows of a point at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS_FILE
        self._rows: list[Row] = []
        if self.path.is_file():
            lines = self.path.read_bytes().split(b"\n")
            whole = lines[:-1]  # a line without its end was being written when the process died
            if lines[-1]:
                write_bytes(self.path, b"".join(line + b"\n" for line in whole))
            for number, line in enumerate(whole, start=1):
                try:
                    self._rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{self.path}:{number}: is not JSON ({error}).") from error

    def has(self, key: str) -> bool:
        """Return whether a point was measured; one that the time budget left out was not."""
        return any(row["key"] == key and not row.get("pending") for row in self._rows)

    def add(self, key: str, kind: str, rows: Iterable[Row]) -> list[Row]:
        """Append the rows of a point, on disk when this returns."""
        added = [{"key": key, "kind": kind, "outcome": OK, "reason": "", **row} for row in rows]
        text = "".join(json.dumps(_finite(row)) + "\n" for row in added)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._rows += [json.loads(line) for line in text.splitlines()]
        return added

    def rows(self, kind: str | None = None, **wanted: Any) -> list[Row]:
        """Return rows in the order of their points, the last one of those that say the same."""
        latest: dict[Any, Row] = {}
        for row in self._rows:
            if kind is None or row["kind"] == kind:
                identity = (row["kind"], *(str(row.get(name)) for name in KINDS[row["kind"]][1]))
                latest[identity] = row
        items = wanted.items()
        return [row for row in latest.values() if items <= row.items() or not wanted]


def write_tables(store: ResultStore, folder: Path) -> list[Path]:
    """Write a CSV file for every kind, those of the playbook's seven names in any case."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[Row]] = {name: [] for name in FIRST_COLUMNS}
    for kind, (name, _) in KINDS.items():
        rows = store.rows(kind)
        if rows or name in FIRST_COLUMNS:
            tables[name] = rows
    for task, name in TASK_FILES.items():
        tables[name] = [row for row in store.rows("task") if row.get("task") == task]
    written = []
    for name, rows in tables.items():
        path = folder / f"{name}.csv"
        write_bytes(path, csv_text(rows, FIRST_COLUMNS.get(name, ())).encode("utf-8"))
        written.append(path)
    return written


def csv_text(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> str:
    """Return rows as CSV: the columns ``first``, then all others in the order of appearance."""
    columns = dict.fromkeys(first)
    for row in rows:
        columns |= dict.fromkeys(
            key
            for key, value in row.items()
            if key not in _NOT_IN_TABLES and not isinstance(value, list | dict)
        )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """Return ``value`` with what JSON does not know (NaN, infinities) as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
