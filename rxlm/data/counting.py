"""Counts over the usable records of some files: turns, lengths, how much of a vocabulary occurs.

Lengths take four bytes a turn or document; nothing else grows. Not here: what is wrong with the
others (``checking``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

from rxlm.data.checking import Checked
from rxlm.data.conversations import OPTIONAL_PARTS, Conversation

LENGTHS = ("turns", "query", "answer", *OPTIONAL_PARTS, "document")
"""What percentiles are given of, where it occurs."""
PERCENTILES = (0, 10, 50, 90, 99, 100)
_TEXTS_AT_ONCE = 500

EncodeBatch = Callable[[list[str]], list[list[int]]]


def count_records(
    records: Iterable[Checked], encode: EncodeBatch | None = None, vocab_size: int = 0
) -> dict[str, Any]:
    """Return counts as JSON values.

    Args:
        records: good and bad ones.
        encode: from texts to ids; None: lengths are in characters.
        vocab_size: ids that ``encode`` knows.

    Returns:
        ``records``, ``bad_records``, ``conversations``, ``documents``, ``unit`` of lengths
        (``tokens`` or ``characters``), ``total`` length, ``characters``; percentiles ``turns`` (of
        a conversation), of the lengths of each part of a turn that occurs (``query``, ``answer``,
        ``think``, ...) and of a ``document``; with ``encode`` also
        ``vocabulary``: ids that occur, of how many, and characters a token.
    """
    lengths = {name: array("I") for name in LENGTHS}
    counter = _Counter(encode, vocab_size, lengths)
    counts = {"records": 0, "bad_records": 0, "conversations": 0, "documents": 0}
    for record in records:
        counts["records"] += 1
        if isinstance(record.value, Conversation):
            counts["conversations"] += 1
            lengths["turns"].append(len(record.value))
            counter.add("system", record.value.system or "")
            for interaction in record.value.interactions:
                for name, text in interaction.parts().items():
                    counter.add(name, text)
        elif record.value is not None:
            counts["documents"] += 1
            counter.add("document", record.value)
        else:
            counts["bad_records"] += 1
    counter.flush()
    result: dict[str, Any] = {**counts, **counter.totals()}
    result |= {name: percentiles(values) for name, values in lengths.items() if values}
    return result


def percentiles(values: array[int]) -> dict[str, float]:
    """Return the mean and :data:`PERCENTILES` (the value that so many percent do not exceed)."""
    ordered = sorted(values)
    # The nearest rank: a value that occurs, never one in between.
    ranks = {share: max(0, -(-share * len(ordered) // 100) - 1) for share in PERCENTILES}
    found = {f"p{share}": float(ordered[rank]) for share, rank in ranks.items()}
    return {"mean": sum(ordered) / len(ordered), **found}


class _Counter:
    def __init__(
        self, encode: EncodeBatch | None, vocab_size: int, lengths: dict[str, array[int]]
    ) -> None:
        self._encode, self._vocab_size, self._lengths = encode, vocab_size, lengths
        self._waiting: list[tuple[str, str]] = []
        self._used: set[int] = set()
        self._total = self._characters = 0

    def add(self, name: str, text: str) -> None:
        self._waiting.append((name, text))
        if len(self._waiting) == _TEXTS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        texts = [text for _, text in self._waiting]
        if self._encode is None:
            sizes = [len(text) for text in texts]
        else:
            encoded = self._encode(texts) if texts else []
            sizes = [len(ids) for ids in encoded]
            self._used.update(*encoded)
        for (name, text), size in zip(self._waiting, sizes, strict=True):
            self._total += size
            self._characters += len(text)
            if name in self._lengths:
                self._lengths[name].append(size)
        self._waiting = []

    def totals(self) -> dict[str, Any]:
        unit = "characters" if self._encode is None else "tokens"
        totals: dict[str, Any] = {
            "unit": unit,
            "total": self._total,
            "characters": self._characters,
        }
        if self._encode is not None:
            totals["vocabulary"] = {
                "used": len(self._used),
                "size": self._vocab_size,
                "coverage": len(self._used) / max(1, self._vocab_size),
                "characters_per_token": self._characters / max(1, self._total),
            }
        return totals
