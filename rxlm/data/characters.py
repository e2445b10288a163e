"""A vocabulary of characters: the most frequent of a text, the rest is one unknown token.

Made of the training text only and used for validation as it is. What is unknown is counted: a
perplexity over a text of which much is unknown says little. No torch; not here: subword tokens
(``rxlm.tokenization``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from rxlm.errors import UserError

PAD_TOKEN, UNKNOWN_TOKEN = "<pad>", "<unk>"
PAD_ID, UNKNOWN_ID = 0, 1
NUM_SPECIAL = 2


@dataclass(frozen=True)
class CharacterVocabulary:
    """``<pad>``, ``<unk>``, then characters.

    Attributes:
        characters: in the order of their ids, which begin at 2; the most frequent first, those of
            equal frequency in the order of their code points.
    """

    characters: str

    @classmethod
    def of_texts(cls, texts: Iterable[str], max_size: int = 5000) -> CharacterVocabulary:
        """Return the vocabulary of a training text.

        Args:
            texts: read once.
            max_size: ids at most, the two special ones included.

        Raises:
            UserError: for no text, or a size without room for a character.
        """
        if max_size <= NUM_SPECIAL:
            raise UserError(f"vocab_size={max_size}: expected at least {NUM_SPECIAL + 1}.")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        if not counts:
            raise UserError("a vocabulary of characters needs a text: the training data is empty.")
        ranked = sorted(counts, key=lambda character: (-counts[character], character))
        return cls("".join(ranked[: max_size - NUM_SPECIAL]))

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {character: NUM_SPECIAL + i for i, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return NUM_SPECIAL + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return one id a character."""
        ids = self._ids
        return [ids.get(character, UNKNOWN_ID) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; special tokens are spelled out."""
        spelled = [PAD_TOKEN, UNKNOWN_TOKEN, *self.characters]
        return "".join(spelled[index] for index in ids)
