"""Where training gets its conversations: made up on demand, or from files in a seeded order.

A source is asked by position, so a resumed run reads on exactly where it stopped. Reading files
is in ``sources``, making dialogues in ``generator``.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rxlm.data.conversation_mixture import MixedConversations
from rxlm.data.conversations import Conversation, ConversationSource, Interaction
from rxlm.data.data_config import BUILTIN, DataConfig
from rxlm.data.facts import KINDS_BY_NAME
from rxlm.data.files import CONVERSATION_SUFFIXES, resolve_files
from rxlm.data.generator import SPLITS, DialogueGenerator, GeneratorConfig
from rxlm.data.order import random_offset, sample_index
from rxlm.data.records import DataSummary
from rxlm.data.sources import load_conversations
from rxlm.errors import UserError

logger = logging.getLogger(__name__)


class GeneratedConversations:
    """Endless dialogues of the built-in generator, each of exactly the length asked for."""

    def __init__(self, generator: DialogueGenerator, split: str = "train") -> None:
        self.generator = generator
        self.split = split
        self.name = f"{BUILTIN} ({split})"
        self.size: int | None = None
        self.has_probes = True

    def sample(self, position: int, num_turns: int) -> Conversation:
        """Return dialogue number ``position`` with ``num_turns`` turns."""
        return self.generator.conversation(position, num_turns, self.split)

    def has_probes_at(self, position: int) -> bool:
        """Return that questions can be asked: the generator knows what was told."""
        return True

    def probe_questions(
        self, conversation: Conversation, position: int, count: int
    ) -> list[tuple[int, Interaction]]:
        """Return questions on the facts told in ``conversation``."""
        return self.generator.probe_questions(conversation, position, count)


class ConversationList:
    """Given conversations, read in an order that depends on seed and epoch only.

    Args:
        conversations: at least one.
        seed: of the order and of the windows, >= 0.
        name: for logs and reports.
    """

    def __init__(
        self, conversations: Sequence[Conversation], seed: int = 0, name: str = "list"
    ) -> None:
        if not conversations:
            raise UserError(f"{name}: holds no conversation; expected at least one.")
        if seed < 0:
            raise UserError(f"seed={seed}: expected a number >= 0.")
        self.conversations = conversations
        self.seed = seed
        self.name = name
        self.size: int | None = len(conversations)
        self.has_probes = any(
            kind in KINDS_BY_NAME
            for conversation in conversations
            for interaction in conversation.interactions
            for kind, _ in interaction.told
        )
        self._generator = DialogueGenerator(GeneratorConfig(seed=seed))

    def sample(self, position: int, num_turns: int) -> Conversation:
        """Return the conversation at ``position``: whole, or a window if longer than asked for.

        Where the window begins depends on seed and position, so epochs show different ones.
        """
        if num_turns < 1:
            raise UserError(f"num_turns={num_turns}: expected at least 1.")
        index = sample_index(self.seed, position, len(self.conversations))
        conversation = self.conversations[index]
        room = len(conversation) - num_turns
        if room <= 0:
            return conversation
        return conversation.window(random_offset(self.seed, position, room + 1), num_turns)

    def has_probes_at(self, position: int) -> bool:
        """Return the same for all positions: :attr:`has_probes`."""
        return self.has_probes

    def probe_questions(
        self, conversation: Conversation, position: int, count: int
    ) -> list[tuple[int, Interaction]]:
        """Return questions on facts told in ``conversation``; none without such metadata."""
        if not self.has_probes:
            return []
        return self._generator.probe_questions(conversation, position, count)


def open_conversations(
    config: DataConfig, split: str = "train", summary: DataSummary | None = None
) -> ConversationSource:
    """Return the conversations of ``split``.

    Args:
        config: what to open.
        split: ``'train'``, ``'valid'``, or for the built-in dialogues also ``'test'``.
        summary: counts what is read and skipped, if given.

    Raises:
        UserError: for files that are missing, empty or malformed.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    if config.dialogue_mixture:
        items = config.dialogue_mixture
        return MixedConversations(
            [open_conversations(config.of_dialogue_item(item), split, summary) for item in items],
            [item.weight for item in items],
            config.seed,
            f"{' + '.join(item.dialogues for item in items)} ({split})",
        )
    if split == "valid" and config.valid_dialogues is not None:
        if config.valid_dialogues == BUILTIN:
            return GeneratedConversations(DialogueGenerator(config.generator), split)
        files = resolve_files(config.valid_dialogues, CONVERSATION_SUFFIXES)
        return _listed(_load(files, config, summary), config, split)
    if config.dialogues == BUILTIN:
        return GeneratedConversations(DialogueGenerator(config.generator), split)
    if split == "test":
        raise UserError(
            f"dialogues={config.dialogues!r} has no split 'test'; give the test file as "
            f"'dialogues'."
        )
    files = resolve_files(config.dialogues, CONVERSATION_SUFFIXES)
    training, validation = _train_and_valid_files(files)
    if split == "valid" and validation:
        logger.info("validation: %s", ", ".join(map(str, validation)))
        return _listed(_load(validation, config, summary), config, split)
    conversations = _load(training, config, summary)
    if validation or config.valid_dialogues is not None:
        return _listed(conversations, config, split)
    kept, held_out = _hold_out(conversations, config)
    logger.info(
        "%s: no validation file; %d of %d conversations are held out for it",
        config.dialogues,
        len(held_out),
        len(conversations),
    )
    return _listed(held_out if split == "valid" else kept, config, split)


