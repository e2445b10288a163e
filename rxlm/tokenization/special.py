"""The special tokens: their roles, spelling and ids.

A special token marks structure (where a query or an answer begins); it never comes from a user's
text. The id of a role is its position in :class:`SpecialTokens`, in every tokenizer.
Not here: how they are put around texts (``template``).
"""

from __future__ import annotations

import re

from pydantic import field_validator, model_validator

from rxlm.configuration import Config

# Letters and brackets are never joined by either pre-tokenizer, so a bracketed spelling cannot be
# learned as an ordinary token; the narrow alphabet also needs no escaping in the chat template.
SPELLING = re.compile(r"\[[|/]?[A-Za-z][A-Za-z0-9_-]*\|?\]|<[|/]?[A-Za-z][A-Za-z0-9_-]*\|?>")


class SpecialTokens(Config):
    """Spelling of the special tokens; ids are 0..10 in this order."""

    pad: str = "[PAD]"
    """Fills rows of unequal length; never attended to, never a target."""
    unk: str = "[UNK]"
    """Kept for the ecosystem; our tokenizers never produce it."""
    bos: str = "[BOS]"
    """Opens an interaction."""
    eos: str = "[EOS]"
    """Ends an interaction, a system text or a document."""
    mask: str = "[MASK]"
    """Hides a token in masked language modelling."""
    query: str = "[Q]"
    """Opens the user's query."""
    answer: str = "[A]"
    """Opens the model's answer."""
    think: str = "[T]"
    """Opens a reasoning section."""
    tool_call: str = "[C]"
    """Opens a tool call."""
    tool_use: str = "[U]"
    """Opens the result of a tool."""
    internal: str = "[I]"
    """Opens internal instructions: a system text, or context for one interaction."""

    @field_validator("*")
    @classmethod
    def _check_spelling(cls, spelling: str) -> str:
        if not SPELLING.fullmatch(spelling):
            raise ValueError(
                f"special token {spelling!r} must be a word in [square] or <angle> brackets, "
                "for example '[EOS]' or '<|eos|>'"
            )
        return spelling

    @model_validator(mode="after")
    def _check_distinct(self) -> SpecialTokens:
        spellings = self.spellings()
        repeated = sorted({item for item in spellings if spellings.count(item) > 1})
        if repeated:
            raise ValueError(f"special tokens must differ from each other; repeated: {repeated}")
        return self

    def spellings(self) -> tuple[str, ...]:
        """Return every spelling in id order."""
        return tuple(getattr(self, role) for role in type(self).model_fields)

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """Return every role ('pad', 'unk', ...) in id order."""
        return tuple(cls.model_fields)


NUM_SPECIAL_TOKENS = len(SpecialTokens.model_fields)
