"""``rxlm doctor``: what is installed, what this machine offers, and whether it works.

The report is plain data (see :func:`examine`); the table and ``--json`` are two views of it.
Problems that would stop a command end with exit status 1 and the reasons.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import rxlm
from rxlm.cli import console
from rxlm.errors import RunError

if TYPE_CHECKING:
    from rxlm.rxt.model import RxTNetwork

# Distribution name -> module that commands import. Every one of them is needed by some command.
REQUIRED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "sentencepiece": "sentencepiece",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
}
# Distribution name -> the extra that brings it ("" when torch's CUDA build does).
OPTIONAL = {
    "triton": "",
    "fla-core": "cuda",
    "deepspeed": "deepspeed",
    "pyarrow": "data",
    "datasets": "data",
    "fastapi": "serve",
    "wandb": "track",
    "trackio": "track",
}
LOW_DISK_GIB = 1.0

# What a broken installation raises on import: a missing module, a library that does not load, an
# extension built against another version.
IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError)


def register(app: typer.Typer) -> None:
    """Add ``doctor`` to the command line."""
    app.command("doctor")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check the installation, the device and a training step."""
    report = examine()
    if as_json:
        console.print_json(report)
    else:
        _print_report(report)
    if report["problems"]:
        raise RunError("\n".join(report["problems"]))


def examine(folder: Path | None = None) -> dict[str, Any]:
    """Return everything that ``rxlm doctor`` knows, as JSON-ready data.

    Args:
        folder: where runs would be written; the working folder by default.

    Returns:
        ``versions`` (name -> version or None), ``machine`` (CPUs, threads, GiB of memory and
        disk), ``device`` (found, chosen), ``linear_attention`` (chosen, backends with the reason
        for each), ``model_check`` (milliseconds of a forward and backward pass, or None) and
        ``problems`` (one message each; empty when all is well).
    """
    problems = [
        f"{name} cannot be imported: {reason}. Reinstall it: pip install --force-reinstall {name}"
        for name, reason in broken_packages(REQUIRED).items()
    ]
    report: dict[str, Any] = {
        "versions": installed_versions(),
        "machine": describe_machine(folder or Path.cwd()),
        "device": None,
        "linear_attention": None,
        "model_check": None,
        "problems": problems,
    }
    disk_free = report["machine"]["disk_free_gib"]
    if disk_free < LOW_DISK_GIB:
        problems.append(
            f"{disk_free:.2f} GiB free in {report['machine']['folder']}: a run needs at least "
            f"{LOW_DISK_GIB:.0f} GiB for its checkpoints. Free some space or use another folder."
        )
    if not any(problem.startswith("torch ") for problem in problems):
        import torch

        report["machine"]["torch_threads"] = torch.get_num_threads()
        report["device"] = find_devices()
        chosen = report["device"]["chosen"]
        report["linear_attention"] = find_linear_attention_backends(chosen)
        report["model_check"], problem = check_model(chosen)
        if problem:
            problems.append(problem)
    return report


def installed_versions() -> dict[str, str | None]:
    """Return the version of Python, of this package and of each dependency (None: absent)."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "rxlm": rxlm.__version__,
    }
    for name in (*REQUIRED, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def broken_packages(required: dict[str, str]) -> dict[str, str]:
    """Import each module of ``required`` and return distribution -> reason for those that fail."""
    broken = {}
    for name, module in required.items():
        try:
            importlib.import_module(module)
        except IMPORT_ERRORS as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return broken


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return platform, usable CPUs, memory and the free disk space of ``folder``, in GiB."""
    gib = 1024**3
    memory = _memory_bytes()
    if hasattr(os, "sched_getaffinity"):
        num_cpus = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        num_cpus = os.cpu_count() or 1
    return {
        "platform": platform.platform(),
        "cpus": num_cpus,
        "torch_threads": None,
        "memory_gib": None if memory is None else round(memory / gib, 2),
        "folder": str(folder),
        "disk_free_gib": round(shutil.disk_usage(folder).free / gib, 2),
    }


