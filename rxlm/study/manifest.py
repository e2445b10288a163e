"""``manifest.json``: what a study is, with what it was made, when and for how long."""

from __future__ import annotations

import datetime
import platform
import sys
import time
from pathlib import Path

import torch

from rxlm.errors import UserError
from rxlm.evaluation.timing import load_average, machine_name
from rxlm.storage.files import json_bytes, read_json, write_bytes
from rxlm.study.corpus import open_corpus
from rxlm.study.settings import StudySettings
from rxlm.training.run_folder import describe_environment

MANIFEST_FILE = "manifest.json"
SCHEMA = "rxlm-study/1"


def write_manifest(
    folder: Path, settings: StudySettings, device: torch.device, begin: float, status: str
) -> None:
    """Write what the study is, with what it is made, and how long it has taken.

    Args:
        folder: of the study.
        settings: of the study.
        device: where it is measured.
        begin: when this session began, by the monotonic clock.
        status: ``running`` or ``complete``.
    """
    path = folder / MANIFEST_FILE
    before = read_json(path) if path.is_file() else {}
    environment = describe_environment(str(device), torch.get_num_threads())
    git = environment["git"]
    sessions = list(before.get("sessions", []))
    if status == "complete":
        sessions.append({
            "command": sys.argv, "seconds": round(time.monotonic() - begin, 1),
            "load_average": round(load_average(), 2),
        })  # fmt: skip
    manifest = {
        "schema": SCHEMA,
        "status": status,
        "created": before.get("created") or _now(),
        "finished": _now() if status == "complete" else None,
        "config": settings.model_dump(mode="json"),
        "git": {"sha": (git or "").removesuffix("-dirty") or None,
                "dirty": None if git is None else git.endswith("-dirty")},
        "environment": environment,
        "hardware": {"machine": machine_name(device.type), "platform": platform.platform(),
                     "cuda": torch.version.cuda, "threads": settings.threads},
        "seeds": list(settings.seeds),
        "data": open_corpus(settings.text).about()
        if "pretrain" in settings.stages else before.get("data"),
        "command": sys.argv,
        "sessions": sessions,
        "wall_seconds": round(sum(item["seconds"] for item in sessions), 1),
    }  # fmt: skip
    write_bytes(path, json_bytes(manifest))


def open_settings(folder: str | Path) -> StudySettings:
    """Return the settings of a study that is there.

    Raises:
        UserError: if the folder holds none.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no study ({MANIFEST_FILE} is missing): run one first.")
    return StudySettings.parse(read_json(path)["config"], str(path))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
