"""Which documents are for training and which for validation. No torch.

Not here: reading files (``rxlm.data.sources``), rows of tokens (``objectives/row_windows.py``).
"""

from __future__ import annotations

import logging
from typing import Literal

from rxlm.data.conversation_source import ConversationList, DataConfig, open_conversations
from rxlm.data.dataset_texts import is_dataset, load_dataset_texts
from rxlm.data.files import TEXT_SUFFIXES, resolve_files
from rxlm.data.sources import load_texts, render
from rxlm.errors import UserError

logger = logging.getLogger(__name__)


def open_texts(data: DataConfig, split: Literal["train", "valid"] = "train") -> list[str]:
    """Return the documents of a split of ``data.text``.

    Files with ``.train.`` in their name are validated on the ``.valid.`` files beside them, if
    there are any; otherwise every ``1 / valid_fraction``-th document is held out.

    Raises:
        UserError: for data that is missing, empty or malformed, or a single document.
    """
    if data.text is None:
        raise UserError("data.text is not set: give a file, a folder or a glob of plain text.")
    if is_dataset(data.text):
        documents = load_dataset_texts(
            data.text, split=data.text_split, field=data.text_field, limit=data.max_texts
        )
        return _held_out_or_not(documents, data, split)
    files = resolve_files(data.text, TEXT_SUFFIXES)
    training = [file for file in files if ".train." in file.name] or files
    beside = [file.with_name(file.name.replace(".train.", ".valid.")) for file in training]
    validation = [file for file in beside if file not in training and file.is_file()]
    chosen = validation if split == "valid" and validation else training
    documents = [text for file in chosen for text in load_texts(file, data.on_bad_record)]
    documents = documents[: data.max_texts]
    return documents if validation else _held_out_or_not(documents, data, split)


def _held_out_or_not(
    documents: list[str], data: DataConfig, split: Literal["train", "valid"]
) -> list[str]:
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


def open_documents(
    data: DataConfig, split: Literal["train", "valid"], dialogues: int, turns: int
) -> list[str]:
    """Return the documents that a language model reads: ``data.text``, or dialogues as text.

    Args:
        data: what to read.
        split: which part.
        dialogues: how many built-in dialogues; files are read as a whole.
        turns: of each built-in dialogue.

    Raises:
        UserError: as :func:`open_texts`.
    """
    if data.text is not None:
        return open_texts(data, split)
    source = open_conversations(data, split)
    if isinstance(source, ConversationList):
        return [render(conversation) for conversation in source.conversations]
    return [render(source.sample(position, turns)) for position in range(dialogues)]