def conversation_texts(conversations: Iterable[Conversation]) -> Iterator[str]:
    """Yield every system text and part of a turn: what a tokenizer is trained on."""
    for conversation in conversations:
        if conversation.system is not None:
            yield conversation.system
        for interaction in conversation.interactions:
            yield from interaction.parts().values()


def _train_and_valid_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files to train on, and the validation files that belong to them.

    A folder or glob may have brought both kinds: ``.valid.`` and ``.test.`` files are never
    trained on when there are ``.train.`` files among them.
    """
    training = [file for file in files if ".train." in file.name]
    siblings = [file.with_name(file.name.replace(".train.", ".valid.")) for file in training]
    if not training:
        return list(files), []
    left_out = [file.name for file in files if file not in training and file not in siblings]
    if left_out:
        logger.info("not trained on, beside '.train.' files: %s", ", ".join(left_out))
    return training, [file for file in siblings if file.is_file()]


def _load(
    files: Sequence[Path], config: DataConfig, summary: DataSummary | None
) -> list[Conversation]:
    read = [
        conversation
        for file in files
        for conversation in load_conversations(
            file, config.on_bad_record, max_bytes=config.max_record_bytes, summary=summary
        )
    ]
    if config.id_pattern is None:
        return read
    wanted = re.compile(config.id_pattern)
    chosen = [item for item in read if item.id is not None and wanted.match(item.id)]
    if not chosen:
        ids = ", ".join(repr(item.id) for item in read[:3])
        raise UserError(
            f"data.id_pattern={config.id_pattern!r}: no conversation of "
            f"{', '.join(map(str, files))} has such an id; the first are {ids}."
        )
    logger.info("%s: %d of %d conversations match", config.id_pattern, len(chosen), len(read))
    return chosen


def _hold_out(
    conversations: Sequence[Conversation], config: DataConfig
) -> tuple[list[Conversation], list[Conversation]]:
    """Split by a hash of the id (of the position where there is none): the same in every run."""
    if len(conversations) < 2:
        raise UserError(
            f"{config.dialogues}: holds one conversation, so none can be held out for validation. "
            f"Give 'valid_dialogues', or more conversations."
        )

    def rank(position: int) -> bytes:
        key = conversations[position].id or f"#{position}"
        return hashlib.sha256(key.encode()).digest()

    wanted = round(config.valid_fraction * len(conversations))
    count = min(max(1, wanted), len(conversations) - 1)
    held_out = set(sorted(range(len(conversations)), key=rank)[:count])
    return (
        [item for position, item in enumerate(conversations) if position not in held_out],
        [item for position, item in enumerate(conversations) if position in held_out],
    )


def _listed(
    conversations: Sequence[Conversation], config: DataConfig, split: str
) -> ConversationList:
    return ConversationList(conversations, config.seed, f"{config.dialogues} ({split})")
