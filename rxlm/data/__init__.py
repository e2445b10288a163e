"""Conversations and text: files, the built-in dialogues, their order, and how they are cut.

No torch, no tokens (``rxlm.tokenization``), no batches (``rxlm.training``). Begin with
``conversations`` (the values) and ``conversation_source`` (what training reads).
"""

from rxlm.data.conversation_source import (
    ConversationList,
    ConversationSource,
    GeneratedConversations,
    conversation_texts,
    open_conversations,
)
from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.data_config import DataConfig
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.data.order import epoch_order, locate, sample_index
from rxlm.data.sources import load_conversations, load_texts

__all__ = [
    "Conversation",
    "ConversationList",
    "ConversationSource",
    "DataConfig",
    "DialogueGenerator",
    "GeneratedConversations",
    "GeneratorConfig",
    "Interaction",
    "conversation_texts",
    "epoch_order",
    "load_conversations",
    "load_texts",
    "locate",
    "open_conversations",
    "sample_index",
]
