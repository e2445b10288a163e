"""Reading run folders: of one stage, or all stages of a pipeline. Nothing is written. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.errors import UserError
from rxlm.training.metrics import read_metrics
from rxlm.training.recipe import load_mapping
from rxlm.training.run_folder import STATUS_FILE, read_status
from rxlm.training.settings import deciding_values
from rxlm.training.watching.samples import read_samples

_SEED = "seed"


class Run(NamedTuple):
    """One run of one stage."""

    label: str
    """What a person calls it: the folder as it was given."""
    path: Path
    stage: str
    status: str
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    """The lines of ``metrics.jsonl``."""
    samples: list[dict[str, Any]]

    @property
    def recipe(self) -> dict[str, Any]:
        """The part of the configuration that decides the result, but for seeds."""
        values = {
            key: value for key, value in self.config.items() if key not in ("evaluation", "watch")
        }
        without: dict[str, Any] = _without_seeds(deciding_values(values))
        return without

    @property
    def seeds(self) -> dict[str, Any]:
        """The seeds of the configuration, by dotted path."""
        return dict(_seeds(self.config, ""))


class Target(NamedTuple):
    """A folder that was named: a run, or a pipeline with a run for each of its stages."""

    label: str
    runs: dict[str, Run]
    """By stage folder; a run alone is under the empty name."""


def read_target(path: str | Path) -> Target:
    """Read a run folder, or that of a pipeline.

    Runs without metrics (a tokenizer's) are left out of a pipeline.

    Raises:
        UserError: if the folder is none of the two, or nothing has been measured in it yet.
    """
    folder = Path(path)
    label = str(path).rstrip("/")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{label} {what}: give the folder of a run (runs/<recipes>/<stage>).")
    if (folder / STATUS_FILE).is_file():
        run = _read_run(folder, label)
        if not run.records:
            raise UserError(
                f"{label} is a run of stage '{run.stage}' without metrics (status: {run.status}): "
                "nothing has been logged yet, or the stage trains no model."
            )
        return Target(label, {"": run})
    found = [item for item in sorted(folder.iterdir()) if (item / STATUS_FILE).is_file()]
    if not found:
        raise UserError(
            f"{label} holds no run: expected {STATUS_FILE} in it (the folder of one stage), or in "
            "folders inside it (that of a pipeline)."
        )
    runs = {item.name: _read_run(item, f"{label}/{item.name}") for item in found}
    runs = {name: run for name, run in runs.items() if run.records}
    if not runs:
        raise UserError(f"{label}: none of its {len(found)} runs has logged anything yet.")
    return Target(label, runs)


def read_targets(paths: Sequence[str | Path]) -> list[Target]:
    """Read several folders that are to be looked at together.

    Raises:
        UserError: as :func:`read_target`; and if one folder is named twice, or runs of one stage
            and pipelines are mixed.
    """
    targets = [read_target(path) for path in paths]
    resolved = [Path(path).resolve() for path in paths]
    for path, known in zip(paths, resolved, strict=True):
        if resolved.count(known) > 1:
            raise UserError(f"{path} is named twice: give each run once.")
    alone = [target.label for target in targets if "" in target.runs]
    if alone and len(alone) < len(targets):
        other = next(target.label for target in targets if "" not in target.runs)
        raise UserError(
            f"{alone[0]} is a run of one stage and {other} is a pipeline: give runs of the same "
            f"stage (such as {other}/{next(iter(targets[0].runs)) or '<stage>'}), or pipelines."
        )
    return targets


def by_stage(targets: Sequence[Target]) -> dict[str, list[Run]]:
    """Return the runs of each stage that all targets have, in order.

    Raises:
        UserError: when runs are of different stages, or no stage is in all pipelines.
    """
    names = [name for name in targets[0].runs if all(name in item.runs for item in targets)]
    if not names:
        have = "; ".join(f"{item.label}: {', '.join(item.runs)}" for item in targets)
        raise UserError(f"these pipelines have no stage in common ({have}).")
    stages = {name: [item.runs[name] for item in targets] for name in names}
    for runs in stages.values():
        kinds = {run.stage: run.label for run in runs}
        if len(kinds) > 1:
            text = ", ".join(f"{label} is '{stage}'" for stage, label in kinds.items())
            raise UserError(f"runs of different stages measure different things: {text}.")
    return stages


def _read_run(folder: Path, label: str) -> Run:
    status = read_status(folder)
    assert status is not None, "there is a status file"
    metrics, config, environment = (
        folder / name for name in ("metrics.jsonl", "config.yaml", "env.json")
    )
    return Run(
        label=label,
        path=folder,
        stage=status.stage,
        status=status.status,
        config=load_mapping(config) if config.is_file() else {},
        environment=(
            json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {}
        ),
        records=read_metrics(metrics) if metrics.is_file() else [],
        samples=read_samples(folder),
    )


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(item) for key, item in value.items() if key != _SEED}
    return value


def _seeds(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return []
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        if key == _SEED:
            found.append((f"{path}{key}", item))
        else:
            found += _seeds(item, f"{path}{key}.")
    return found
