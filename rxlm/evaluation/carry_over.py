"""Which tokens of an answer are words that only the conversation so far could suggest.

A carry-over word occurred in an earlier turn (query or answer) but not in the present query. That
is where a memory shows: all other words can be known, or guessed, from the query. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rxlm.data.conversations import Interaction
from rxlm.tokenization import Tokenizer

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words(text: str) -> set[str]:
    """Return the words of ``text`` in lower case."""
    return {match.group().lower() for match in _WORD.finditer(text)}


def tokens_of_words(tokenizer: Tokenizer, ids: Sequence[int], wanted: Iterable[str]) -> list[bool]:
    """Return for each token whether it is part of one of the ``wanted`` words.

    Args:
        tokenizer: gives the bytes of each token.
        ids: a whole encoded text; special tokens are part of no word.
        wanted: words in lower case.
    """
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    raw = b"".join(pieces)
    spans = _byte_spans(raw, set(wanted))
    flags, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        flags.append(any(start < right and left < end for left, right in spans))
        start = end
    return flags


def carry_over_flags(
    tokenizer: Tokenizer, interactions: Sequence[Interaction], system: str | None = None
) -> list[list[bool]]:
    """Return for each turn which tokens of what the model says belong to carry-over words.

    That is the answer, with thinking before it and a tool call after it where they are there.

    Args:
        tokenizer: the one that the model reads and writes.
        interactions: a whole conversation.
        system: text that preceded it; its words count as said earlier.

    Returns:
        one list a turn, one flag per token of the encoded texts (without [A], [EOS] and the like).
    """
    earlier = words(system) if system else set()
    flags = []
    said_names = tokenizer.template.said
    for interaction in interactions:
        parts = interaction.parts()
        said = [parts[name] for name in said_names if name in parts]
        given = [text for name, text in parts.items() if name not in said_names]
        asked = set[str]().union(*map(words, given))
        told = set[str]().union(*map(words, said))
        wanted = (told & earlier) - asked
        encoded = tokenizer.encode_batch(said)
        flags.append([flag for ids in encoded for flag in tokens_of_words(tokenizer, ids, wanted)])
        earlier |= asked | told
    return flags


def _byte_spans(raw: bytes, wanted: set[str]) -> list[tuple[int, int]]:
    """Return the byte ranges of the ``wanted`` words in ``raw``."""
    text = raw.decode("utf-8")
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode("utf-8")))
    return [
        (offsets[match.start()], offsets[match.end()])
        for match in _WORD.finditer(text)
        if match.group().lower() in wanted
    ]
