"""Text to ids and back: tokenizers, their training, and the form of an interaction. No torch."""

from rxlm.tokenization.backend import TokenizerDefinition
from rxlm.tokenization.chat_format import chat_template, render_interaction
from rxlm.tokenization.special import SpecialTokens
from rxlm.tokenization.stream import TextStream
from rxlm.tokenization.template import (
    EncodedTurn,
    encode_interaction,
    encode_query,
    encode_system,
)
from rxlm.tokenization.tokenizer import Tokenizer
from rxlm.tokenization.train import TokenizerTraining, train_tokenizer

__all__ = [
    "EncodedTurn",
    "SpecialTokens",
    "TextStream",
    "Tokenizer",
    "TokenizerDefinition",
    "TokenizerTraining",
    "chat_template",
    "encode_interaction",
    "encode_query",
    "encode_system",
    "render_interaction",
    "train_tokenizer",
]
