"""A tiny untrained model with a tiny tokenizer, for tests of how models are measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rxlm.data import DialogueGenerator, conversation_texts
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

SEQ_LEN = 64


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of about 500 ids that knows the built-in dialogues."""
    generator = DialogueGenerator()
    texts = conversation_texts(generator.conversation(number, 8) for number in range(150))
    return train_tokenizer(texts, TokenizerTraining(vocab_size=500))


@pytest.fixture(scope="session")
def make_model(tokenizer: Tokenizer) -> Callable[..., RxTAlpha]:
    """A function that builds an untrained model; its answers are nonsense, but of its memory."""

    def make(seed: int = 0, init_type: str = "learned", seq_len: int = SEQ_LEN) -> RxTAlpha:
        torch.manual_seed(seed)
        sizes = {
            "num_layers": 2,
            "embed_dim": 16,
            "att_heads": 2,
            "seq_len": seq_len,
            "stm_size": 4,
        }
        component = {
            **sizes,
            "vocab_size": tokenizer.vocab_size,
            "ff_dim": 32,
            "self_att_type": "mha",
            "cross_att_type": "mha",
            "tie_embeddings": True,
        }
        memory = {**sizes, "att_type": "mha", "variant": "simple", "init_type": init_type}
        model = RxTAlpha(component, component, memory, tokenizer=tokenizer)
        with torch.no_grad():
            # The memory has to matter for a test to see anything.
            for layer in model.decoder.layers:
                layer.cross_attention.output.weight.mul_(4.0)
        return model.eval()

    return make


@pytest.fixture
def model(make_model: Callable[..., RxTAlpha]) -> RxTAlpha:
    """An untrained model with the default initial memory."""
    return make_model()
