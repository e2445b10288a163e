"""Files that are replaced at once or not at all: bytes, JSON and tensors.

A reader never meets half a file, and after a return the content survives a power cut. Disk errors
are :class:`~rxlm.errors.RunError`, unreadable content is :class:`~rxlm.errors.UserError`. Not here:
what the files mean.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxlm.errors import RunError, UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; what is written there replaces ``path`` at the end.

    Raises:
        RunError: if the disk refuses; ``path`` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"could not write {path}: {error}. What was there before is unchanged; free some "
            "space or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make renames in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def json_bytes(value: Any) -> bytes:
    """Return readable JSON, ending in a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from a copy.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Replace ``path`` by a safetensors file; ``kind`` goes into its header."""
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt", "rxlm": kind})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is damaged or incomplete; restore it from a copy."
        ) from error


def listing(directory: Path, limit: int = 8) -> str:
    """Return the first names in ``directory``, for messages."""
    names = sorted(item.name for item in directory.iterdir())
    more = f", ... ({len(names)} entries)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"
