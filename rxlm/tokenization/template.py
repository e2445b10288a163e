"""The form of an interaction as ids, and ids back as its parts. Pure functions.

    query         [BOS] ([I] internal) [Q] query
    interaction   [BOS] ([I] internal) [Q] query [A] answer [EOS]
    system text   [BOS] [I] text [EOS]

and, where the tokenizer's template has them, tool results in place of queries, thinking before
answers and tool calls after them (``interaction``). One function makes the ids and the spans, so
what a model is trained to say and what it is given cannot drift apart.

Each text is encoded by itself, so a special token in it stays text and every section starts like
every other. Not here: cutting to a length and padding (training does those), the same form as text
(``chat_format``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rxlm.errors import UserError
from rxlm.tokenization.interaction import PARTS, Section
from rxlm.tokenization.tokenizer import Tokenizer


class EncodedTurn(NamedTuple):
    """One interaction as ids.

    ``answer_start`` is where the model begins to speak: the index of [A], or of [T] where it
    thinks first. Everything from there on is the model's to learn: that an answer begins now, what
    it says, and [EOS] (that it ends).
    """

    ids: list[int]
    answer_start: int


class Span(NamedTuple):
    """Tokens ``start`` to ``end`` (exclusive), a part with the special token that opens it.

    ``part``: of :data:`~rxlm.tokenization.interaction.PARTS`, or 'bos' or 'eos'; ``learned``:
    whether the model must predict these tokens.
    """

    part: str
    start: int
    end: int
    learned: bool


class RenderedInteraction(NamedTuple):
    """Ids, and which of them are what: the spans follow one another and leave nothing out."""

    ids: list[int]
    spans: tuple[Span, ...]

    @property
    def loss_mask(self) -> list[bool]:
        """For every id whether the model must predict it."""
        return [span.learned for span in self.spans for _ in range(span.start, span.end)]

    @property
    def turn(self) -> EncodedTurn:
        """The ids with the place where what is learned begins; it goes on to the end."""
        starts = [span.start for span in self.spans if span.learned]
        return EncodedTurn(self.ids, min(starts, default=len(self.ids)))


def render_parts(tokenizer: Tokenizer, parts: Mapping[str, str | None]) -> RenderedInteraction:
    """Return a whole interaction.

    Args:
        tokenizer: encodes the texts; its ``template`` says which parts there may be.
        parts: texts by name (of :data:`~rxlm.tokenization.interaction.PARTS`).

    Raises:
        UserError: for parts that do not make an interaction of this template.
    """
    return _render(tokenizer, tokenizer.template.sections(parts), is_whole=True)


def encode_given(tokenizer: Tokenizer, parts: Mapping[str, str | None]) -> list[int]:
    """Return what the model is given before it speaks: :func:`render_parts` up to there."""
    sections = tokenizer.template.given_sections(parts)
    return _render(tokenizer, sections, is_whole=False).ids


def encode_query(tokenizer: Tokenizer, query: str, internal: str | None = None) -> list[int]:
    """Return ``[BOS] ([I] internal) [Q] query``, what the model is given before it answers."""
    return encode_given(tokenizer, {"query": query, "internal": internal})


def encode_interaction(
    tokenizer: Tokenizer, query: str, answer: str, internal: str | None = None
) -> EncodedTurn:
    """Return ``[BOS] ([I] internal) [Q] query [A] answer [EOS]`` and where [A] is."""
    parts = {"query": query, "answer": answer, "internal": internal}
    return render_parts(tokenizer, parts).turn


def encode_system(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ``[BOS] [I] text [EOS]``, which sets the memory before a conversation.

    A template with a ``system_title`` puts it before the text.
    """
    sections = [tokenizer.template.system_section(text)]
    return _render(tokenizer, sections, is_whole=True).ids


def parse_sections(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Section]:
    """Return the sections of an interaction, in order: the inverse of rendering.

    Structure comes from the special ids alone, which no text ever encodes to, so a text that
    spells '[A]' comes back as it was. Ids of other special tokens are left out.

    Raises:
        UserError: for an id outside the vocabulary, and for text before the first section.
    """
    part_of_id = {special_id(tokenizer, name): name for name in PARTS}
    opened: list[tuple[str, list[int]]] = []
    for token in ids:
        if token in part_of_id:
            opened.append((part_of_id[token], []))
        elif token in tokenizer.special_ids:
            continue
        elif opened:
            opened[-1][1].append(token)
        else:
            raise UserError(
                f"token id {token} stands before the first section: an interaction begins with "
                f"{tokenizer.special.bos} and the token that opens a part."
            )
    return [Section(name, tokenizer.decode(section)) for name, section in opened]


def parse_parts(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[str, str]:
    """Return the texts of an interaction by part; a part that comes twice is joined."""
    parts: dict[str, str] = {}
    for name, text in parse_sections(tokenizer, ids):
        parts[name] = parts.get(name, "") + text
    return parts


def special_id(tokenizer: Tokenizer, role: str) -> int:
    """Return the id of the special token ``role`` ('bos', 'query', ...)."""
    token_id: int = getattr(tokenizer, f"{role}_id")
    return token_id


def _render(
    tokenizer: Tokenizer, sections: Sequence[Section], *, is_whole: bool
) -> RenderedInteraction:
    """Return [BOS], each section's opening token and text, and if ``is_whole`` [EOS]."""
    said = tokenizer.template.said
    texts = tokenizer.encode_batch([section.text for section in sections])
    pieces = [("bos", [tokenizer.bos_id], False)]
    pieces += [
        (section.name, [special_id(tokenizer, section.name), *text], section.name in said)
        for section, text in zip(sections, texts, strict=True)
    ]
    if is_whole:
        # It ends what stands before it, so it is learned if that is.
        pieces.append(("eos", [tokenizer.eos_id], pieces[-1][2]))
    ids: list[int] = []
    spans = []
    for part, piece, learned in pieces:
        spans.append(Span(part, len(ids), len(ids) + len(piece), learned))
        ids += piece
    return RenderedInteraction(ids, tuple(spans))
