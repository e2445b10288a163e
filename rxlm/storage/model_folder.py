"""Finding the model that a path means, and reading its ``config.json``. No torch.

A path may be a model folder, a checkpoint, a run or its ``checkpoints`` folder (the best
checkpoint, else the newest) or a pipeline's folder (the last stage that has a model). Not here:
weights (``weights``), and what a configuration means (beside each architecture).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rxlm.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

CHECKPOINTS = "checkpoints"
COMPLETE = "COMPLETE"
_STAGE_NAME = re.compile(r"(\d+)[-_.]")


def resolve_model_dir(path: str | Path) -> Path:
    """Return the model folder that ``path`` means.

    Raises:
        UserError: if there is none; the message says what is there instead.
    """
    directory = Path(path)
    if not directory.exists():
        raise UserError(
            f"{directory} does not exist: give a model folder, a checkpoint, a run or a "
            "pipeline's folder (or hf://owner/name for a model on the Hugging Face Hub)."
        )
    if not directory.is_dir():
        raise UserError(f"{directory} is a file: give the folder that holds it.")
    found = _find_model(directory)
    if found is not None:
        return found
    raise UserError(
        f"{directory} is not a model folder ({CONFIG_FILE} and {WEIGHTS_FILE}), nor a run or a "
        f"pipeline with a complete checkpoint. It holds: {_listing(directory)}."
    )


def read_config_file(directory: str | Path) -> dict[str, Any]:
    """Return the content of ``config.json`` in ``directory``.

    Raises:
        UserError: if the file is missing, damaged, or no JSON object.
    """
    path = Path(directory, CONFIG_FILE)
    if not path.is_file():
        held = _listing(path.parent) if path.parent.is_dir() else "no such folder"
        raise UserError(f"{path.parent} is not a model folder: no {CONFIG_FILE} ({held}).")
    try:
        values: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
    return values


def architecture_of(directory: str | Path) -> str:
    """Return which class wrote the model in ``directory``; '' if its file does not tell.

    Raises:
        UserError: as :func:`read_config_file`.
    """
    return str(read_config_file(directory).get("architecture", ""))


def _find_model(directory: Path) -> Path | None:
    if (directory / CONFIG_FILE).is_file() and (directory / WEIGHTS_FILE).is_file():
        if (directory / "train").is_dir() and not (directory / COMPLETE).is_file():
            raise UserError(
                f"{directory} is an unfinished checkpoint (no {COMPLETE} file): use another "
                "checkpoint of the run, or the run's folder."
            )
        return directory
    for root in (directory / CHECKPOINTS, directory):
        found = _best_checkpoint(root)
        if found is not None:
            return found
    stages = [
        (int(match[1]), item)
        for item in directory.iterdir()
        if item.is_dir() and (match := _STAGE_NAME.match(item.name))
    ]
    for _, stage in sorted(stages, reverse=True):
        found = _find_model(stage)
        if found is not None:
            return found
    return None


def _best_checkpoint(checkpoints: Path) -> Path | None:
    """Return the best-scored complete checkpoint, of equals the older; else the newest."""
    complete = [_read_marker(marker) for marker in checkpoints.glob(f"step-*/{COMPLETE}")]
    complete = [item for item in complete if (item[2] / WEIGHTS_FILE).is_file()]
    if not complete:
        return None
    complete.sort(key=lambda item: item[0])
    scored = [item for item in complete if item[1]]
    if not scored:
        return complete[-1][2]
    # Only scores of the newest kind compare with each other.
    metric, mode = scored[-1][1]["metric"], scored[-1][1]["mode"]
    sign = 1.0 if mode == "min" else -1.0
    comparable = [item for item in scored if (item[1]["metric"], item[1]["mode"]) == (metric, mode)]
    return min(comparable, key=lambda item: (sign * item[1]["value"], item[0]))[2]


def _read_marker(marker: Path) -> tuple[int, dict[str, Any], Path]:
    """Return step, score (empty if there is none) and folder of a complete checkpoint."""
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        return int(content["step"]), content.get("score") or {}, marker.parent
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{marker} is damaged ({error!r}): give the folder of one checkpoint instead."
        ) from error


def _listing(directory: Path, limit: int = 8) -> str:
    names = sorted(item.name for item in directory.iterdir())
    more = f", ... ({len(names)} entries)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
