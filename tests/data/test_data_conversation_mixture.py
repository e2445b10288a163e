"""Mixtures of conversations: their ratio, each source in its own order, and what may be asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rxlm.data import Conversation, DataConfig, DialogueGenerator, Interaction, open_conversations
from rxlm.data.conversation_mixture import MixedConversations
from rxlm.data.conversation_source import ConversationList, GeneratedConversations
from rxlm.errors import UserError


def conversations(name: str, count: int, turns: int = 2) -> list[Conversation]:
    said = tuple(Interaction(f"{name} {turn}", "yes") for turn in range(turns))
    return [Conversation(said, id=f"{name}-{number}", source=name) for number in range(count)]


@pytest.fixture
def mixed() -> MixedConversations:
    generated = GeneratedConversations(DialogueGenerator())
    return MixedConversations(
        [generated, ConversationList(conversations("chat", 7))], [3.0, 1.0], seed=5
    )


def test_ratio_and_order_of_each_source(mixed: MixedConversations) -> None:
    """Catches weights that are not kept, and a source whose reading depends on the others."""
    read = [mixed.sample(position, 4) for position in range(2000)]
    chats = [item for item in read if item.source == "chat"]
    assert len(chats) == 500
    alone = ConversationList(conversations("chat", 7))
    assert [item.id for item in chats] == [alone.sample(place, 4).id for place in range(500)]
    # Seven conversations, read again and again: all about equally often.
    assert set(Counter(item.id for item in chats).values()) <= {71, 72}
    told = [item for item in read if item.source != "chat"]
    generator = DialogueGenerator()
    assert told[:20] == [generator.conversation(place, 4) for place in range(20)]


def test_questions_come_from_the_source_of_the_conversation(mixed: MixedConversations) -> None:
    """Catches questions on facts of another dialogue, and small talk without any that is taken for
    a dialogue with questions (its answers would hardly be trained on)."""
    assert mixed.has_probes and mixed.size is None
    seen = set()
    for position in range(40):
        conversation = mixed.sample(position, 8)
        asks = mixed.has_probes_at(position)
        seen.add(asks)
        assert asks == (conversation.source != "chat")
        values = {value for turn in conversation.interactions for _, value in turn.told}
        for _, question in mixed.probe_questions(conversation, position, 3):
            assert question.value is None or question.value in values
        assert asks or not mixed.probe_questions(conversation, position, 3)
    assert seen == {True, False}


def test_configuration_opens_each_with_its_own_validation(tmp_path: Path) -> None:
    """Catches validation on training conversations of a part of the mixture."""
    for split in ("train", "valid"):
        lines = (json.dumps(item.to_dict()) for item in conversations(split, 4))
        (tmp_path / f"some.{split}.jsonl").write_text("\n".join(lines))
    config = DataConfig.parse(
        {
            "dialogue_mixture": [
                {"dialogues": "builtin", "weight": 1},
                {"dialogues": str(tmp_path / "some.train.jsonl"), "weight": 1},
            ]
        },
        "data",
    )
    assert config.reads_builtin
    for split in ("train", "valid"):
        source = open_conversations(config, split)
        ids = {source.sample(position, 3).id.rsplit("-")[0] for position in range(30)}
        other = "valid" if split == "train" else "train"
        assert split in ids and other not in ids
    assert "builtin" in source.name and "some.train.jsonl" in source.name


def test_what_a_run_keeps_can_be_read_again() -> None:
    """Catches a configuration that is refused once its defaults are written out: such a run could
    not be resumed."""
    config = DataConfig.parse({"dialogue_mixture": [{"dialogues": "builtin", "weight": 1}]}, "data")
    assert DataConfig.parse(config.model_dump(mode="json"), "data") == config


def test_only_ids_that_match_are_read(tmp_path: Path) -> None:
    """Catches a pattern that is not asked of validation, or of one source only, or matched in the
    middle of an id."""
    for split in ("train", "valid"):
        rows = [item for name in ("a1", "a2", "ba1") for item in conversations(name, 3)]
        lines = (json.dumps(item.to_dict()) for item in rows)
        (tmp_path / f"some.{split}.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "some.train.jsonl")
    items = [
        {"dialogues": path, "weight": 1, "id_pattern": "a[12]-"},
        {"dialogues": path, "weight": 1, "id_pattern": "b"},
    ]
    config = DataConfig.parse({"dialogue_mixture": items[:1]}, "data")
    both = DataConfig.parse({"dialogue_mixture": items}, "data")
    alone = DataConfig.parse({"dialogues": path, "id_pattern": "a1"}, "data")
    for split in ("train", "valid"):
        for data, names in ((config, {"a1", "a2"}), (both, {"a1", "a2", "ba1"}), (alone, {"a1"})):
            source = open_conversations(data, split)
            ids = {source.sample(position, 3).id.split("-")[0] for position in range(40)}
            assert ids == names


def test_pattern_that_chooses_nothing_is_refused(tmp_path: Path) -> None:
    """Catches a misspelt pattern that ends as an empty source somewhere else."""
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(json.dumps(item.to_dict()) for item in conversations("a", 4)))
    with pytest.raises(UserError, match=r"id_pattern='c': no conversation .* first are 'a-0'"):
        open_conversations(DataConfig(dialogues=str(file), id_pattern="c"))
    with pytest.raises(UserError, match=r"id_pattern='\('.*regular expression"):
        DataConfig.parse({"dialogues": str(file), "id_pattern": "("}, "data")
    with pytest.raises(UserError, match=r"id_pattern='a'.*built-in dialogues have no ids"):
        DataConfig.parse(
            {"dialogue_mixture": [{"dialogues": "builtin", "weight": 1, "id_pattern": "a"}]}, "data"
        )


def test_two_ways_to_name_sources_are_refused() -> None:
    """Catches a source that is named and never read."""
    item = {"dialogues": "builtin", "weight": 1}
    with pytest.raises(UserError, match=r"data.dialogues='a.jsonl'.*leave these out"):
        DataConfig.parse({"dialogues": "a.jsonl", "dialogue_mixture": [item]}, "data")
    with pytest.raises(UserError, match=r"valid_dialogues='b.jsonl'.*leave these out"):
        DataConfig.parse({"valid_dialogues": "b.jsonl", "dialogue_mixture": [item]}, "data")
    with pytest.raises(UserError, match=r"id_pattern='qa1:'.*leave these out"):
        DataConfig.parse({"id_pattern": "qa1:", "dialogue_mixture": [item]}, "data")
    with pytest.raises(UserError, match="1 sources and 2 weights"):
        MixedConversations([GeneratedConversations(DialogueGenerator())], [1.0, 2.0])
    assert not DataConfig(dialogues="a.jsonl").reads_builtin
