"""The tokenizer: text to ids and back, exactly, with one interface for every kind.

``decode(encode(text)) == text`` for every valid Unicode text, and ``encode`` never yields a
special id: a user who types "[EOS]" has typed five characters. Not here: training (``train``),
the form of an interaction (``template``), files (``storage``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from rxlm.errors import UserError
from rxlm.tokenization.backend import Backend, TokenizerDefinition
from rxlm.tokenization.byte_bpe import ByteBPE
from rxlm.tokenization.interaction import InteractionTemplate
from rxlm.tokenization.sentencepiece_backend import SentencePiece
from rxlm.tokenization.special import NUM_SPECIAL_TOKENS, SpecialTokens
from rxlm.tokenization.storage import (
    StoredTokenizer,
    read_tokenizer,
    vocabulary_path,
    write_tokenizer,
)
from rxlm.tokenization.stream import TextStream, TokenTable, decode_ids


class Tokenizer:
    """A trained vocabulary with its special tokens. Immutable; get one by training or loading."""

    pad_id, unk_id, bos_id, eos_id, mask_id = 0, 1, 2, 3, 4
    query_id, answer_id, think_id, tool_call_id, tool_use_id, internal_id = 5, 6, 7, 8, 9, 10
    special_ids: frozenset[int] = frozenset(range(NUM_SPECIAL_TOKENS))

    def __init__(self, backend: Backend, definition: TokenizerDefinition) -> None:
        """Join a backend with the definition it was built from."""
        self.definition = definition
        self._backend = backend
        self._table = TokenTable(
            token_bytes=tuple(backend.vocabulary()),
            spellings=definition.special.spellings(),
            prefix_space=definition.add_prefix_space,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._table)

    @property
    def special(self) -> SpecialTokens:
        """Spelling of the special tokens."""
        return self.definition.special

    @property
    def template(self) -> InteractionTemplate:
        """Which parts an interaction may have, and in which order."""
        return self.definition.template

    def with_template(self, template: InteractionTemplate) -> Tokenizer:
        """Return this tokenizer with another form of an interaction; the vocabulary is shared."""
        definition = self.definition.model_copy(update={"template": template})
        return Tokenizer(self._backend, definition)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides ids; equal tokenizers have equal ones."""
        # Without defaults, so that an option added later leaves old fingerprints as they are.
        options = self.definition.model_dump(mode="json", exclude_defaults=True)
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode("utf-8") + b"\0")
        digest.update(self._backend.canonical_bytes())
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no special tokens are added or recognised.

        Raises:
            UserError: when ``text`` holds a lone surrogate, which is no Unicode character.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, as :meth:`encode` does, faster than one by one."""
        for text in texts:
            check_text(text)
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: any token ids, from one or several encoded texts.
            skip_special_tokens: leave special tokens out instead of spelling them.

        Raises:
            UserError: for an id outside the vocabulary.
        """
        return decode_ids(self._table, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of one token (part of a character, perhaps); special: ``b""``."""
        return self._table.token_bytes[self._table.check(token_id)]

    def token_text(self, token_id: int) -> str:
        r"""Return one token for people: special tokens spelled, partial bytes as ``\xe2``."""
        index = self._table.check(token_id)
        if self._table.is_special(index):
            return self._table.spellings[index]
        return self._table.token_bytes[index].decode("utf-8", "backslashreplace")

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Return a decoder for ids that arrive one by one."""
        return TextStream(self._table, skip_special_tokens)

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write the tokenizer's files into ``directory`` (made if missing).

        Raises:
            UserError: when another tokenizer is there and ``overwrite`` is false.
        """
        stored = StoredTokenizer(self.definition, self._backend.file_bytes(), self.fingerprint)
        write_tokenizer(stored, Path(directory), overwrite)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a tokenizer from ``directory``.

        Raises:
            UserError: when the files are missing, damaged, or not a tokenizer of rxlm.
        """
        stored = read_tokenizer(Path(directory))
        path = vocabulary_path(Path(directory), stored.definition)
        try:
            tokenizer = cls(build_backend(stored.definition, stored.vocabulary), stored.definition)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if tokenizer.fingerprint != stored.fingerprint:
            raise UserError(
                f"{path} and its configuration do not belong together (fingerprint "
                f"{tokenizer.fingerprint[:12]}, expected {stored.fingerprint[:12]}); copy the "
                "whole directory again from where it was saved."
            )
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and send to other processes by rebuilding.

        The libraries' own copies forget that a text may not spell a special token.
        """
        return (_rebuild, (self.definition, self._backend.file_bytes()))

    def __repr__(self) -> str:
        """Return kind, size and the start of the fingerprint."""
        kind, size = self.definition.kind, self.vocab_size
        return f"Tokenizer(kind={kind!r}, vocab_size={size}, fingerprint={self.fingerprint[:12]})"


def build_backend(definition: TokenizerDefinition, vocabulary: bytes) -> Backend:
    """Return the backend of ``definition`` for the content of its vocabulary file."""
    if definition.kind == "byte-bpe":
        return ByteBPE.from_bytes(vocabulary, definition)
    return SentencePiece(vocabulary, definition)


def _rebuild(definition: TokenizerDefinition, vocabulary: bytes) -> Tokenizer:
    return Tokenizer(build_backend(definition, vocabulary), definition)


def check_text(text: str) -> None:
    """Raise ``UserError`` when ``text`` cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate ({text[error.start]!r} at position {error.start}), "
            "which is no character; read the text with errors='replace' or repair it."
        ) from None
