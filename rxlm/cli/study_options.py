"""The options that the verbs of ``rxlm study`` share, and how they become settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.study.settings import StudySettings

Preset = Annotated[str, typer.Option("--preset", help="smoke, cpu, gpu or paper.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the study.  [default: runs/study/PRESET]"),
]
Attn = Annotated[
    str | None,
    typer.Option("--attn", metavar="A,B", help="Mechanisms (rxlm study list shows them)."),
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", min=1, metavar="N", help="Train with seeds 0 to N - 1.")
]
Params = Annotated[
    str | None,
    typer.Option("--params", metavar="N", help="Parameters without embeddings, such as 5M."),
]
Tolerance = Annotated[
    str | None,
    typer.Option("--tolerance", "--assert-within", metavar="X", help="Such as 1%."),
]
Lengths = Annotated[
    str | None,
    typer.Option("--seq-lens", "--context", metavar="L", help="Such as 256,512 or 1k:64k."),
]
Window = Annotated[
    int | None, typer.Option("--window", min=1, help="Tokens that window attention sees.")
]
Depth = Annotated[int | None, typer.Option("--depth", min=1, help="Layers.")]
Dim = Annotated[int | None, typer.Option("--dim", min=1, help="Width, if not found by itself.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, auto.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16.")]
BackendName = Annotated[str | None, typer.Option("--backend", help="auto, torch or fla.")]
Strict = Annotated[
    bool,
    typer.Option("--strict-backend", help="A backend that cannot run is an error, not a note."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads when timing.")]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Trainings at a time, a thread each.")
]
BatchTokens = Annotated[
    int | None, typer.Option("--batch-tokens", min=1, help="Tokens of a training step.")
]
TimeBudget = Annotated[
    float | None,
    typer.Option("--time-budget", metavar="SECONDS", help="No point begins after that."),
]
MemoryLimit = Annotated[
    float | None,
    typer.Option("--memory-limit", metavar="MB", help="Most that a memory measurement may take."),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="Text to pretrain on, or 'bundled'."),
]
Tokens = Annotated[str | None, typer.Option("--tokens", help="char or bpe.")]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Updates of each training, instead of its own.")
]
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE", help="Python file that registers mechanisms, tasks."),
]
FitSlope = Annotated[
    bool,
    typer.Option("--fit-slope", help="Print slopes and crossings, too (the report has them)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line said; None is what it did not say."""

    preset: str
    out: Path | None
    changes: dict[str, Any]


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``(given: Given, ...)`` the options that all verbs share."""
    import functools
    import inspect

    shared = {
        "preset": (Preset, "cpu"), "out": (Out, None), "attn": (Attn, None),
        "params": (Params, None), "tolerance": (Tolerance, None), "seq_lens": (Lengths, None),
        "window": (Window, None), "depth": (Depth, None), "dim": (Dim, None),
        "seeds": (Seeds, None), "device": (Device, None), "dtype": (DType, None),
        "backend": (BackendName, None), "strict_backend": (Strict, False),
        "threads": (Threads, None), "processes": (Processes, None),
        "batch_tokens": (BatchTokens, None), "time_budget": (TimeBudget, None),
        "memory_limit": (MemoryLimit, None), "data": (Data, None), "tokens": (Tokens, None),
        "steps": (Steps, None), "plugin": (Plugin, None),
    }  # fmt: skip
    own = [
        item for name, item in inspect.signature(command, eval_str=True).parameters.items()
        if name != "given"
    ]  # fmt: skip
    keyword = inspect.Parameter.KEYWORD_ONLY

    @functools.wraps(command)
    def run(**values: Any) -> None:
        said = {name: values.pop(name) for name in shared}
        command(given=_given(said), **values)

    parameters = [item.replace(kind=keyword) for item in own]
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in shared.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    return run


def settings_of(given: Given, **changes: Any) -> StudySettings:
    """Return the settings of a command line.

    Raises:
        UserError: for what does not exist or does not fit.
    """
    from rxlm.study.mechanisms import load_plugins
    from rxlm.study.settings import preset

    values = {**given.changes, **changes}
    load_plugins(values.get("plugins", ()))
    text = values.pop("text", {})
    steps = values.pop("steps", None)
    found = preset(given.preset)
    tasks = values.pop("tasks", None)
    dumped = found.model_dump(mode="python")
    dumped |= values
    dumped["text"] = {**dumped["text"], **text}
    if tasks is not None:
        dumped["tasks"] = tasks
    if steps is not None:
        dumped["text"] |= {"steps": steps}
        dumped["tasks"] = {
            name: {**dict(training), "steps": steps} for name, training in dumped["tasks"].items()
        }
    return type(found).parse(dumped, f"preset {given.preset}")


def folder_of(given: Given) -> Path:
    """Return the folder of the study."""
    return given.out or Path("runs/study") / given.preset


def parse_lengths(text: str) -> tuple[int, ...]:
    """Return the numbers of ``256,512`` or ``1k:64k`` (each twice the one before).

    Raises:
        UserError: for what is no number.
    """
    found: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        begin = parse_number(first)
        end = parse_number(last) if colon else begin
        if end < begin:
            raise UserError(f"{part}: the second number is smaller than the first.")
        while begin <= end:
            found.append(begin)
            begin *= 2
    return tuple(found)


def parse_number(text: str) -> int:
    """Return a number such as ``512``, ``64k`` (times 1,024) or ``5M`` (times a million).

    Raises:
        UserError: for what is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*", text)
    if match is None or not float(match[1]) > 0:
        raise UserError(f"{text!r}: expected a number such as 512, 64k or 5M.")
    return round(float(match[1]) * {"": 1, "k": 1024, "m": 1_000_000}[match[2].lower()])


def parse_share(text: str) -> float:
    """Return ``1%`` or ``0.01`` as a share.

    Raises:
        UserError: for what is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise UserError(f"{text!r}: expected a share such as 1% or 0.01.")
    return float(match[1]) / (100.0 if match[2] else 1.0)


def _given(said: dict[str, Any]) -> Given:
    changes: dict[str, Any] = {}
    for name in ("device", "dtype", "backend", "threads", "processes", "batch_tokens",
                 "time_budget", "steps", "window", "depth", "dim"):  # fmt: skip
        if said[name] is not None:
            changes[name] = said[name]
    if said["attn"]:
        changes["attention"] = tuple(name.strip() for name in said["attn"].split(","))
    if said["params"]:
        sizes = tuple(parse_number(part) for part in said["params"].split(","))
        changes["params"] = sizes[0]
        if len(sizes) > 1:
            changes["scale_params"] = sizes
    if said["tolerance"]:
        changes["tolerance"] = parse_share(said["tolerance"])
    if said["seq_lens"]:
        lengths = parse_lengths(said["seq_lens"])
        for name in ("seq_lens", "contexts", "op_lens", "memory_lens"):
            changes[name] = lengths
    if said["seeds"]:
        changes["seeds"] = tuple(range(said["seeds"]))
    if said["strict_backend"]:
        changes["strict_backend"] = True
    if said["memory_limit"]:
        changes["memory_limit_mb"] = said["memory_limit"]
    if said["plugin"]:
        changes["plugins"] = tuple(said["plugin"])
    text = {}
    if said["data"]:
        text["data"] = None if said["data"] == "bundled" else said["data"]
    if said["tokens"]:
        text["tokens"] = said["tokens"]
    if text:
        changes["text"] = text
    return Given(said["preset"], said["out"], changes)
