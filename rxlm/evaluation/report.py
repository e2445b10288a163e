"""An evaluation as one JSON document, and everything that is made of it.

The document holds all results, so tables, figures and pages can be made again from the file alone.
The tables are in ``result_tables``, the figures in ``figures``, the pages in ``pages``.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rxlm
from rxlm.errors import RunError, UserError
from rxlm.evaluation.curves import stage_curves
from rxlm.evaluation.figures import draw_figures
from rxlm.evaluation.pages import html_page, markdown_page
from rxlm.evaluation.perplexity import PerplexityResult
from rxlm.evaluation.recall import RecallResult
from rxlm.evaluation.recall_summary import aggregate, all_passed, summarise
from rxlm.evaluation.result_tables import report_tables
from rxlm.evaluation.tables import rich_table
from rxlm.evaluation.transcript import Line
from rxlm.rxt.reactive import ReactiveModel
from rxlm.storage.files import write_bytes

if TYPE_CHECKING:
    from rich.table import Table as RichTable

SCHEMA = "rxlm-evaluation/1"
_KEYS = (
    "schema",
    "created",
    "model",
    "environment",
    "seconds",
    "recall",
    "perplexity",
    "training",
    "transcript",
)


def build_report(
    model: ReactiveModel,
    *,
    name: str = "",
    recall: RecallResult | None = None,
    perplexity: Sequence[PerplexityResult] = (),
    training: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    transcript: Sequence[Sequence[Line]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return an evaluation as JSON-like data.

    Args:
        model: what was evaluated.
        name: what the report calls it.
        recall: the result of the recall test.
        perplexity: one result per set of conversations.
        training: by stage, in order: the lines of its ``metrics.jsonl``.
        transcript: the parts of a scripted conversation; each begins with a restart.
        samples: conversations held while training: ``step``, and ``turns`` with ``query``,
            ``expected`` and ``answer``.
    """
    seconds = sum(result.seconds for result in perplexity)
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": describe_model(model, name),
        "environment": describe_environment(),
        "seconds": seconds if recall is None else seconds + recall.seconds,
        "recall": None if recall is None else _with_summary(recall),
        "perplexity": [result.to_dict() for result in perplexity],
        "training": {stage: stage_curves(lines) for stage, lines in (training or {}).items()},
        "transcript": [[list(line) for line in part] for part in transcript],
        "samples": [dict(sample) for sample in samples],
    }


def describe_model(model: ReactiveModel, name: str = "") -> dict[str, Any]:
    """Return what identifies a model: its fingerprint and its sizes."""
    memory = model.config.memory_attention
    return {
        "name": name,
        "class": type(model).__name__,
        "fingerprint": model.fingerprint()._asdict(),
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "num_layers": memory.num_layers,
        "dim": memory.embed_dim,
        "num_slots": memory.stm_size,
        "vocab_size": model.config.decoder.vocab_size,
        "device": str(model.device),
    }


def describe_environment() -> dict[str, Any]:
    """Return what the results were measured with."""
    return {
        "rxlm": rxlm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
    }


def write_json(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the report as JSON.

    Raises:
        RunError: if the disk refuses; a file that was there is intact.
    """
    _write(Path(path), _json_bytes(report))


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the report that :func:`write_json` wrote.

    Raises:
        UserError: if the file is missing or is not such a report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}).") from None
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        raise UserError(f"{path}: expected a report of schema '{SCHEMA}', found {found!r}.")
    missing = [key for key in _KEYS if key not in report]
    if missing:
        raise UserError(f"{path}: the report lacks {', '.join(missing)}; it is incomplete.")
    return dict(report)


def write_report(report: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``report.json``, ``report.md``, ``report.html`` and ``figures/*.png``.

    The HTML page is one file that asks for nothing from outside.

    Returns:
        the files, in that order.

    Raises:
        RunError: if the disk refuses.
    """
    folder = Path(folder)
    pictures = draw_figures(report)
    files = {
        "report.json": _json_bytes(report),
        "report.md": markdown_page(report, list(pictures)).encode("utf-8"),
        "report.html": html_page(report, pictures).encode("utf-8"),
        **{f"figures/{name}.png": content for name, content in pictures.items()},
    }
    for name, content in files.items():
        _write(folder / name, content)
    return [folder / name for name in files]


def console_tables(report: Mapping[str, Any]) -> list[RichTable]:
    """Return the tables of the report for a terminal, to be printed one after the other."""
    return [rich_table(table) for table in report_tables(report)]


def _with_summary(recall: RecallResult) -> dict[str, Any]:
    summary = summarise(recall.rows)
    return {
        **recall.to_dict(),
        "cells": aggregate(recall.rows),
        "summary": summary,
        "passed": all_passed(summary),
    }


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"could not make {path.parent}: {error.strerror or error}.") from error
    write_bytes(path, content)


def _json_bytes(report: Mapping[str, Any]) -> bytes:
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode("utf-8")
