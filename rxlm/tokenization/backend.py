"""What a tokenizer's backend must offer: encoding, a vocabulary, files. Two exist beside this file.

Not here: special tokens, decoding, streaming and storage, which are the same for both.
"""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from rxlm.configuration import Config
from rxlm.tokenization.interaction import PLAIN_TEMPLATE, InteractionTemplate
from rxlm.tokenization.special import SpecialTokens

TokenizerKind = Literal["byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe"]


class TokenizerDefinition(Config):
    """Everything about a tokenizer except its learned vocabulary; saved beside it."""

    kind: TokenizerKind = "byte-bpe"
    """Byte-level BPE (library ``tokenizers``) or SentencePiece unigram / BPE with byte fallback."""
    add_prefix_space: bool = True
    """Put one space before every text, so that 'Oslo' is one token at the start and in the middle.
    Decoding removes exactly that space."""
    split_digits: bool = False
    """Make every digit a token of its own."""
    special: SpecialTokens = Field(default_factory=SpecialTokens)
    """Spelling of the special tokens, ids 0..10 in order."""
    template: InteractionTemplate = PLAIN_TEMPLATE
    """Which parts an interaction may have; not saved while it is the plain one."""


class Backend(Protocol):
    """One way to turn text into ids. Never yields a special id, whatever the text spells."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; every text is valid Unicode without lone surrogates."""
        ...

    def vocabulary(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id; ``b""`` for special tokens."""
        ...

    def file_bytes(self) -> bytes:
        """Return the content of the vocabulary file."""
        ...

    def canonical_bytes(self) -> bytes:
        """Return what the vocabulary is, independent of how a library version writes it."""
        ...
