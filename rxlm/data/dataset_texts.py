"""Texts of Hugging Face data sets: by name on the Hub, or a folder that `save_to_disk` wrote.

`hf://allenai/c4/en` is the data set `allenai/c4`, configuration `en`. It is streamed: only what is
read is downloaded. Needs the package `datasets` (`pip install 'reactive-lm[data]'`). Not here:
plain files (``sources``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rxlm.errors import UserError

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://"
_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_dataset(path: str) -> bool:
    """Return whether ``path`` names a data set of the Hub or is a folder that holds one."""
    return path.startswith(HUB_PREFIX) or any(Path(path, mark).is_file() for mark in _MARKS)


def load_dataset_texts(
    path: str, *, split: str = "train", field: str = "text", limit: int | None = None
) -> list[str]:
    """Return the texts of a split, those without any text left out.

    Args:
        path: see :func:`is_dataset`.
        split: such as ``train``.
        field: the column that holds the text.
        limit: at most so many texts, the first ones; None: all.

    Raises:
        UserError: if `datasets` is missing, the data set cannot be had (no network, no such name,
            split or column), or holds no text.
    """
    texts: list[str] = []
    for row in itertools.islice(_rows(path, split), limit):
        if field not in row:
            raise UserError(
                f"{path}: rows have no field '{field}', but {', '.join(map(str, row))}: set "
                "data.text_field to one of them."
            )
        text = row[field]
        if not isinstance(text, str):
            raise UserError(f"{path}: field '{field}' holds a {type(text).__name__}, not text.")
        if text.strip():
            texts.append(text)
    if not texts:
        raise UserError(f"{path} (split {split}): holds no text in field '{field}'.")
    logger.info("%s (split %s): %d texts", path, split, len(texts))
    return texts


def _rows(path: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs the package datasets. Install it: "
            "pip install 'reactive-lm[data]'"
        ) from error
    try:
        rows: Iterable[Any]
        if path.startswith(HUB_PREFIX):
            owner, name, *config = path.removeprefix(HUB_PREFIX).split("/")
            rows = datasets.load_dataset(f"{owner}/{name}", *config, split=split, streaming=True)
        else:
            loaded = datasets.load_from_disk(path)
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        yield from rows
    except KeyError as error:
        raise UserError(f"{path}: has no split {error}. Set data.text_split.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} (split {split}) could not be read: {type(error).__name__}: {error}. A data "
            "set of the Hub needs the network; without it, give a local file or a folder "
            "(data.text=my.jsonl, or what datasets' save_to_disk wrote)."
        ) from error
