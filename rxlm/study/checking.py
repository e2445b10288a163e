"""Whether a study folder holds what it promises: every file is there, not empty and readable."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.errors import UserError
from rxlm.evaluation.tables import FAILED, PASSED, Table
from rxlm.study.figures import CAPTIONS
from rxlm.study.manifest import MANIFEST_FILE, SCHEMA, open_settings
from rxlm.study.profiling import SPEEDSCOPE_SCHEMA
from rxlm.study.results import FIRST_COLUMNS, RESULTS_FILE
from rxlm.study.runner import MODELS_FILE
from rxlm.study.settings import Stage, StudySettings

_NEEDS: dict[str, tuple[Stage, ...]] = {
    "training_curves": ("pretrain",), "perplexity": ("pretrain",),
    "associative_recall": ("tasks",), "copy_task": ("tasks",), "efficiency": ("train",),
    "latency": ("prefill", "decode"), "complexity": ("op",), "memory": ("memory",),
    "scaling": ("scale",), "profiler_summary": ("profile",),
    "ratio_comparison": ("train", "prefill", "decode"),
}  # fmt: skip
_STAGE_OF_TABLE: dict[str, Stage] = {
    "efficiency": "train", "memory": "memory", "copy": "tasks", "assoc": "tasks",
    "ppl": "pretrain", "scaling": "scale", "profile": "profile",
}  # fmt: skip
_TASK_OF = {"copy": "copy", "assoc": "mqar", "copy_task": "copy", "associative_recall": "mqar"}


class Checked(NamedTuple):
    """A file that was promised, and what is wrong with it ("" = nothing)."""

    file: str
    problem: str
    about: str = ""


class _Wrong(Exception):
    """What is wrong with a file."""


def check_study(folder: str | Path) -> list[Checked]:
    """Return every promised file of a study with its problem, if any.

    Raises:
        UserError: if there is no study in the folder.
    """
    root = Path(folder)
    settings = open_settings(root)
    found = []
    for name, read in _promised(root, settings):
        path = root / name
        try:
            if not path.exists():
                raise _Wrong("is missing")
            if path.is_file() and path.stat().st_size == 0:
                raise _Wrong("is empty")
            found.append(Checked(name, "", read(path)))
        except _Wrong as error:
            found.append(Checked(name, str(error)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            found.append(Checked(name, f"cannot be read: {type(error).__name__}: {error}"))
    return found


def checked_table(found: list[Checked]) -> Table:
    """Return the table of files."""
    rows = [
        (item.file, FAILED if item.problem else PASSED, item.problem or item.about)
        for item in found
    ]
    return Table("Files of the study", ("file", "", "what is in it"), rows, prose=True)


def _promised(root: Path, settings: StudySettings) -> Iterator[tuple[str, Callable[[Path], str]]]:
    stages = set(settings.stages)
    yield MANIFEST_FILE, _manifest
    yield MODELS_FILE, lambda path: _json(path, "models")
    yield RESULTS_FILE, _lines
    for name, columns in FIRST_COLUMNS.items():
        stage = _STAGE_OF_TABLE[name]
        is_task = name in _TASK_OF
        wanted = stage in stages and (not is_task or _TASK_OF[name] in settings.tasks)
        yield f"results/{name}.csv", _csv(columns, 1 if wanted else 0)
    yield "results/history.json", _history("pretrain" in stages or "tasks" in stages)
    yield f"results/{MODELS_FILE}", lambda path: _json(path, "models")
    yield "results.json", lambda path: _json(path, "results")
    for name in CAPTIONS:
        drawn = set(_NEEDS[name]) & stages and (
            name not in _TASK_OF or _TASK_OF[name] in settings.tasks
        )
        if drawn and not (name == "ratio_comparison" and len(settings.attention) < 2):
            yield f"figures/{name}.png", _starts(b"\x89PNG")
            yield f"figures/{name}.pdf", _starts(b"%PDF")
    if "profile" in stages:
        for name in settings.attention:
            yield f"profiler_results/{name}_trace.json", _trace
            yield f"profiler_results/{name}_stacks.txt", _stacks
            yield f"profiler_results/{name}.speedscope.json", _speedscope
            yield f"profiler_results/{name}_table.txt", lambda path: _text(path)
        yield "profiler_results/profile_summary.csv", _csv(("attention",), 1)
    yield "tb", _tensorboard
    yield "report.md", lambda path: _text(path)
    yield "report.html", _html


def _json(path: Path, *keys: str) -> str:
    value = json.loads(path.read_bytes())
    for key in keys:
        if not value.get(key) and key != "results":
            raise _Wrong(f"holds no {key}")
    return ", ".join(keys)


def _manifest(path: Path) -> str:
    value = json.loads(path.read_bytes())
    wanted = ("config", "git", "environment", "hardware", "seeds", "command", "wall_seconds")
    missing = [key for key in wanted if key not in value]
    if value.get("schema") != SCHEMA or missing:
        raise _Wrong(f"is no manifest of {SCHEMA}, or lacks {', '.join(missing)}")
    if value["status"] != "complete":
        raise _Wrong(f"says that the study is {value['status']}: run it again to go on")
    return f"{value['status']}, {value['wall_seconds']:.0f} s"


def _lines(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if not {"key", "kind", "outcome"} <= set(row):
            raise _Wrong(f"line {number} lacks key, kind or outcome")
    return f"{len(rows)} rows"


def _csv(columns: tuple[str, ...], least: int) -> Callable[[Path], str]:
    def read(path: Path) -> str:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
            header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        missing = [column for column in columns if column not in header]
        if missing:
            raise _Wrong(f"lacks the columns {', '.join(missing)}")
        if len(rows) < least:
            raise _Wrong("has no rows")
        return f"{len(rows)} rows"

    return read


def _history(wanted: bool) -> Callable[[Path], str]:
    def read(path: Path) -> str:
        value = json.loads(path.read_bytes())
        if wanted and not value:
            raise _Wrong("holds no training")
        for name, part in value.items():
            for key in ("train_loss", "val_ppl", "grad_norm", "clip_fraction", "skipped_steps"):
                if key not in part:
                    raise _Wrong(f"{name} lacks {key}")
        return f"{len(value)} trainings"

    return read


def _starts(magic: bytes) -> Callable[[Path], str]:
    def read(path: Path) -> str:
        if not path.read_bytes().startswith(magic):
            raise _Wrong(f"does not begin with {magic!r}")
        return f"{path.stat().st_size:,} bytes"

    return read


def _text(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return f"{len(lines)} lines"


def _trace(path: Path) -> str:
    events = json.loads(path.read_bytes())["traceEvents"]
    if not any(event.get("ph") == "X" and "dur" in event for event in events):
        raise _Wrong("holds no event with a duration")
    return f"{len(events):,} events"


def _stacks(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not all(re.search(r" \d+$", line) for line in lines):
        raise _Wrong("is no list of stacks with weights")
    return f"{len(lines)} stacks"


def _speedscope(path: Path) -> str:
    return check_speedscope(json.loads(path.read_bytes()))


def check_speedscope(value: dict[str, Any]) -> str:
    """Check a file of speedscope against the rules of its schema for sampled profiles.

    Raises:
        ValueError: for what breaks them.
    """
    if value["$schema"] != SPEEDSCOPE_SCHEMA:
        raise ValueError(f"$schema is {value['$schema']!r}")
    frames = value["shared"]["frames"]
    if not frames or not all(isinstance(frame["name"], str) for frame in frames):
        raise ValueError("shared.frames: a frame has no name")
    units = ("none", "nanoseconds", "microseconds", "milliseconds", "seconds", "bytes")
    for profile in value["profiles"]:
        if profile["type"] != "sampled" or profile["unit"] not in units:
            raise ValueError(f"profile {profile['name']!r}: type or unit is unknown")
        samples, weights = profile["samples"], profile["weights"]
        if len(samples) != len(weights) or not samples:
            raise ValueError("samples and weights: not one weight a sample, or none")
        if any(not 0 <= index < len(frames) for sample in samples for index in sample):
            raise ValueError("samples: an index is of no frame")
        if profile["endValue"] - profile["startValue"] != sum(weights):
            raise ValueError("weights: they do not sum up to the span of the profile")
    return f"{len(frames)} frames"


def _tensorboard(path: Path) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(path.rglob("events.out.tfevents.*"))
    if not files:
        raise _Wrong("holds no event file")
    scalars = 0
    for file in files:
        events = EventAccumulator(str(file))
        events.Reload()
        scalars += len(events.Tags()["scalars"])
    if not scalars:
        raise _Wrong("holds no scalar")
    return f"{len(files)} event files, {scalars} scalars"


def _html(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)([^"']+)""", text)
    if outside or "@import" in text:
        raise _Wrong(f"asks for {outside[:1]} from outside")
    if "<table" not in text or "data:image/png;base64," not in text:
        raise _Wrong("holds no table, or no picture")
    return f"{len(text):,} characters, self-contained"


def require_whole(found: list[Checked], folder: str | Path) -> None:
    """Raise ``UserError`` that names every file with a problem."""
    wrong = [f"{item.file} {item.problem}" for item in found if item.problem]
    if wrong:
        raise UserError(
            f"{folder} is not a whole study:\n" + "\n".join(f"  {line}" for line in wrong)
        )
