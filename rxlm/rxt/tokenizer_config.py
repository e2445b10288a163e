"""Which token ids structure an interaction, as the model sees them.

Not here: the tokenizer (``rxlm.tokenization``), which knows how the tokens are spelled. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError

TokenId = Annotated[int, Field(ge=0)]

_CORE_FIELDS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "query_token_id",
    "answer_token_id",
)


class TokenizerConfig(Config):
    """Ids of the special tokens; the defaults are those of a tokenizer trained by this package.

    A tokenizer whose five core ids differ from the defaults has its own layout, so the other ids
    are then unset unless they are given: a guess would point at an ordinary word.
    """

    pad_token_id: TokenId = 0
    """Padding, masked everywhere."""
    unk_token_id: TokenId | None = 1
    """Text that the tokenizer cannot spell."""
    bos_token_id: TokenId = 2
    """Begin of an interaction."""
    eos_token_id: TokenId = 3
    """End of an interaction; generation stops at it."""
    mask_token_id: TokenId | None = 4
    """Masked token of the encoder's language modelling."""
    query_token_id: TokenId = 5
    """Begin of the query."""
    answer_token_id: TokenId = 6
    """Begin of the answer."""
    think_token_id: TokenId | None = 7
    """Begin of reasoning before the answer."""
    tool_call_token_id: TokenId | None = 8
    """Begin of a tool call."""
    tool_use_token_id: TokenId | None = 9
    """Begin of a tool's result, in place of a query."""
    internal_token_id: TokenId | None = 10
    """Begin of instructions that the user does not see, such as a system prompt."""

    @model_validator(mode="before")
    @classmethod
    def _leave_foreign_layouts_unset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        if all(values.get(name, fields[name].default) == fields[name].default
               for name in _CORE_FIELDS):  # fmt: skip
            return values
        optional = {name: None for name in fields if name not in _CORE_FIELDS}
        return {**optional, **values}

    @model_validator(mode="after")
    def _check_distinct(self) -> TokenizerConfig:
        owners: dict[int, str] = {}
        for name, token_id in self.ids().items():
            if token_id in owners:
                remedy = "give each its own id"
                if name not in _CORE_FIELDS:
                    remedy += f", or {name}=None if the tokenizer has no such token"
                raise ValueError(f"{owners[token_id]} and {name} are both {token_id}: {remedy}")
            owners[token_id] = name
        return self

    def ids(self) -> dict[str, int]:
        """Return the ids that are set, by field name, core ids first."""
        names = (*_CORE_FIELDS, *(name for name in type(self).model_fields))
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``UserError`` if a special token lies outside a vocabulary of ``vocab_size``."""
        problems = self.vocabulary_problems(vocab_size)
        if problems:
            raise UserError("\n".join(problems))

    def vocabulary_problems(self, vocab_size: int) -> list[str]:
        """Return one sentence per id that ``vocab_size`` tokens do not contain."""
        return [
            f"{name}={token_id} is outside the vocabulary (vocab_size={vocab_size}, ids 0 to "
            f"{vocab_size - 1}): use a vocab_size of at least {max(self.ids().values()) + 1}, or "
            "the ids of the tokenizer that the model is used with"
            for name, token_id in self.ids().items()
            if token_id >= vocab_size
        ]
