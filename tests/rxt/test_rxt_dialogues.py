"""Conversations as tensors: nothing lost, nothing added, padding never a target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data import Conversation, Interaction
from rxlm.errors import UserError
from rxlm.rxt.dialogues import GROUPS, Row, TurnEncoder, bucketed, whole_dialogues
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer
from rxlm.tokenization.template import EncodedTurn

PAD = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["hello there"], TokenizerTraining(vocab_size=300))


def conversation(*queries: str, system: str | None = None) -> Conversation:
    turns = tuple(Interaction(query, f"answer to {query}") for query in queries)
    return Conversation(turns, system=system)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12),
    num_buckets=st.integers(1, 5),
)
def test_bucketing_keeps_every_row(sizes: list[tuple[int, int]], num_buckets: int) -> None:
    """A row lost, doubled, cut or shifted by sorting and padding; padding as a target."""
    rows = [
        Row(EncodedTurn([100 + i] * length, min(start, length)), i, i % len(GROUPS))
        for i, (length, start) in enumerate(sizes)
    ]
    seen = []
    for bucket in bucketed(rows, num_buckets, PAD):
        assert bucket.ids.shape == bucket.mask.shape == bucket.targets.shape
        assert bucket.mask[:, -1].any(), "a bucket is no wider than its longest row"
        for r, index in enumerate(bucket.place.tolist()):
            turn = rows[index].turn
            seen.append(index)
            length = len(turn.ids)
            assert bucket.ids[r].tolist() == turn.ids + [PAD] * (bucket.ids.shape[1] - length)
            assert bucket.mask[r].nonzero().flatten().tolist() == list(range(length))
            targets = bucket.targets[r].nonzero().flatten().tolist()
            assert targets == list(range(turn.answer_start, length))
            assert bucket.group[r] == rows[index].group
    assert sorted(seen) == list(range(len(rows)))
    assert len(bucketed(rows, num_buckets, PAD)) <= num_buckets


def test_targets_are_the_answer_with_its_markers(tokenizer: Tokenizer) -> None:
    """A model that never learns to begin ([A]) or to stop ([EOS]), or learns the user's words."""
    batch = whole_dialogues([conversation("hi")], TurnEncoder(tokenizer, 64))
    (rows,) = batch.answer
    learned = rows.ids[rows.targets].tolist()
    assert learned == [
        tokenizer.answer_id,
        *tokenizer.encode("answer to hi"),
        tokenizer.eos_id,
    ]


def test_ragged_dialogues_are_not_cut(tokenizer: Tokenizer) -> None:
    """Dialogues truncated to the shortest of the batch, or turns given to another dialogue."""
    dialogues = [conversation("a"), conversation("b", "c", "d"), conversation("e", "f")]
    batch = whole_dialogues(dialogues, TurnEncoder(tokenizer, 64), num_buckets=2)
    assert (batch.num_dialogues, batch.num_turns) == (3, 3)
    found = {}
    for rows in batch.encode:
        for ids, mask, index in zip(rows.ids, rows.mask, rows.place.tolist(), strict=True):
            found[divmod(index, 3)] = tokenizer.decode(ids[mask].tolist())
    assert {key: text[0] for key, text in found.items()} == {
        (0, 0): "a",
        (0, 1): "b",
        (1, 1): "c",
        (2, 1): "d",
        (0, 2): "e",
        (1, 2): "f",
    }
    real = sum(int(rows.mask.sum()) for rows in (*batch.encode, *batch.answer))
    assert batch.num_tokens == real


def test_a_system_prompt_is_written_first_and_never_answered(tokenizer: Tokenizer) -> None:
    """A system prompt that is dropped, predicted, or that shifts what an answer may read."""
    dialogues = [conversation("a", system="be brief"), conversation("b")]
    batch = whole_dialogues(dialogues, TurnEncoder(tokenizer, 64), num_buckets=1)
    (encode,), (answer,) = batch.encode, batch.answer
    assert sorted(encode.place.tolist()) == [0, 1, 2]  # system, b, a
    assert sorted(answer.place.tolist()) == [1, 2]  # b reads 0 writes, a reads 1 (the system's)
    system = encode.ids[encode.place.tolist().index(0)]
    assert tokenizer.internal_id in system
    assert tokenizer.answer_id not in system


def test_a_turn_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    """Silent truncation, which would cut off answers and [EOS]."""
    encoder = TurnEncoder(tokenizer, 12)
    assert len(encoder.interaction("abc", "b").ids) <= 12
    with pytest.raises(UserError, match="seq_len=12"):
        encoder.interaction("a long question" * 3, "b")
    with pytest.raises(UserError, match="system prompt"):
        encoder.system("a long system prompt" * 3)


def test_the_cache_of_turns_changes_nothing(tokenizer: Tokenizer) -> None:
    """A cached turn that is returned for other text."""
    cached, plain = TurnEncoder(tokenizer, 64, cache_size=2), TurnEncoder(tokenizer, 64, 0)
    pairs = [("a", "bc"), ("ab", "c"), ("a", "bc"), ("x", "y"), ("ab", "c")]
    assert [cached.interaction(*pair) for pair in pairs] == [
        plain.interaction(*pair) for pair in pairs
    ]
