"""A tokenizer for the tests of language models."""

from __future__ import annotations

import pytest

from rxlm.data import DialogueGenerator, conversation_texts
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer


@pytest.fixture(scope="session")
def lm_tokenizer() -> Tokenizer:
    conversations = (DialogueGenerator().conversation(index, 4) for index in range(20))
    return train_tokenizer(conversation_texts(conversations), TokenizerTraining(vocab_size=320))
