"""SentencePiece unigram and BPE with byte fallback, exact for every text.

Two things a bare SentencePiece model cannot do are added: U+2581, which the library uses as its
own mark for a space, is encoded through its bytes; and ids are decoded through bytes (shared
code), so no text is lost. Not here: training (``train``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rxlm.errors import UserError
from rxlm.tokenization.backend import TokenizerDefinition

if TYPE_CHECKING:
    from types import ModuleType

SPACE_MARK = "\u2581"


def import_sentencepiece() -> ModuleType:
    """Return the library, or raise ``UserError`` saying how to get it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "this tokenizer needs the library 'sentencepiece' (pip install sentencepiece); "
            "the kind 'byte-bpe' works without it."
        ) from error
    return sentencepiece


class SentencePiece:
    """The backend around one SentencePiece model."""

    def __init__(self, model: bytes, definition: TokenizerDefinition) -> None:
        """Load and check the serialized ``model``.

        Raises:
            UserError: when the library is missing or the model is not as ``definition`` says.
        """
        library = import_sentencepiece()
        self._model = model
        try:
            self._processor: Any = library.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"sentencepiece cannot read it: {error}") from error
        self._add_prefix_space = definition.add_prefix_space
        self._byte_ids = _find_byte_ids(self._processor)
        self._vocabulary = _check_vocabulary(self._processor, definition, self._byte_ids)
        prefixed = self._vocabulary[self._processor.encode("x")[0]].startswith(b" ")
        if prefixed != definition.add_prefix_space:
            raise UserError(
                f"the model {'adds' if prefixed else 'does not add'} a prefix space, but its "
                f"configuration says add_prefix_space={definition.add_prefix_space}."
            )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self._encode(text) for text in texts]

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of every id; ``b""`` for special tokens."""
        return self._vocabulary

    def file_bytes(self) -> bytes:
        """Return the content of ``tokenizer.model``."""
        return self._model

    def canonical_bytes(self) -> bytes:
        """Return the model file, which the library writes the same way for the same training."""
        return self._model

    def _encode(self, text: str) -> list[int]:
        """Encode ``text``; space marks in it are spelled by their bytes, not read as spaces."""
        first, *others = text.split(SPACE_MARK)
        ids: list[int] = self._processor.encode(first)
        for part in others:
            ids += self._spell(SPACE_MARK.encode("utf-8"))
            ids += self._encode_continuation(part)
        return ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode text inside a text: drop the prefix space that the model would add."""
        ids: list[int] = self._processor.encode(text)
        if not ids or not self._add_prefix_space:
            return ids
        # The first token is the prefix space alone or joined with a word; keep the word's bytes.
        return self._spell(self._vocabulary[ids[0]][1:]) + ids[1:]

    def _spell(self, data: bytes) -> list[int]:
        return [self._byte_ids[byte] for byte in data]


def _find_byte_ids(processor: Any) -> list[int]:
    """Return the id of every byte; raise ``UserError`` when the model has no byte fallback."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if not all(processor.is_byte(index) for index in ids):
        raise UserError("the model has no byte fallback, so it cannot encode every text.")
    return ids


def _check_vocabulary(
    processor: Any, definition: TokenizerDefinition, byte_ids: list[int]
) -> list[bytes]:
    """Return the bytes of every id; check that the special tokens are where they should be."""
    size = processor.get_piece_size()
    spellings = list(definition.special.spellings())
    pieces = [processor.id_to_piece(index) for index in range(size)]
    special = [
        index for index in range(size) if processor.is_control(index) or processor.is_unknown(index)
    ]
    if special != list(range(len(spellings))) or pieces[: len(spellings)] != spellings:
        raise UserError(
            f"its special tokens are {[(index, pieces[index]) for index in special]}, expected "
            f"{spellings} as ids 0..{len(spellings) - 1}."
        )
    vocabulary = [piece.replace(SPACE_MARK, " ").encode("utf-8") for piece in pieces]
    vocabulary[: len(spellings)] = [b""] * len(spellings)
    for byte, index in enumerate(byte_ids):
        vocabulary[index] = bytes([byte])
    return vocabulary
