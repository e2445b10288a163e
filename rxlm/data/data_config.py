"""What a recipe says about its data: conversations, texts, and how they are mixed.

Opening them is in ``conversation_source`` and ``sources``.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from rxlm.configuration import Config
from rxlm.data.generator import GeneratorConfig
from rxlm.data.mixture import StoppingRule
from rxlm.data.records import MAX_RECORD_BYTES, OnBadRecord
from rxlm.errors import UserError

BUILTIN = "builtin"
AUTO = "auto"


class MixtureItem(Config):
    """One source of a mixture; what it does not say is as in ``data``."""

    text: str | None = None
    """As ``data.text``."""
    dialogues: str | None = None
    """As ``data.dialogues``, read as text; either this or ``text``."""
    weight: float = Field(gt=0)
    """Share of the rows, relative to the other sources."""
    text_split: str | None = None
    """Split of a data set; ``null``: as in ``data``."""
    text_field: str | None = None
    """Column of a data set; ``null``: as in ``data``."""

    @model_validator(mode="after")
    def _check(self) -> MixtureItem:
        if (self.text is None) == (self.dialogues is None):
            raise UserError(
                f"data.mixture: a source with text={self.text!r} and dialogues={self.dialogues!r}: "
                "give one of the two."
            )
        return self


class DialogueItem(Config):
    """One source of a mixture of conversations; what it does not say is as in ``data``."""

    dialogues: str
    """As ``data.dialogues``."""
    weight: float = Field(gt=0)
    """How often it is read, relative to the other sources."""
    valid_dialogues: str | None = None
    """As ``data.valid_dialogues``, of this source."""
    id_pattern: str | None = None
    """As ``data.id_pattern``, of this source."""

    @model_validator(mode="after")
    def _check(self) -> DialogueItem:
        _check_id_pattern(self.id_pattern, self.dialogues)
        return self


class DataConfig(Config):
    """Which conversations and texts to train on."""

    dialogues: str = BUILTIN
    """``builtin``, or a .jsonl, .jsonl.gz or .parquet file, a folder of those, or a glob."""
    valid_dialogues: str | None = None
    """Likewise for validation. ``None``: where the names in ``dialogues`` contain ``.train.``, the
    files with ``.valid.`` in its place, if they exist; else a part of ``dialogues`` is held out."""
    id_pattern: str | None = None
    """Of files, only the conversations whose ``id`` matches this regular expression from its
    beginning; ``null``: all."""
    dialogue_mixture: tuple[DialogueItem, ...] = ()
    """Several sources of conversations, read in given ratios, instead of ``dialogues``. Those that
    are read through begin anew."""
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the conversations to hold out when there is no validation file."""
    text: str | None = None
    """Plain text: .txt, .txt.gz, .jsonl or .parquet file, folder or glob; or a data set: a folder
    that `datasets` saved, or ``hf://owner/name`` or ``hf://owner/name/configuration``."""
    text_split: str = "train"
    """Split of a data set."""
    text_field: str = "text"
    """Column of a data set that holds the text."""
    max_texts: int | None = Field(default=None, gt=1)
    """At most so many texts, the first ones; ``null``: all."""
    token_cache: str | None = AUTO
    """Folder in which text is kept as tokens, made once for a content and a tokenizer, and read
    from there without being loaded; ``auto``: ``$RXLM_CACHE`` or the user's cache folder, for files
    of 256 MiB or more together; ``null``: text is held in memory."""
    streaming: bool = False
    """Whether stage ``lm`` reads ``data.text`` record by record and never holds it as a whole."""
    stream_block: int = Field(default=1024, gt=0)
    """Records of a stream that are shuffled together."""
    mixture: tuple[MixtureItem, ...] = ()
    """Several texts, read in given ratios, instead of ``text``."""
    mixture_stop: StoppingRule = "steps"
    """When a mixture ends: ``steps``: with the run, sources begin anew; ``first_exhausted``: when
    one source is read through; ``all_exhausted``: when each is. A run that would need more rows
    than that is refused before it begins."""
    on_bad_record: OnBadRecord = "fail"
    """What to do with records that cannot be used: ``fail``, or ``skip``, count and log them."""
    max_record_bytes: int = Field(default=MAX_RECORD_BYTES, gt=0)
    """Longest line or paragraph; a longer one is a record that cannot be used."""
    generator: GeneratorConfig = GeneratorConfig()
    """The built-in dialogues."""
    seed: int = Field(default=0, ge=0)
    """Of the order in which files are read."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**_with_new_names(values))

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.mixture and self.text is not None:
            raise UserError(
                f"data.text={self.text!r} and data.mixture: give one of the two (a mixture lists "
                "all its texts)."
            )
        # Not which fields were given: the recipe that a run keeps has them all.
        own = (self.valid_dialogues, self.id_pattern)
        named = self.dialogues != "builtin" or any(value is not None for value in own)
        if self.dialogue_mixture and named:
            raise UserError(
                f"data.dialogues={self.dialogues!r}, data.valid_dialogues="
                f"{self.valid_dialogues!r} or data.id_pattern={self.id_pattern!r} beside "
                "data.dialogue_mixture: a mixture lists all its sources, each with its own "
                "valid_dialogues and id_pattern; leave these out."
            )
        _check_id_pattern(self.id_pattern, self.dialogues)
        if self.streaming and self.text is None:
            raise UserError(
                "data.streaming reads data.text record by record, and data.text is not set "
                "(mixtures and dialogues are not streamed)."
            )
        return self

    def of_item(self, item: MixtureItem) -> DataConfig:
        """Return the configuration that reads one source of the mixture alone."""
        given = item.model_dump(exclude={"weight"}, exclude_none=True)
        return self.model_copy(update={"mixture": (), **given})

    def of_dialogue_item(self, item: DialogueItem) -> DataConfig:
        """Return the configuration that reads one source of the mixture of conversations alone."""
        return self.model_copy(
            update={
                "dialogue_mixture": (),
                "dialogues": item.dialogues,
                "valid_dialogues": item.valid_dialogues,
                "id_pattern": item.id_pattern,
            }
        )

    @property
    def reads_builtin(self) -> bool:
        """Whether the built-in dialogues are among the conversations."""
        items = self.dialogue_mixture
        return BUILTIN in ({item.dialogues for item in items} if items else {self.dialogues})


def _check_id_pattern(pattern: str | None, dialogues: str) -> None:
    """Refuse what is no regular expression, or has nothing to match."""
    if pattern is None:
        return
    if dialogues == BUILTIN:
        raise UserError(
            f"data.id_pattern={pattern!r} with data.dialogues={BUILTIN!r}: it chooses among the "
            "conversations of files; built-in dialogues have no ids. Leave it out."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"data.id_pattern={pattern!r}: expected a regular expression ({error})."
        ) from None


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Read ``on_error: raise`` of older recipes."""
    known = dict(values)
    if "on_error" in known and "on_bad_record" not in known:
        old = known.pop("on_error")
        known["on_bad_record"] = "fail" if old == "raise" else old
    return known
