"""Which documents of ``data.text`` are for training and which for validation. No torch.

Not here: reading files (``rxlm.data.sources``), rows of tokens (``objectives/row_windows.py``).
"""

from __future__ import annotations

import logging
from typing import Literal

from rxlm.data.conversation_source import DataConfig
from rxlm.data.sources import TEXT_SUFFIXES, load_texts, resolve_files
from rxlm.errors import UserError

logger = logging.getLogger(__name__)


def open_texts(data: DataConfig, split: Literal["train", "valid"] = "train") -> list[str]:
    """Return the documents of a split of ``data.text``.

    Files with ``.train.`` in their name are validated on the ``.valid.`` files beside them, if
    there are any; otherwise every ``1 / valid_fraction``-th document is held out.

    Raises:
        UserError: for files that are missing, empty or malformed, or a single document.
    """
    if data.text is None:
        raise UserError("data.text is not set: give a file, a folder or a glob of plain text.")
    files = resolve_files(data.text, TEXT_SUFFIXES)
    training = [file for file in files if ".train." in file.name] or files
    beside = [file.with_name(file.name.replace(".train.", ".valid.")) for file in training]
    validation = [file for file in beside if file not in training and file.is_file()]
    chosen = validation if split == "valid" and validation else training
    documents = [text for file in chosen for text in load_texts(file, data.on_error)]
    if validation:
        return documents
    if len(documents) < 2:
        raise UserError(
            f"{data.text}: holds one document, so none can be held out for validation. Separate "
            "documents by blank lines, or put a '.valid.' file beside the '.train.' file."
        )
    every = max(2, round(1 / data.valid_fraction))
    # From the end, so that there is one even if there are fewer documents than that.
    held_out = set(range(len(documents) - 1, -1, -every))
    wanted = split == "valid"
    if wanted:
        logger.info("%s: %d of %d documents are held out", data.text, len(held_out), len(documents))
    return [text for index, text in enumerate(documents) if (index in held_out) == wanted]
