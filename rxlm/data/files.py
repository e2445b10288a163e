"""Which files a path stands for: a file, a folder, a glob. Not here: reading them (``records``)."""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path

from rxlm.errors import UserError

CONVERSATION_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".txt.gz", *CONVERSATION_SUFFIXES)


def resolve_files(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that ``path`` (file, folder or glob) stands for, sorted by name.

    Raises:
        UserError: if there is none, with the nearest names, or one is of an unknown type.
    """
    text = os.path.expandvars(os.path.expanduser(os.fspath(path)))
    given = Path(text)
    known = ", ".join(suffixes)
    if given.is_dir():
        files = sorted(item for item in given.iterdir() if item.name.endswith(suffixes))
        if not files:
            raise UserError(f"{given}: the folder holds no file of type {known}.")
        return files
    if given.is_file():
        files = [given]
    elif glob.has_magic(text):
        files = sorted(Path(item) for item in glob.glob(text) if os.path.isfile(item))
    else:
        files = []
    if not files:
        raise UserError(_missing_message(given, text))
    for file in files:
        if not file.name.endswith(suffixes):
            raise UserError(f"{file}: unknown type of file; expected one of {known}.")
    return files


def _missing_message(given: Path, text: str) -> str:
    if glob.has_magic(text):
        return f"{text}: no file matches; check the folder and the pattern."
    if "$" in text:
        return f"{text}: no such file; is the environment variable in its name set?"
    folder = given.parent
    if not folder.is_dir():
        return f"{text}: no such file; the folder {folder} does not exist either."
    near = difflib.get_close_matches(given.name, sorted(os.listdir(folder)), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"look into {folder}."
    return f"{text}: no such file; {hint}"
