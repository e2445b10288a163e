"""Which model a memory belongs to: architecture, tokenizer and weights, hashed apart.

A memory is meaningful only to the weights that wrote it. Three hashes instead of one, so that a
refusal can say what differs.
"""

from __future__ import annotations

from typing import NamedTuple


class ModelFingerprint(NamedTuple):
    """SHA-256 (hex) of each part; ``tokenizer`` is '' for a model without one."""

    architecture: str
    tokenizer: str
    weights: str

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Return the names of the parts that differ."""
        return [
            name
            for name, mine, theirs in zip(self._fields, self, other, strict=True)
            if mine != theirs
        ]
