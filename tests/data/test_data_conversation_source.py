"""What training reads: splits that do not mix, windows that are real turns, order by position."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import (
    Conversation,
    ConversationList,
    ConversationSource,
    DataConfig,
    DialogueGenerator,
    GeneratorConfig,
    Interaction,
    conversation_texts,
    open_conversations,
)
from rxlm.errors import UserError


def numbered(name: str, num_turns: int) -> Conversation:
    """Return a conversation whose turns are recognisable."""
    turns = tuple(Interaction(f"{name}-{turn}", "x") for turn in range(num_turns))
    return Conversation(turns, id=name, source="test")


def write(path: Path, *conversations: Conversation) -> str:
    """Write conversations as .jsonl."""
    path.write_text("".join(json.dumps(item.to_dict()) + "\n" for item in conversations))
    return str(path)


def ids(source: ConversationSource) -> list[str]:
    """Return the ids of one epoch."""
    assert source.size is not None
    return [source.sample(position, 99).id for position in range(source.size)]


def test_builtin_source_is_the_generator() -> None:
    """Catches a split or seed lost between configuration and generator."""
    config = DataConfig(generator=GeneratorConfig(seed=5))
    generator = DialogueGenerator(GeneratorConfig(seed=5))
    for split in ("train", "valid", "test"):
        source = open_conversations(config, split)
        assert source.size is None and source.has_probes
        assert source.sample(3, 6) == generator.conversation(3, 6, split)
        conversation = source.sample(0, 8)
        assert source.probe_questions(conversation, 1, 2) == generator.probe_questions(
            conversation, 1, 2
        )


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 50),
    num_turns=st.integers(1, 6),
)
def test_list_is_read_once_an_epoch_in_real_turns(
    lengths: list[int], seed: int, num_turns: int
) -> None:
    """Catches repeats, padding turns, windows with gaps, and samples that depend on history."""
    conversations = [numbered(str(index), length) for index, length in enumerate(lengths)]
    source = ConversationList(conversations, seed)
    samples = [source.sample(position, num_turns) for position in range(len(lengths))]
    names = [sample.interactions[0].query.split("-")[0] for sample in samples]
    assert sorted(names, key=int) == [str(index) for index in range(len(lengths))]
    for name, sample in zip(names, samples, strict=True):
        whole = conversations[int(name)]
        assert len(sample) == min(num_turns, len(whole))
        start = int(sample.interactions[0].query.split("-")[1])
        assert sample.interactions == whole.interactions[start : start + len(sample)]
    assert samples[-1] == ConversationList(conversations, seed).sample(len(lengths) - 1, num_turns)


def test_epochs_show_other_windows_of_long_conversations() -> None:
    """Catches windows that always begin at turn 0: later turns would never be trained on."""
    source = ConversationList([numbered("a", 10)], seed=0)
    starts = {source.sample(position, 4).interactions[0].query for position in range(200)}
    assert starts == {f"a-{turn}" for turn in range(7)}


def test_list_offers_probes_only_where_facts_are_told() -> None:
    """Catches probe training on data that has no facts, and facts in files left unused."""
    plain = ConversationList([numbered("a", 3)])
    assert not plain.has_probes and plain.probe_questions(plain.sample(0, 3), 0, 2) == []
    told = ConversationList([DialogueGenerator().conversation(0, 8)])
    assert told.has_probes and len(told.probe_questions(told.sample(0, 8), 0, 2)) == 2


def test_sibling_validation_file_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches validation on training data although the data set brings a validation file."""
    path = write(tmp_path / "a.train.jsonl", numbered("t1", 2), numbered("t2", 2))
    write(tmp_path / "a.valid.jsonl", numbered("v1", 2))
    write(tmp_path / "a.test.jsonl", numbered("x1", 2))
    with caplog.at_level(logging.INFO):
        for dialogues in (path, str(tmp_path), str(tmp_path / "*.jsonl")):
            config = DataConfig(dialogues=dialogues)
            assert sorted(ids(open_conversations(config, "train"))) == ["t1", "t2"]
            assert ids(open_conversations(config, "valid")) == ["v1"]
    assert "a.valid.jsonl" in caplog.text


def test_named_validation_file_wins(tmp_path: Path) -> None:
    """Catches part of the training file held out although validation was given."""
    path = write(tmp_path / "a.jsonl", numbered("t1", 2), numbered("t2", 2))
    config = DataConfig(
        dialogues=path, valid_dialogues=write(tmp_path / "b.jsonl", numbered("v1", 2))
    )
    assert sorted(ids(open_conversations(config, "train"))) == ["t1", "t2"]
    assert ids(open_conversations(config, "valid")) == ["v1"]
    builtin = DataConfig(dialogues=path, valid_dialogues="builtin")
    assert open_conversations(builtin, "valid").size is None


@pytest.mark.parametrize("num_conversations", [2, 10, 200])
def test_held_out_part_is_disjoint_and_stable(tmp_path: Path, num_conversations: int) -> None:
    """Catches validation on trained conversations, and a split that changes with file order."""
    conversations = [numbered(f"c{number}", 2) for number in range(num_conversations)]
    config = DataConfig(dialogues=write(tmp_path / "a.jsonl", *conversations))
    train = set(ids(open_conversations(config, "train")))
    valid = set(ids(open_conversations(config, "valid")))
    assert train and valid and not train & valid
    assert len(train | valid) == num_conversations
    assert len(valid) == max(1, round(0.05 * num_conversations))
    write(tmp_path / "a.jsonl", *reversed(conversations))
    assert set(ids(open_conversations(config, "valid"))) == valid


def test_sources_refuse_what_they_do_not_have(tmp_path: Path) -> None:
    """Catches silent substitutes: a test split of a file, an empty list, one lone conversation."""
    path = write(tmp_path / "a.jsonl", numbered("a", 2))
    with pytest.raises(UserError, match="has no split 'test'"):
        open_conversations(DataConfig(dialogues=path), "test")
    with pytest.raises(UserError, match="none can be held out"):
        open_conversations(DataConfig(dialogues=path), "valid")
    with pytest.raises(UserError, match="expected one of train, valid, test"):
        open_conversations(DataConfig(), "dev")
    with pytest.raises(UserError, match="no conversation"):
        ConversationList([])


def test_malformed_rows_follow_the_configuration(tmp_path: Path) -> None:
    """Catches an on_bad_record setting that does not reach the reader."""
    path = write(tmp_path / "a.train.jsonl", numbered("a", 2))
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"a\.train\.jsonl:2: not JSON"):
        open_conversations(DataConfig(dialogues=path))
    write(tmp_path / "a.valid.jsonl", numbered("v", 2))
    assert open_conversations(DataConfig(dialogues=path, on_bad_record="skip")).size == 1


def test_conversation_texts_leave_nothing_out() -> None:
    """Catches a tokenizer trained without the system text or the answers."""
    conversation = Conversation((Interaction("a", "b"), Interaction("c", "d")), system="s")
    assert list(conversation_texts([conversation])) == ["s", "a", "b", "c", "d"]


def test_real_training_file_has_its_validation_sibling(data_dir: Path) -> None:
    """Catches the sibling rule not matching how real files are named (.train.jsonl.gz)."""
    config = DataConfig(dialogues=str(data_dir / "dialogues" / "camrest676.train.jsonl.gz"))
    assert open_conversations(config, "train").size == 405
    assert open_conversations(config, "valid").size == 135
