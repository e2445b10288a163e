"""A tiny model, tokenizer and data for the tests of the training stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rxlm.data import (
    Conversation,
    ConversationList,
    DialogueGenerator,
    GeneratedConversations,
    Interaction,
    conversation_texts,
)
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

SEQ_LEN = 64


@dataclass
class Tiny:
    """Everything a stage is built from, small; models are new on every call."""

    tokenizer: Tokenizer
    generator: DialogueGenerator = field(default_factory=DialogueGenerator)

    def model(self, seed: int = 0, slots: int = 8, dropout: float = 0.0, **memory: Any):
        """Return a model whose initial weights depend on ``seed`` only."""
        component = {
            "num_layers": 2,
            "vocab_size": self.tokenizer.vocab_size,
            "embed_dim": 16,
            "ff_dim": 32,
            "att_heads": 2,
            "seq_len": SEQ_LEN,
            "stm_size": slots,
            "self_att_type": "mha",
            "cross_att_type": "mha",
            "tie_embeddings": True,
            "ff_dropout": dropout,
        }
        memory_attention = {
            "variant": "simple",
            "num_layers": 2,
            "embed_dim": 16,
            "att_heads": 1,
            "att_type": "mha",
            "stm_size": slots,
            "seq_len": SEQ_LEN,
            **memory,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = {
                "encoder": component,
                "decoder": component,
                "memory_attention": memory_attention,
            }
            return ReactiveModel(config, self.tokenizer)

    @property
    def turns(self) -> TurnEncoder:
        return TurnEncoder(self.tokenizer, SEQ_LEN)

    def source(self, split: str = "train") -> GeneratedConversations:
        """Return endless dialogues of the built-in generator."""
        return GeneratedConversations(self.generator, split)

    def objective(self, cls: type, settings: Any, model: Any = None, **options: Any) -> Any:
        """Return a stage on the built-in dialogues."""
        train = options.pop("train", None) or self.source()
        return cls(
            model if model is not None else self.model(),
            train,
            options.pop("valid", None) or self.source("valid"),
            self.turns,
            settings,
            **{"seed": 0, **options},
        )

    def chat(self, *turns: tuple[str, str], system: str | None = None) -> ConversationList:
        """Return a source of one given conversation."""
        interactions = tuple(Interaction(query, answer) for query, answer in turns)
        return ConversationList([Conversation(interactions, system=system)])


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    conversations = (DialogueGenerator().conversation(index, 8) for index in range(40))
    return train_tokenizer(conversation_texts(conversations), TokenizerTraining(vocab_size=384))


@pytest.fixture
def tiny(tiny_tokenizer: Tokenizer) -> Tiny:
    return Tiny(tiny_tokenizer)
