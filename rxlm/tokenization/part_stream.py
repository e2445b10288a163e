"""What a model says, id by id, as pieces of text that know which part they belong to.

A reader of a running answer must tell thinking from answer from tool call before the answer ends.
Not here: whole interactions (``template``), which tokens may come when (the model's business).
"""

from __future__ import annotations

from rxlm.tokenization.interaction import Section
from rxlm.tokenization.template import special_id
from rxlm.tokenization.tokenizer import Tokenizer


class PartStream:
    """Splits ids into the parts that a model says.

    Joined, the pieces of a part are what :func:`~rxlm.tokenization.template.parse_parts` returns.
    """

    def __init__(self, tokenizer: Tokenizer, part: str | None = "answer") -> None:
        """Begin with ``part``; None: the first id opens it.

        A tokenizer whose template knows nothing but answers never changes the part.
        """
        self.part = part
        said = tokenizer.template.said
        self._part_of_id = {special_id(tokenizer, name): name for name in said if len(said) > 1}
        self._text = tokenizer.stream()

    def push(self, token_id: int) -> list[Section]:
        """Return the texts that ``token_id`` completes: none, one, or the end of a part."""
        if token_id in self._part_of_id:
            ended = self.flush()
            self.part = self._part_of_id[token_id]
            return ended
        return self._pieces(self._text.push(token_id))

    def flush(self) -> list[Section]:
        """Return what is still held of an unfinished character."""
        return self._pieces(self._text.flush())

    def _pieces(self, text: str) -> list[Section]:
        return [Section(self.part or "answer", text)] if text else []
