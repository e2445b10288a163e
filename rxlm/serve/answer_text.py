"""The text of a running answer, piece by piece, and where it ends by the reader's wish.

A stop text is looked for in the answer only (not in thinking or a tool call). What could be the
beginning of one is held back until it is known. Not here: the choice of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from rxlm.errors import UserError
from rxlm.tokenization import PartStream, Section, Tokenizer

MOST_STOPS = 16
"""Stop texts of one turn."""
LONGEST_STOP = 256
"""Characters of a stop text."""


def check_stops(stops: Sequence[str]) -> None:
    """Raise ``UserError`` for too many stop texts, and for empty or very long ones."""
    if len(stops) > MOST_STOPS:
        raise UserError(f"{len(stops)} stop texts: give at most {MOST_STOPS}.")
    for text in stops:
        if not text or len(text) > LONGEST_STOP:
            raise UserError(f"a stop text has {len(text)} characters: use 1 to {LONGEST_STOP}.")


class AnswerText:
    """Ids of an answer to pieces of its parts."""

    def __init__(self, tokenizer: Tokenizer, opening: str | None, stops: Sequence[str]) -> None:
        """Begin with part ``opening``, as :class:`PartStream` does."""
        self._tokenizer, self._opening = tokenizer, opening
        self._parts = PartStream(tokenizer, opening)
        self._stops = tuple(stops)
        self._held, self._shown = "", 0
        self.stopped = False
        """Whether a stop text was said."""

    def push(self, token_id: int) -> list[Section]:
        """Return the pieces that a token completes."""
        pieces = self._parts.push(token_id)
        return pieces if not self._stops else self._until_stop(pieces)

    def flush(self) -> list[Section]:
        """Return what is still held; the answer is at its end."""
        if self.stopped:
            return []
        pieces = self._parts.flush()
        if not self._stops:
            return pieces
        pieces = self._until_stop(pieces)
        if self._held and not self.stopped:
            pieces.append(Section("answer", self._held))
            self._shown, self._held = self._shown + len(self._held), ""
        return pieces

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of an answer that ends before the stop text, as memory gets it.

        Tokens do not end where a stop text begins: those before are kept, what is left of the text
        is encoded anew.
        """
        parts = PartStream(self._tokenizer, self._opening)
        kept, text, said, opened = 0, "", "", 0
        for number, token in enumerate(ids, start=1):
            before = parts.part
            for piece in parts.push(token):
                said += piece.text if piece.name == "answer" else ""
            if len(said) > self._shown:
                break
            if parts.part != before:
                opened = number
            if len(said) > len(text) or parts.part != before:
                kept, text = number, said
        whole = self._answer_text(ids)[: self._shown]
        again = [*ids[:kept], *self._tokenizer.encode(whole[len(text) :])]
        if self._answer_text(again) == whole:
            return again
        return [*ids[:opened], *self._tokenizer.encode(whole)]

    def _answer_text(self, ids: Sequence[int]) -> str:
        parts = PartStream(self._tokenizer, self._opening)
        pieces = [piece for token in ids for piece in parts.push(token)] + parts.flush()
        return "".join(piece.text for piece in pieces if piece.name == "answer")

    def _until_stop(self, pieces: Sequence[Section]) -> list[Section]:
        shown = []
        for piece in pieces:
            if piece.name != "answer" or self.stopped:
                if not self.stopped:
                    shown.append(piece)
                continue
            text = self._held + piece.text
            found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            if found:
                self.stopped, self._held = True, ""
                text = text[: min(found)]
            else:
                start = _possible_start(text, self._stops)
                text, self._held = text[:start], text[start:]
            if text:
                self._shown += len(text)
                shown.append(Section("answer", text))
        return shown


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Return where a stop text may have begun at the end of ``text``; its length if nowhere."""
    longest = max(len(stop) for stop in stops) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)
