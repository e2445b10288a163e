"""A tiny random model that speaks, and services over it, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rxlm.rxt.models import RxTAlpha
from rxlm.serve.interface import ServeLimits
from rxlm.serve.service import ConversationService
from rxlm.tokenization import TokenizerTraining, train_tokenizer

TEXTS = ("My name is Ann and I live in Oslo.", "Your name is Ann.", "Hello, how are you today?")
SIZES = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 6, "seq_len": 64}

OpenService = Callable[..., ConversationService]


def tiny_model(seed: int = 0, eos_bias: float = 1.0, **fields: Any) -> RxTAlpha:
    """Return a random model in float64 (batches then round as single rows do)."""
    tokenizer = train_tokenizer(TEXTS * 4, TokenizerTraining(vocab_size=300))
    part = {**SIZES, "vocab_size": tokenizer.vocab_size, "ff_dim": 24}
    part |= {"self_att_type": "gqa", "cross_att_type": "mha", **fields}
    memory = {**SIZES, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RxTAlpha(part, part, memory, tokenizer=tokenizer)
        model.decoder.head_weight.data.mul_(4.0)
    model.decoder.head_bias.data[tokenizer.eos_id] = eos_bias
    return model.double().eval()


@pytest.fixture(scope="session")
def model() -> RxTAlpha:
    return tiny_model()


@pytest.fixture
def open_service(model: RxTAlpha, tmp_path: Path) -> Iterator[OpenService]:
    """Return a function that opens a service over ``model`` in the test's folder."""
    opened: list[ConversationService] = []

    def build(folder: Path | None = tmp_path / "store", **limits: Any) -> ConversationService:
        service = ConversationService(model, folder, ServeLimits(**limits), model_name="tiny")
        opened.append(service)
        return service

    yield build
    for service in opened:
        service.close(timeout=10.0)


@pytest.fixture
def service(open_service: OpenService) -> ConversationService:
    return open_service()
