"""Byte-level BPE by the ``tokenizers`` library: every byte has a token, so nothing is unknown.

The file is a plain ``tokenizer.json``: ``tokenizers`` and ``transformers`` read it and give the
same ids and texts. Not here: training (``train``), special tokens and decoding (shared).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rxlm.errors import UserError
from rxlm.tokenization.backend import TokenizerDefinition


@lru_cache(maxsize=1)
def byte_of_symbol() -> dict[str, int]:
    """Return GPT-2's map from the printable symbol that a vocabulary shows to the byte it means.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are shown as
    U+0100, U+0101, ... (a space is 'U+0120'). Source: GPT-2, ``encoder.py``, ``bytes_to_unicode``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return symbols


def byte_bpe_pipeline(
    definition: TokenizerDefinition, model: models.BPE | None = None
) -> tokenizers.Tokenizer:
    """Return a ``tokenizers`` pipeline as ``definition`` says: before training, or to compare.

    The prefix space is a ``Prepend`` normalizer, because ByteLevel's own option adds none before a
    text that begins with a space, which would make 'x' and ' x' the same.
    """
    pipeline = tokenizers.Tokenizer(model or models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if definition.split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        pipeline.pre_tokenizer = byte_level
    if definition.add_prefix_space:
        pipeline.normalizer = normalizers.Prepend(" ")
        pipeline.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    else:
        pipeline.decoder = decoders.ByteLevel()
    return pipeline


class ByteBPE:
    """The backend around one ``tokenizers`` pipeline."""

    def __init__(self, pipeline: tokenizers.Tokenizer, definition: TokenizerDefinition) -> None:
        """Check ``pipeline`` against ``definition`` and own it.

        Raises:
            UserError: when the pipeline is not the byte-level one that the definition describes.
        """
        self._state: dict[str, Any] = json.loads(pipeline.to_str())
        self._vocabulary = _check_state(self._state, definition)
        self._pipeline = pipeline
        # A text that spells a special token must not become one. This is a property of the
        # process, not of the file, so it is set here for loaded and trained pipelines alike.
        self._pipeline.encode_special_tokens = True

    @classmethod
    def from_bytes(cls, data: bytes, definition: TokenizerDefinition) -> ByteBPE:
        """Read the content of a ``tokenizer.json``; raise ``UserError`` when it cannot be used."""
        try:
            text = data.decode("utf-8")
            json.loads(text)
        except ValueError as error:
            raise UserError(f"not valid JSON ({error}); restore the file or train again.") from None
        try:
            pipeline = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for every bad file
            raise UserError(f"the tokenizers library cannot read it: {error}") from error
        return cls(pipeline, definition)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if len(texts) == 1:  # without the thread pool, which would make a later fork complain
            return [self._pipeline.encode(texts[0], add_special_tokens=False).ids]
        encodings = self._pipeline.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def vocabulary(self) -> list[bytes]:
        """Return the bytes of every id; ``b""`` for special tokens."""
        return self._vocabulary

    def file_bytes(self) -> bytes:
        """Return the content of ``tokenizer.json``."""
        return (self._pipeline.to_str(pretty=True) + "\n").encode("utf-8")

    def canonical_bytes(self) -> bytes:
        """Return vocabulary and merges, which together with the definition fix every encoding."""
        model = self._state["model"]
        merges = [item.split(" ") if isinstance(item, str) else item for item in model["merges"]]
        canonical = {"vocab": sorted(model["vocab"].items(), key=_by_id), "merges": merges}
        return json.dumps(canonical, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def _by_id(item: tuple[str, int]) -> int:
    return item[1]


def _check_state(state: dict[str, Any], definition: TokenizerDefinition) -> list[bytes]:
    """Return the bytes of every id, having checked that encoding and decoding are exact."""
    if state["model"].get("type") != "BPE":
        raise UserError(f"expected a BPE model, found {state['model'].get('type')!r}.")
    expected = json.loads(byte_bpe_pipeline(definition).to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation"):
        if state[part] != expected[part]:
            raise UserError(
                f"its {part} is not the one of a byte-level tokenizer with {definition!r}; only "
                "tokenizers trained by rxlm (rxlm tokenizer train) can be loaded."
            )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if state["model"].get(option):
            raise UserError(f"its BPE option {option} must be unset for exact encoding.")
    return _vocabulary_bytes(state, definition)


def _vocabulary_bytes(state: dict[str, Any], definition: TokenizerDefinition) -> list[bytes]:
    """Return the bytes of every id; check ids, special tokens and the byte alphabet."""
    vocab: dict[str, int] = state["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocab.items(), key=_by_id)]
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"its {len(vocab)} token ids are not 0..{len(vocab) - 1}.")
    spellings = list(definition.special.spellings())
    added = [(item["id"], item["content"], item["special"]) for item in state["added_tokens"]]
    if tokens[: len(spellings)] != spellings or added != [
        (index, spelling, True) for index, spelling in enumerate(spellings)
    ]:
        raise UserError(
            f"its special tokens are {[item[:2] for item in added]}, expected {spellings} as "
            f"ids 0..{len(spellings) - 1}."
        )
    symbols = byte_of_symbol()
    missing = [symbol for symbol in symbols if symbol not in vocab]
    if missing:
        raise UserError(f"{len(missing)} of the 256 byte symbols are missing from its vocabulary.")
    words = tokens[len(spellings) :]
    strange = [token for token in words if not all(symbol in symbols for symbol in token)]
    if strange:
        raise UserError(f"its tokens {strange[:3]} are not byte-level.")
    return [b""] * len(spellings) + [bytes(symbols[item] for item in word) for word in words]
