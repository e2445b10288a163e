"""The text of a study as tokens: characters or BPE, one vocabulary for both splits.

Documents come from files (``rxlm.data.sources``) or from the excerpt in ``excerpt/``;
they are joined by newlines into one stream a split, which is cut into rows. Rows are read in an
order that is a function of (seed, position). Bits per byte need the bytes of what is predicted, so
the bytes of every token are known.

Shapes: R rows, T tokens.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rxlm.data.characters import UNKNOWN_ID, CharacterVocabulary
from rxlm.data.data_config import DataConfig
from rxlm.data.files import TEXT_SUFFIXES
from rxlm.data.order import sample_index
from rxlm.data.sources import load_texts
from rxlm.errors import UserError
from rxlm.study.settings import TextTraining
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.texts import Split, open_texts

BUNDLED = Path(__file__).parent / "excerpt" / "black_beauty.train.txt"
_SMALLEST_BPE = 267


@dataclass(frozen=True)
class Corpus:
    """Two streams of tokens, ``int64`` each, and what is known about them.

    Attributes:
        train: ids of the training split.
        valid: of the validation split.
        valid_bytes: UTF-8 bytes of each validation token.
        vocab_size: number of ids.
        source: what a report calls it.
        sha256: of both texts.
        unknown_rate: share of validation tokens that are unknown.
        kind: ``char`` or ``bpe``.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    valid_bytes: NDArray[np.int64]
    vocab_size: int
    source: str
    sha256: str
    unknown_rate: float
    kind: str

    def batch(self, seed: int, positions: range, seq_len: int) -> NDArray[np.int64]:
        """Return training rows ``[R, T + 1]`` at positions of the endless reading."""
        count = self.num_rows(seq_len)
        rows = [
            self.train[index * seq_len : index * seq_len + seq_len + 1]
            for index in (sample_index(seed, position, count) for position in positions)
        ]
        return np.stack(rows)

    def num_rows(self, seq_len: int) -> int:
        """Return how many training rows of ``seq_len`` tokens there are."""
        count = (len(self.train) - 1) // seq_len
        if count < 1:
            raise UserError(
                f"{self.source}: {len(self.train):,} training tokens make no row of {seq_len}: "
                "use more text or shorter rows."
            )
        return count

    def validation_rows(self, seq_len: int, most_tokens: int) -> tuple[NDArray[Any], float]:
        """Return rows ``[R, T + 1]`` that follow one another, and the bytes of their targets."""
        count = min((len(self.valid) - 1) // seq_len, max(1, most_tokens // seq_len))
        if count < 1:
            raise UserError(
                f"{self.source}: {len(self.valid):,} validation tokens make no row of {seq_len}: "
                "use more text or shorter rows."
            )
        rows = np.stack(
            [self.valid[row * seq_len : row * seq_len + seq_len + 1] for row in range(count)]
        )
        return rows, float(self.valid_bytes[1 : count * seq_len + 1].sum())

    def about(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "tokens": self.kind,
            "vocab_size": self.vocab_size,
            "train_tokens": len(self.train),
            "valid_tokens": len(self.valid),
            "unknown_rate": self.unknown_rate,
        }


def open_corpus(settings: TextTraining) -> Corpus:
    """Read text and make the vocabulary, of the training split alone.

    Raises:
        UserError: for text that is missing, empty or malformed.
    """
    path = os.path.expandvars(settings.data) if settings.data else str(BUNDLED)
    if "$" in path:
        raise UserError(
            f"text.data={settings.data}: the environment variable in it is not set. Set it, or "
            "give another text with --data (--data bundled takes the excerpt that comes along)."
        )
    texts = {
        "train": _joined(_documents(path, "train"), settings.max_bytes),
        "valid": _joined(_documents(path, "valid"), settings.max_bytes),
    }
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    source = "bundled excerpt of Black Beauty" if path == str(BUNDLED) else Path(path).name
    if settings.tokens == "char":
        vocabulary = CharacterVocabulary.of_texts([texts["train"]], settings.vocab_size)
        train, valid = (vocabulary.encode(texts[split]) for split in ("train", "valid"))
        sizes = [len(character.encode()) for character in texts["valid"]]
        unknown = valid.count(UNKNOWN_ID) / max(1, len(valid))
        size = vocabulary.vocab_size
    else:
        tokenizer = train_tokenizer(
            texts["train"].splitlines(),
            TokenizerTraining(
                vocab_size=max(_SMALLEST_BPE, settings.vocab_size), add_prefix_space=False
            ),
        )
        train, valid = (tokenizer.encode(texts[split]) for split in ("train", "valid"))
        sizes = [len(tokenizer.token_bytes(token)) for token in valid]
        unknown, size = 0.0, tokenizer.vocab_size
    return Corpus(
        np.asarray(train, np.int64),
        np.asarray(valid, np.int64),
        np.asarray(sizes, np.int64),
        size,
        source,
        digest,
        unknown,
        settings.tokens,
    )


def _documents(path: str, split: Split) -> list[str]:
    """Return the documents of a split: of files that are named for it (``train-*.parquet`` beside
    ``validation-*.parquet``), otherwise as everywhere (:mod:`rxlm.training.texts`)."""
    folder = Path(path)
    if folder.is_dir():
        found = {
            name: sorted(
                item
                for item in folder.iterdir()
                if item.name.startswith(name) and item.name.endswith(TEXT_SUFFIXES)
            )
            for name in ("train", "valid")
        }
        if all(found.values()):
            # Rows without text stand between articles there.
            return [text for file in found[split] for text in load_texts(file, "skip")]
    return open_texts(DataConfig(text=path), split)


def _joined(documents: list[str], most_bytes: int | None) -> str:
    kept, total = [], 0
    for document in documents:
        if most_bytes is not None and total >= most_bytes:
            break
        kept.append(document)
        total += len(document.encode()) + 2
    return "\n\n".join(kept)
