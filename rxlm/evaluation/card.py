"""The results of an evaluation on a model's card.

Not here: the card itself (:mod:`rxlm.rxt.model_card`), the report (:mod:`rxlm.evaluation.report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rxlm.evaluation.result_tables import report_tables
from rxlm.evaluation.rows import loss_of
from rxlm.evaluation.tables import markdown_table
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.model_card import write_model_card

_LARGEST_LOSS = 100.0
"""In nats; a perplexity beyond is left out."""


def write_results_card(
    model: RxTNetwork, directory: str | Path, report: Mapping[str, Any], overwrite: bool = False
) -> bool:
    """Write a card with the numbers and tables of ``report``; see :func:`write_model_card`.

    Args:
        model: what was measured.
        directory: its folder.
        report: see :func:`rxlm.evaluation.report.build_report`.
        overwrite: whether to replace a README.md that is somebody's own.
    """
    sources = [result["source"] for result in report["perplexity"] if result["source"]]
    return write_model_card(
        model,
        directory,
        report_metrics(report),
        measured_on="; ".join(dict.fromkeys(sources)),
        sections={table.title: markdown_table(table) for table in report_tables(report)},
        overwrite=overwrite,
    )


def report_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the named figures of a report: recall as shares, and answer perplexity."""
    metrics: dict[str, float] = {}
    if report["recall"] is not None:
        metrics = {figure["label"]: figure["value"] for figure in report["recall"]["summary"]}
    for result in report["perplexity"]:
        loss = loss_of(result["rows"], "memory")
        if loss is not None and loss < _LARGEST_LOSS:
            name = result["source"] or "conversations"
            metrics[f"answer perplexity: {name}"] = math.exp(loss)
    return metrics
