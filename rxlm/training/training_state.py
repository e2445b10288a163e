"""What a checkpoint holds beside the model, so that a resumed run continues as if never stopped.

``train/state.json`` (counters, best metric, log window, objective state, architecture),
``train/optimizer.safetensors`` and ``train/rng.safetensors`` + ``train/rng.json`` (further
processes of the run: ``rng-1`` and so on). The learning
rate and the data order are pure functions of the step, so nothing is kept of them. Never pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxlm.configuration import Config
from rxlm.errors import RunError, UserError
from rxlm.training.rng import RandomState

FOLDER = "train"
FORMAT_VERSION = 1


class Best(Config):
    """The best validation so far."""

    metric: str
    mode: str
    value: float
    step: int


class TrainingState(Config):
    """Counters of a run; a value that each step replaces."""

    step: int = 0
    """Updates made (skipped ones included)."""
    num_tokens: int = 0
    """Tokens processed."""
    seconds: float = 0.0
    """Time spent in updates, over all starts of the run."""
    num_skipped: int = 0
    """Steps skipped for a bad number, in all."""
    num_skipped_in_a_row: int = 0
    """Steps skipped immediately before this one."""
    best: Best | None = None
    validations_since_best: int = 0
    validation: dict[str, float] = Field(default_factory=dict)
    """Metrics of the last validation."""
    validation_step: int | None = None
    """Updates made at the last validation."""
    train: dict[str, float] = Field(default_factory=dict)
    """Metrics of the last log line."""
    window: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Sums since the last log line (see ``MetricWindow``)."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of update time over the whole run."""
        return self.num_tokens / max(self.seconds, 1e-9)


class Snapshot(NamedTuple):
    """Everything in ``train/``."""

    state: TrainingState
    optimizer: dict[str, Tensor]
    """Tensors named ``<parameter>/exp_avg`` and the like."""
    random_states: list[RandomState]
    """One of each process of the run."""
    objective: dict[str, Any]
    """The objective's ``state_dict()``."""
    architecture: dict[str, Any]
    """The objective's ``architecture()``: must not change on resume."""
    settings: dict[str, Any]
    """The training settings as JSON values: may change on resume."""
    trained: list[str]
    """Names of the parameters that train."""
    config_fingerprint: str
    """Hash of the resolved recipe."""


def write_snapshot(directory: Path, snapshot: Snapshot) -> None:
    """Write ``train/`` into a checkpoint folder."""
    folder = directory / FOLDER
    folder.mkdir()
    save_file(snapshot.optimizer, folder / "optimizer.safetensors")
    for rank, random_state in enumerate(snapshot.random_states):
        save_file(random_state.tensors, folder / f"{_rng_name(rank)}.safetensors")
        _write_json(folder / f"{_rng_name(rank)}.json", random_state.values)
    content = snapshot._asdict()
    for name in ("optimizer", "random_states"):
        del content[name]
    content["state"] = snapshot.state.model_dump()
    _write_json(folder / "state.json", {"format_version": FORMAT_VERSION, **content})


def read_snapshot(directory: Path) -> Snapshot:
    """Read ``train/`` from a checkpoint folder; tensors are on the CPU.

    Raises:
        RunError: when it is damaged or was written by another version.
    """
    folder = directory / FOLDER
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise RunError(
                f"{folder}: is of format {version}, this rxlm reads format {FORMAT_VERSION}. "
                "Resume with the version that wrote it, or start a new run from its weights."
            )
        random_states = [_read_random_state(folder, 0)]
        while (folder / f"{_rng_name(len(random_states))}.json").exists():
            random_states.append(_read_random_state(folder, len(random_states)))
        content["state"] = TrainingState.parse(content["state"], str(folder / "state.json"))
        optimizer = load_file(folder / "optimizer.safetensors")
        return Snapshot(optimizer=optimizer, random_states=random_states, **content)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError(_describe_damage(directory, error)) from error
    except (UserError, ValidationError) as error:
        raise RunError(_describe_damage(directory, error)) from error


def _rng_name(rank: int) -> str:
    return f"rng-{rank}" if rank else "rng"


def _read_random_state(folder: Path, rank: int) -> RandomState:
    name = _rng_name(rank)
    return RandomState(
        load_file(folder / f"{name}.safetensors"),
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")),
    )


def _describe_damage(directory: Path, error: Exception) -> str:
    return (
        f"{directory}: the checkpoint cannot be read ({type(error).__name__}: {error}). Delete "
        "this folder to resume from the one before it."
    )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
