"""The form of an interaction as ids. Pure functions of a tokenizer and texts.

    query         [BOS] ([I] internal) [Q] query
    interaction   [BOS] ([I] internal) [Q] query [A] answer [EOS]
    system text   [BOS] [I] text [EOS]

Each text is encoded by itself, so a special token in it stays text and every section starts like
every other. Not here: cutting to a length, padding and loss masks (training does those), the same
form as text (``chat_format``).
"""

from __future__ import annotations

from typing import NamedTuple

from rxlm.tokenization.chat_format import OPENING_ROLE, Section, query_sections
from rxlm.tokenization.tokenizer import Tokenizer


class EncodedTurn(NamedTuple):
    """One interaction as ids.

    ``answer_start`` is the index of [A]. Everything from there on is the model's to learn: [A]
    (that an answer begins now), the answer, and [EOS] (that it ends).
    """

    ids: list[int]
    answer_start: int


def encode_query(tokenizer: Tokenizer, query: str, internal: str | None = None) -> list[int]:
    """Return ``[BOS] ([I] internal) [Q] query``, what the model is given before it answers."""
    return [tokenizer.bos_id, *_encode_sections(tokenizer, query_sections(query, internal))]


def encode_interaction(
    tokenizer: Tokenizer, query: str, answer: str, internal: str | None = None
) -> EncodedTurn:
    """Return ``[BOS] ([I] internal) [Q] query [A] answer [EOS]`` and where [A] is."""
    ids = encode_query(tokenizer, query, internal)
    answer_ids = _encode_sections(tokenizer, [Section("answer", answer)])
    return EncodedTurn([*ids, *answer_ids, tokenizer.eos_id], answer_start=len(ids))


def encode_system(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ``[BOS] [I] text [EOS]``, which sets the memory before a conversation."""
    ids = _encode_sections(tokenizer, [Section("system", text)])
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


def _encode_sections(tokenizer: Tokenizer, sections: list[Section]) -> list[int]:
    """Return each section's opening token followed by its text's ids."""
    ids: list[int] = []
    for section, encoded in zip(
        sections, tokenizer.encode_batch([section.text for section in sections]), strict=True
    ):
        ids.append(getattr(tokenizer, f"{OPENING_ROLE[section.name]}_id"))
        ids.extend(encoded)
    return ids
