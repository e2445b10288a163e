"""The folder that one run of one stage writes, and the record of how far it came.

``run.json`` (status), ``config.yaml`` (the resolved recipe), ``env.json`` (what it ran on),
``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``. No torch at import.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

import rxlm
from rxlm.configuration import Config
from rxlm.errors import RunError, UserError
from rxlm.training.recipe import diff_mappings, load_mapping
from rxlm.training.settings import TrainSettings

logger = logging.getLogger(__name__)

STATUS_FILE = "run.json"
_TEMPORARY = ".tmp-"


class RunStatus(Config):
    """The content of ``run.json``."""

    stage: str
    """Which kind of stage wrote the folder."""
    status: Literal["created", "running", "interrupted", "failed", "complete", "early_stopped"]
    """``failed`` = stopped by an error; ``running`` may also mean killed."""
    step: int = 0
    """Updates made."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Last metrics, ``train/<name>`` and ``validation/<name>``."""
    seconds: float = 0.0
    """Training time of the whole run."""
    tokens_per_second: float = 0.0
    early_stop_patience: int | None = None
    """The patience that ended an ``early_stopped`` run."""
    early_stop_at: float | None = None
    """The goal that it had."""
    data: dict[str, Any] = Field(default_factory=dict)
    """By split: records read, bad records that were skipped, and the first of them by name."""

    def is_finished(self, settings: TrainSettings) -> bool:
        """Return whether nothing is left to do under ``settings``.

        A complete run goes on when it is given more steps, and an early-stopped one when it is
        given another patience or goal.
        """
        if self.status == "early_stopped":
            return (self.early_stop_patience, self.early_stop_at) == (
                settings.early_stop_patience,
                settings.early_stop_at,
            )
        return self.status == "complete" and self.step >= settings.steps


@dataclass(frozen=True)
class RunFolder:
    """A folder that belongs to one run of one stage. Create it with :meth:`open`."""

    path: Path
    stage: str
    config: Mapping[str, Any]
    """The resolved recipe, JSON-like values."""
    writes: bool = True
    """Whether this process writes; of several that share a run, one does."""

    @classmethod
    def open(
        cls, path: str | Path, stage: str, config: Mapping[str, Any], *, writes: bool = True
    ) -> RunFolder:
        """Create the folder, or take one of the same stage for resuming.

        Nothing but ``run.json`` is written: whether the recipe may continue what is there is
        decided later, by the Trainer.

        Raises:
            UserError: when the folder holds something else, or a run of another stage.
        """
        folder = cls(Path(path), stage, config, writes)
        if not writes:
            return folder
        if folder.path.exists() and not folder.path.is_dir():
            raise UserError(f"{path} is a file; give a folder for the run.")
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: the folder cannot be created ({error.strerror}).") from None
        status = folder.read_status()
        if status is None:
            foreign = sorted(item.name for item in folder.path.iterdir() if not _is_ours(item.name))
            if foreign:
                raise UserError(
                    f"{path} is not empty ({', '.join(foreign[:3])}, ...) and is not a run of "
                    "rxlm. Give a new or an empty folder."
                )
            folder.write_status(RunStatus(stage=stage, status="created"))
        elif status.stage != stage:
            raise UserError(
                f"{path} is a run of stage '{status.stage}', not '{stage}'. Give another folder."
            )
        return folder

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_path(self) -> Path:
        """Folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    def read_status(self) -> RunStatus | None:
        """Return the content of ``run.json``; ``None`` when there is none.

        Raises:
            RunError: when the file is damaged.
        """
        return read_status(self.path)

    def write_status(self, status: RunStatus) -> None:
        """Replace ``run.json`` atomically."""
        if self.writes:
            write_atomically(
                self.path / STATUS_FILE, json.dumps(status.model_dump(), indent=2) + "\n"
            )

    def write_config(self) -> None:
        """Write the resolved recipe to ``config.yaml`` and log how it differs from the last one."""
        if not self.writes:
            return
        path = self.path / "config.yaml"
        if path.exists():
            for line in diff_mappings(load_mapping(path), _json_values(self.config)):
                logger.info("changed since this run began: %s", line)
        text = yaml.safe_dump(_json_values(self.config), sort_keys=False, allow_unicode=True)
        write_atomically(
            path, f"# The resolved recipe, written by rxlm {rxlm.__version__}.\n{text}"
        )

    def write_environment(self, device: str, num_threads: int) -> None:
        """Write ``env.json`` and log how the environment differs from that of the last start."""
        if not self.writes:
            return
        path = self.path / "env.json"
        environment = describe_environment(device, num_threads)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            for line in diff_mappings(before, environment):
                logger.info("environment changed since the last start: %s", line)
        write_atomically(path, json.dumps(environment, indent=2) + "\n")


def read_status(path: str | Path) -> RunStatus | None:
    """Return the status of the run in a folder; ``None`` when the folder holds no run.

    Raises:
        RunError: when ``run.json`` is damaged.
    """
    file = Path(path, STATUS_FILE)
    if not file.exists():
        return None
    try:
        return RunStatus.parse(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (json.JSONDecodeError, UserError) as error:
        raise RunError(f"{file}: is damaged ({error}). Remove the folder to start anew.") from error


def describe_environment(device: str, num_threads: int) -> dict[str, Any]:
    """Return versions, device, threads, world size and git hash as JSON values."""
    packages = ("torch", "numpy", "safetensors", "tokenizers", "pydantic")
    return {
        "rxlm": rxlm.__version__,
        "git": _git_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "device": device,
        "num_cpus": os.cpu_count(),
        "num_threads": num_threads,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
    }


def write_atomically(path: Path, text: str) -> None:
    """Write a text file such that a kill leaves the old content or the new, never half of it."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with tuples as lists and the like, as YAML and JSON know them."""
    values: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return values


def _is_ours(name: str) -> bool:
    """Return whether a killed :func:`write_atomically` may have left this file."""
    return name == f"{_TEMPORARY}{STATUS_FILE}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_hash() -> str | None:
    """Return the commit of the source tree (``-dirty`` if changed); ``None`` outside of git."""
    source = Path(rxlm.__file__).parent
    # An installed package may lie inside some other project's repository.
    tracked = ["git", "-C", str(source), "ls-files", "--error-unmatch", "__init__.py"]
    describe = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        for command in (tracked, [*describe, "--exclude=*"]):
            result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
