"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio.

All three are optional packages; whoever asks for one that is missing is told so before training.
What they show is never read back. No torch at import.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rxlm.errors import UserError
from rxlm.training.run_folder import RunFolder, write_atomically
from rxlm.training.settings import LoggerName, TrainSettings

logger = logging.getLogger(__name__)

TRACKER_FILE = "trackers.json"
"""In the run folder: under which id a tracker knows the run, so that a resumed run goes on."""
DEFAULT_PROJECT = "rxlm"

_INSTALL: dict[LoggerName, str] = {
    "tensorboard": "tensorboard",
    "wandb": "'reactive-lm[track]'",
    "trackio": "'reactive-lm[track]'",
}


class MetricLogger(Protocol):
    """One place that shows metrics."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Show values, named ``train/loss`` and the like, after ``step`` updates."""

    def flush(self) -> None:
        """Hand over what is held back."""

    def close(self) -> None:
        """Finish."""


def check_loggers(settings: TrainSettings) -> None:
    """Raise ``UserError`` if a logger that is asked for is not installed.

    TensorBoard, on by default, is only left out (and that is said when the run begins).
    """
    for name in settings.loggers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.loggers asks for {name}, which is not installed: pip install "
                f"{_INSTALL[name]}, or take {name} out of train.loggers (and its project)."
            )


def open_loggers(settings: TrainSettings, run: RunFolder, after_step: int) -> list[MetricLogger]:
    """Return the loggers of a run.

    Args:
        settings: which ones.
        run: its folder; trackers know the run by the folder's name and an id stored in it.
        after_step: updates made before; later events of TensorBoard are superseded.

    Raises:
        UserError: as :func:`check_loggers`.
    """
    check_loggers(settings)
    opened: list[MetricLogger] = []
    for name in settings.loggers:
        if name == "tensorboard":
            if importlib.util.find_spec(name) is None:
                logger.info("no TensorBoard events: `pip install tensorboard` to get them")
                continue
            opened.append(TensorBoardLogger(run.tensorboard_path, after_step))
        elif name == "wandb":
            opened.append(WandbLogger(run, settings.wandb_project or DEFAULT_PROJECT))
        else:
            opened.append(TrackioLogger(run, settings.trackio_project or DEFAULT_PROJECT))
    return opened


class TensorBoardLogger:
    """Event files in ``tensorboard/``."""

    def __init__(self, directory: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = after_step + 1 if after_step else None
        self._writer: Any = SummaryWriter(str(directory), purge_step=purge)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add one scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run folder, no network."""

    def __init__(self, run: RunFolder, project: str) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project,
            name=run.path.name,
            id=_tracker_id(run.path, "wandb"),
            dir=str(run.path),
            resume="allow",
            config=dict(run.config),
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log one point."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioLogger:
    """A run of trackio, which is kept on this machine."""

    def __init__(self, run: RunFolder, project: str) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=project,
            name=f"{run.path.name}-{_tracker_id(run.path, 'trackio')}",
            resume="allow",
            config=dict(run.config),
        )
        self._finish = trackio.finish

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log one point."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Trackio writes by itself."""

    def close(self) -> None:
        """Finish the run."""
        self._finish()


def _tracker_id(folder: Path, tracker: str) -> str:
    """Return the id under which ``tracker`` knows the run; made at the first start."""
    path = folder / TRACKER_FILE
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if tracker not in ids:
        ids[tracker] = uuid.uuid4().hex[:8]
        write_atomically(path, json.dumps(ids, indent=2) + "\n")
    return ids[tracker]
