"""Which conversation a list of texts is: a hash for each turn that includes all turns before it.

A stateless request brings the whole conversation; by the hash of its last turn the version that
holds it is found, whoever said it, without comparing texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from rxlm.data.conversations import Interaction


def root_hash(system: str | None) -> bytes:
    """Return the hash of a conversation before its first turn."""
    return _hash(b"", [system])


def next_hash(before: bytes, interaction: Interaction) -> bytes:
    """Return the hash after one more turn.

    What the model thought is not in it (clients do not send it back); what was given to it besides
    the query is, so that nobody who does not know it finds the turn.
    """
    texts: list[str | None] = [interaction.query, interaction.answer]
    given = [interaction.internal, interaction.tool_use]
    if any(text is not None for text in given):
        texts += given
    return _hash(before, texts)


def prefix_hashes(system: str | None, turns: Sequence[tuple[str, str]]) -> list[bytes]:
    """Return the hashes after each of ``turns``, pairs of query and answer."""
    hashes, before = [], root_hash(system)
    for query, answer in turns:
        before = next_hash(before, Interaction(query, answer))
        hashes.append(before)
    return hashes


def _hash(before: bytes, texts: Sequence[str | None]) -> bytes:
    # JSON, so that no text can pretend to be two.
    content = json.dumps(texts, ensure_ascii=True).encode("ascii")
    return hashlib.sha256(before + content).digest()
