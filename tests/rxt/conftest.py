"""A tiny tokenizer and tiny random models that speak, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

TEXTS = ("My name is Ann and I live in Oslo.", "Your name is Ann.", "Hello, how are you today?")

SIZES = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 6, "seq_len": 48}


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, TokenizerTraining(vocab_size=300))


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer: Tokenizer) -> Callable[..., RxTAlpha]:
    """Return a builder of random models in evaluation mode.

    ``eos_bias`` makes [EOS] likelier, so that sampled answers end at different lengths; component
    fields can be given by name, those of memory attention with the prefix ``memory_``.
    """

    def build(
        seed: int = 0, eos_bias: float = 0.0, tokenizer: Tokenizer = tiny_tokenizer, **fields: Any
    ) -> RxTAlpha:
        memory = {
            name.removeprefix("memory_"): fields.pop(name)
            for name in list(fields)
            if name.startswith("memory_") and name != "memory_fusion_mode"
        }
        component = {
            **SIZES,
            "vocab_size": tokenizer.vocab_size,
            "ff_dim": 24,
            "self_att_type": "gqa",
            "cross_att_type": "mha",
            **fields,
        }
        shared = {name: component[name] for name in SIZES}
        attention = {**shared, "att_type": "mha", "interlayer_att_type": "mha", **memory}
        encoder = {name: v for name, v in component.items() if "final_stateless" not in name}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = RxTAlpha(component, encoder, attention, tokenizer=tokenizer)
            # Sharper scores than at initialisation: near ties would make tests depend on rounding.
            if not model.decoder.config.tie_embeddings:
                model.decoder.head_weight.data.mul_(4.0)
        model.decoder.head_bias.data[tokenizer.eos_id] = eos_bias
        return model.eval()

    return build
