"""Model cards: README.md files with a YAML head, as the Hugging Face Hub reads them.

A card that rxlm wrote ends in a seal, the digest of what stands above it. A README.md without a
seal, or that was edited since, is somebody's own: it is never replaced without being asked. Not
here: what a card says of a model (beside each architecture).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rxlm.errors import RunError, UserError
from rxlm.storage.files import write_bytes
from rxlm.storage.model_folder import CARD_FILE

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]
"""Measured numbers by name, for example ``{"recall at distance 8": 0.97}``."""

_SEAL = re.compile(r"\n<!-- rxlm card ([0-9a-f]{64}) -->\n\Z")


def front_matter(
    *,
    name: str,
    tags: Sequence[str],
    pipeline_tag: str | None = "text-generation",
    metrics: Metrics | None = None,
    measured_on: str = "",
) -> str:
    """Return the YAML head of a card.

    Args:
        name: what the card calls the model.
        tags: for the Hub's search.
        pipeline_tag: the task; None: none.
        metrics: go into ``model-index``, where the Hub looks for results.
        measured_on: what data they were measured on.

    Raises:
        UserError: if a metric is no finite number.
    """
    import yaml

    values: dict[str, Any] = {"library_name": "rxlm"}
    if pipeline_tag is not None:
        values["pipeline_tag"] = pipeline_tag
    values["tags"] = list(tags)
    numbers = checked_metrics(metrics or {})
    if numbers:
        result = {
            "task": {"type": pipeline_tag or "other"},
            "dataset": {"type": "dialogues", "name": measured_on or "not stated"},
            "metrics": [
                {"type": _slug(label), "name": label, "value": value}
                for label, value in numbers.items()
            ],
        }
        values["model-index"] = [{"name": name, "results": [result]}]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def checked_metrics(metrics: Metrics) -> dict[str, float]:
    """Return ``metrics`` as plain numbers.

    Raises:
        UserError: if one is no finite number (YAML and JSON have no NaN).
    """
    numbers = {}
    for label, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or number in (float("inf"), float("-inf")):
            raise UserError(
                f"metric '{label}' is {value!r}: a card takes finite numbers only; leave it out."
            )
        numbers[str(label)] = number
    return numbers


def metrics_table(metrics: Metrics, measured_on: str = "") -> str:
    """Return ``metrics`` as Markdown; '' if there are none."""
    if not metrics:
        return ""
    rows = [
        f"| {_cell(label)} | {value:.6g} |" for label, value in checked_metrics(metrics).items()
    ]
    of = f"Measured on: {measured_on}\n\n" if measured_on else ""
    return of + "\n".join(["| measured | |", "|---|---:|", *rows, ""])


def sealed(card: str) -> str:
    """Return ``card`` with its seal."""
    text = card.rstrip("\n")
    return f"{text}\n\n<!-- rxlm card {_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Return whether rxlm wrote ``card`` and nobody has changed it since."""
    seal = _SEAL.search(card)
    return seal is not None and _digest(card[: seal.start()].rstrip("\n")) == seal[1]


def write_card(directory: str | Path, card: str, *, overwrite: bool = False) -> bool:
    """Write ``card`` as README.md and return whether it is there.

    Args:
        directory: an existing folder.
        card: the text, without a seal. A file that holds it already is not touched.
        overwrite: whether to replace a README.md that is somebody's own, too.

    Raises:
        RunError: if the disk refuses.
    """
    path = Path(directory, CARD_FILE)
    content = sealed(card).encode("utf-8")
    if path.exists():
        try:
            there = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error}.") from error
        if there == content:
            return True
        if not overwrite and not is_untouched(there.decode("utf-8", errors="replace")):
            logger.warning(
                "%s was written or edited by somebody: kept, without what is known of the model "
                "now. Delete it to get a new card.",
                path,
            )
            return False
    write_bytes(path, content)
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") or "metric"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