def find_devices() -> dict[str, Any]:
    """Return the devices that torch sees and the one that ``device: auto`` means."""
    import torch

    from rxlm.training.device import resolve_device

    found = [{"name": "cpu", "description": platform.processor() or platform.machine()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 1024**3
            found.append(
                {"name": f"cuda:{index}", "description": f"{device.name}, {memory:.0f} GiB"}
            )
    return {"found": found, "chosen": resolve_device("auto").type}


def find_linear_attention_backends(device: str) -> dict[str, Any]:
    """Return which implementations of linear attention work on ``device``, and why the rest not."""
    from rxlm.ops.linear_attention import select_backend

    choice = select_backend("kda", device=device)
    fla_runs = choice.name == "fla"
    return {
        "chosen": choice.name,
        "backends": [
            {"name": "torch", "available": True, "reason": "always available"},
            {"name": "fla", "available": fla_runs, "reason": choice.reason},
        ],
    }


def check_model(device: str) -> tuple[dict[str, Any] | None, str | None]:
    """Run a tiny model forward and backward on ``device``.

    Returns:
        The measurement (``device``, ``milliseconds`` per pass) and None, or None and the reason
        why it failed.
    """
    import torch

    num_passes = 5
    try:
        rng_devices = [torch.cuda.current_device()] if device == "cuda" else []
        with torch.random.fork_rng(devices=rng_devices), torch.enable_grad():
            torch.manual_seed(0)
            model = _tiny_network().to(device)
            ids = torch.randint(0, model.config.decoder.vocab_size, (4, 32), device=device)
            start = 0.0
            for index in range(num_passes + 1):
                if index == 1:  # the first pass pays for start-up
                    start = time.perf_counter()
                model.zero_grad()
                # One turn is written to memory, the next reads it: every part takes part.
                slots = model.write_memory(model.initial_memory(4), ids)
                hidden, _ = model.decoder(ids, memory=model.decoder.read_memory(slots))
                loss = model.decoder.logits(hidden).square().mean()
                loss.backward()
                value = loss.item()  # waits for the device
            milliseconds = (time.perf_counter() - start) * 1000 / num_passes
        gradients = [parameter.grad for parameter in model.parameters()]
        finite = all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    except RuntimeError as error:
        return None, f"A forward and backward pass on {device} failed: {error}"
    if not (math.isfinite(value) and finite):
        return None, (
            f"A forward and backward pass on {device} gave loss {value} with "
            f"{'finite' if finite else 'non-finite'} gradients. Update torch or the driver."
        )
    return {"device": device, "milliseconds": round(milliseconds, 2)}, None


def _tiny_network() -> RxTNetwork:
    from rxlm.rxt.model import RxTNetwork

    component = {
        "num_layers": 2,
        "vocab_size": 256,
        "embed_dim": 64,
        "ff_dim": 128,
        "att_heads": 4,
        "stm_size": 16,
        "self_att_type": "mha",
        "cross_att_type": "mha",
        "tie_embeddings": True,
    }
    memory = {"num_layers": 2, "embed_dim": 64, "att_heads": 4, "stm_size": 16, "variant": "simple"}
    return RxTNetwork({"decoder": component, "encoder": component, "memory_attention": memory})


def _memory_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # not told by this system
    limit_file = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    if limit_file.is_file():
        limit = limit_file.read_text(encoding="ascii").strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _print_report(report: dict[str, Any]) -> None:
    rows = [(name, version or _absence(name)) for name, version in report["versions"].items()]
    rows += [("", ""), *_machine_rows(report["machine"])]
    if report["device"] is not None:
        rows += _device_rows(report)
    # Plain lines, not a table: a table folds long values, and then nobody can copy a command.
    for name, value in rows:
        console.results().out(f"{name:<24}{value}".rstrip(), highlight=False)
    verdict = "problems found" if report["problems"] else "all is well"
    console.results().print(f"\n{verdict}", style="bold")


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    threads, memory = machine["torch_threads"], machine["memory_gib"]
    return [
        ("platform", machine["platform"]),
        (
            "CPUs",
            f"{machine['cpus']}" + (f" (threads used by torch: {threads})" if threads else ""),
        ),
        ("memory", "unknown" if memory is None else f"{memory:.1f} GiB"),
        ("disk free", f"{machine['disk_free_gib']:.1f} GiB in {machine['folder']}"),
    ]


def _device_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (f"device {device['name']}", device["description"]) for device in report["device"]["found"]
    ]
    rows.append(("device used", report["device"]["chosen"]))
    linear_attention, check = report["linear_attention"], report["model_check"]
    for backend in linear_attention["backends"]:
        state = "available" if backend["available"] else "not available"
        rows.append((f"linear attention {backend['name']}", f"{state} ({backend['reason']})"))
    rows.append(("linear attention used", linear_attention["chosen"]))
    if check is not None:
        speed = f"{check['milliseconds']:.1f} ms for a tiny model"
        rows.append(("forward and backward", f"works on {check['device']}, {speed}"))
    return rows


def _absence(name: str) -> str:
    extra = OPTIONAL.get(name)
    if extra:
        return f"not installed (optional: pip install 'reactive-lm[{extra}]')"
    return "not installed (optional, CUDA only)" if name in OPTIONAL else "MISSING"
