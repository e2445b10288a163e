"""Text to ids and back: tokenizers, their training, and the form of an interaction. No torch."""

from rxlm.tokenization.backend import TokenizerDefinition
from rxlm.tokenization.chat_format import chat_template, render_interaction, render_text
from rxlm.tokenization.interaction import (
    PLAIN_TEMPLATE,
    RICH_TEMPLATE,
    InteractionTemplate,
    Section,
)
from rxlm.tokenization.part_stream import PartStream
from rxlm.tokenization.special import SpecialTokens
from rxlm.tokenization.stream import TextStream
from rxlm.tokenization.template import (
    EncodedTurn,
    RenderedInteraction,
    Span,
    encode_given,
    encode_interaction,
    encode_query,
    encode_system,
    parse_parts,
    parse_sections,
    render_parts,
)
from rxlm.tokenization.tokenizer import Tokenizer
from rxlm.tokenization.train import TokenizerTraining, train_tokenizer

__all__ = [
    "PLAIN_TEMPLATE",
    "RICH_TEMPLATE",
    "EncodedTurn",
    "InteractionTemplate",
    "PartStream",
    "RenderedInteraction",
    "Section",
    "Span",
    "SpecialTokens",
    "TextStream",
    "Tokenizer",
    "TokenizerDefinition",
    "TokenizerTraining",
    "chat_template",
    "encode_given",
    "encode_interaction",
    "encode_query",
    "encode_system",
    "parse_parts",
    "parse_sections",
    "render_interaction",
    "render_parts",
    "render_text",
    "train_tokenizer",
]
