"""From token ids back to text, at once or one id at a time, without ever cutting a character.

Both ways share one definition, so the pieces a stream returns always join to what ``decode``
returns. Not here: the vocabulary's making and storage.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass

from rxlm.errors import UserError


@dataclass(frozen=True)
class TokenTable:
    """What every id stands for.

    Attributes:
        token_bytes: UTF-8 bytes per id; ``b""`` for the special tokens, which are not text.
        spellings: the special tokens' spellings, ids 0..len-1.
        prefix_space: whether encoding put one space before every text (decoding removes it).
    """

    token_bytes: tuple[bytes, ...]
    spellings: tuple[str, ...]
    prefix_space: bool

    def __len__(self) -> int:
        return len(self.token_bytes)

    def check(self, token_id: int) -> int:
        """Return ``token_id`` as an index of the table; raise ``UserError`` when it is none."""
        index = token_id.__index__()
        if not 0 <= index < len(self.token_bytes):
            raise UserError(
                f"token id {index} is outside the vocabulary 0..{len(self.token_bytes) - 1}: "
                "these ids were made with another tokenizer."
            )
        return index

    def is_special(self, token_id: int) -> bool:
        """Return whether ``token_id`` (already checked) is a special token."""
        return token_id < len(self.spellings)


class TextStream:
    """Text from ids that arrive one by one: complete UTF-8 characters only.

    Bytes of an unfinished character are held until the next id completes them. They become U+FFFD
    only when that is certain: the next byte cannot continue them, or :meth:`flush` is called.
    """

    def __init__(self, table: TokenTable, skip_special_tokens: bool = True) -> None:
        self._table = table
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes (often a word, sometimes nothing)."""
        return self._decoder.decode(self._bytes(self._table.check(token_id)))

    def flush(self) -> str:
        """End the text: return what is still held, and be ready for a new text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = True
        return text

    def _bytes(self, index: int) -> bytes:
        """Return the bytes ``index`` adds to the text, without an encoder's prefix space."""
        table = self._table
        if table.is_special(index):
            if self._skip_special_tokens:
                return b""
            self._at_start = True  # the next section was encoded with its own prefix space
            return table.spellings[index].encode("ascii")
        piece = table.token_bytes[index]
        if self._at_start and piece:
            self._at_start = False
            if table.prefix_space and piece.startswith(b" "):
                return piece[1:]
        return piece


def decode_ids(table: TokenTable, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """Return the text of ``ids``; invalid UTF-8 becomes U+FFFD.

    The one space that encoding puts before a text is removed from the start of the result and,
    when special tokens are spelled out, after each of them.
    """
    stream = TextStream(table, skip_special_tokens)
    data = b"".join(stream._bytes(table.check(token_id)) for token_id in ids)
    return data.decode("utf-8", "replace")
