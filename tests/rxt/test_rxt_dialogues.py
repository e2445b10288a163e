"""Batches of dialogues: every turn once, in the right place, learned from [A] to [EOS].

Not here: what the model does with them (test_rxt_unroll).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rxlm.data.conversations import Conversation, Interaction
from rxlm.errors import UserError
from rxlm.rxt.dialogues import (
    GROUPS,
    DialogueBatch,
    Row,
    Rows,
    TurnEncoder,
    bucketed,
    dialogue_batch,
    group_of,
    whole_dialogues,
)
from rxlm.tokenization import Tokenizer
from rxlm.tokenization.template import EncodedTurn, encode_interaction, encode_system


def conversation(*turns: tuple[str, str], system: str | None = None) -> Conversation:
    return Conversation(tuple(Interaction(*turn) for turn in turns), system=system)


RAGGED = (
    conversation(("hi", "hello"), ("my name is ann", "nice to meet you, ann"), ("bye", "bye")),
    conversation(
        ("what is my name", "i do not know"), ("oh", "yes"), ("so", "no"), system="you are kind"
    ),
    conversation(("a", "b"), ("what now", "your name is ann and that is a long answer")),
)
"""Dialogues of 3 turns, of 3 after a system prompt, and of 2."""


def content(rows: tuple[Rows, ...]) -> list[tuple[int, list[int], list[int], int]]:
    """Return (place, ids, target ids, group) of every row of every bucket, sorted."""
    found = []
    for bucket in rows:
        for r in range(len(bucket.place)):
            ids, mask, targets = bucket.ids[r], bucket.mask[r], bucket.targets[r]
            found.append(
                (
                    int(bucket.place[r]),
                    ids[mask].tolist(),
                    ids[targets].tolist(),
                    int(bucket.group[r]),
                )
            )
    return sorted(found)


def batch_of(tiny_tokenizer: Tokenizer, num_buckets: int = 3) -> DialogueBatch:
    return whole_dialogues(RAGGED, TurnEncoder(tiny_tokenizer, 200), num_buckets=num_buckets)


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 50])
def test_every_turn_is_encoded_and_answered_once(
    tiny_tokenizer: Tokenizer, num_buckets: int
) -> None:
    """Catches a turn that is lost, doubled, or filed under another dialogue or position, and a
    system prompt that is answered or not counted as turn 0."""
    expected_encode: list[tuple[int, list[int], list[int], int]] = []
    expected_answer: list[tuple[int, list[int], list[int], int]] = []
    for b, item in enumerate(RAGGED):
        turns = [encode_interaction(tiny_tokenizer, i.query, i.answer) for i in item.interactions]
        first = 0
        if item.system:
            expected_encode.append((b, encode_system(tiny_tokenizer, item.system), [], 0))
            first = 1
        for n, turn in enumerate(turns, start=first):
            row = (n * 3 + b, turn.ids, turn.ids[turn.answer_start :], 0)
            expected_encode.append(row)
            expected_answer.append(row)
    batch = batch_of(tiny_tokenizer, num_buckets)
    assert content(batch.encode) == sorted(expected_encode)
    assert content(batch.answer) == sorted(expected_answer)
    assert (batch.num_dialogues, batch.num_turns) == (3, 4)
    assert batch.num_tokens == sum(
        len(ids) for _, ids, _, _ in (*expected_encode, *expected_answer)
    )


def test_targets_are_the_answer_with_its_marks(tiny_tokenizer: Tokenizer) -> None:
    """Catches a model that never learns to begin ([A]) or to end ([EOS]), or that learns to
    speak for the user."""
    for bucket in batch_of(tiny_tokenizer).answer:
        for ids, targets in zip(bucket.ids, bucket.targets, strict=True):
            learned = ids[targets].tolist()
            assert learned[0] == tiny_tokenizer.answer_id and learned[-1] == tiny_tokenizer.eos_id
            assert tiny_tokenizer.query_id not in learned and tiny_tokenizer.pad_id not in learned
            rest = ids[~targets].tolist()
            assert tiny_tokenizer.answer_id not in rest and tiny_tokenizer.eos_id not in rest
            spans = targets.nonzero().flatten()
            assert torch.equal(spans, torch.arange(int(spans[0]), int(spans[-1]) + 1))


def test_rows_are_padded_on_the_right_only(tiny_tokenizer: Tokenizer) -> None:
    """Catches a mask that hides text, shows padding, or leaves a hole."""
    for bucket in (*batch_of(tiny_tokenizer).encode, *batch_of(tiny_tokenizer).answer):
        lengths = bucket.mask.sum(dim=1)
        assert torch.equal(bucket.mask, torch.arange(bucket.ids.shape[1]) < lengths[:, None])
        assert (bucket.ids[~bucket.mask] == tiny_tokenizer.pad_id).all()
        assert not (bucket.targets & ~bucket.mask).any()
        assert bucket.ids.dtype == bucket.place.dtype == bucket.group.dtype == torch.int64


@given(
    lengths=st.lists(st.integers(2, 20), max_size=12),
    num_buckets=st.integers(1, 15),
)
def test_buckets_share_out_rows_by_length(lengths: list[int], num_buckets: int) -> None:
    """Catches rows of very different length padded together, buckets wider than their longest
    row, more buckets than asked for, and empty ones."""
    rows = [
        Row(EncodedTurn(list(range(100, 100 + n)), n // 2), index, index % 4)
        for index, n in enumerate(lengths)
    ]
    buckets = bucketed(rows, num_buckets, pad_id=7)
    assert len(buckets) <= num_buckets
    previous = 0
    for bucket in buckets:
        sizes = bucket.mask.sum(dim=1)
        assert bucket.ids.shape[1] == sizes.max() and sizes.min() >= previous
        previous = int(sizes.max())
    expected = [(row.place, row.turn.ids, row.turn.ids[len(row.turn.ids) // 2 :], row.group)
                for row in rows]  # fmt: skip
    assert content(buckets) == expected


def test_a_turn_that_does_not_fit_is_refused(tiny_tokenizer: Tokenizer) -> None:
    """Catches silent truncation: the message says how long the turn is, what the limit is, which
    turn it is and what to do; a turn of exactly the limit fits."""
    length = len(encode_interaction(tiny_tokenizer, "what is my name", "ann").ids)
    assert (
        len(TurnEncoder(tiny_tokenizer, length).interaction("what is my name", "ann").ids) == length
    )
    with pytest.raises(UserError) as caught:
        TurnEncoder(tiny_tokenizer, length - 1).interaction("what is my name", "ann")
    message = str(caught.value)
    for part in (f"{length} tokens", f"seq_len={length - 1}", "what is my name"):
        assert part in message
    system = len(encode_system(tiny_tokenizer, "be kind"))
    assert len(TurnEncoder(tiny_tokenizer, system).system("be kind").ids) == system
    with pytest.raises(UserError, match=f"system prompt has {system} tokens.*seq_len={system - 1}"):
        TurnEncoder(tiny_tokenizer, system - 1).system("be kind")


def test_the_length_check_agrees_with_the_tokenizer(tiny_tokenizer: Tokenizer) -> None:
    """Catches a short cut by the number of bytes that overlooks a turn which does not fit."""
    for item in RAGGED:
        for turn in item.interactions:
            length = len(encode_interaction(tiny_tokenizer, turn.query, turn.answer).ids)
            alone = Conversation((turn,), id="c-7")
            TurnEncoder(tiny_tokenizer, length).check_lengths([alone], "x")
            with pytest.raises(UserError, match=r"1 of 1 turns.*conversation 'c-7'"):
                TurnEncoder(tiny_tokenizer, length - 1).check_lengths([alone], "x")


@pytest.mark.parametrize("cache_size", [0, 1, 100])
def test_remembered_turns_are_the_right_ones(tiny_tokenizer: Tokenizer, cache_size: int) -> None:
    """Catches a cache keyed by the query alone, and one that stops encoding when it is full."""
    encoder = TurnEncoder(tiny_tokenizer, 100, cache_size=cache_size)
    for query, answer in (("a", "b"), ("a", "c"), ("ab", ""), ("a", "b")):
        assert encoder.interaction(query, answer) == encode_interaction(
            tiny_tokenizer, query, answer
        )


def test_kinds_of_turns_are_measured_apart(tiny_tokenizer: Tokenizer) -> None:
    """Catches questions about facts counted as small talk, which hides that nothing is recalled."""
    kinds = {"chat": "chat", "fact": "chat", "update": "chat", "question": "recall",
             "unknown": "unknown"}  # fmt: skip
    turns = tuple(Interaction(f"q{n}", "a", kind=kind) for n, kind in enumerate(kinds))
    assert [GROUPS[group_of(turn)] for turn in turns] == list(kinds.values())
    batch = whole_dialogues([Conversation(turns)], TurnEncoder(tiny_tokenizer, 50))
    groups = [GROUPS[group] for _, _, _, group in content(batch.answer)]
    assert groups == list(kinds.values())


def test_nothing_to_answer_is_an_empty_batch(tiny_tokenizer: Tokenizer) -> None:
    """Catches a crash on a batch whose turns are all written and none is answered."""
    turn = encode_interaction(tiny_tokenizer, "a", "b")
    batch = dialogue_batch(
        [Row(turn, 0, 0)], [], num_dialogues=1, num_turns=1, num_buckets=2, pad_id=0
    )
    assert batch.answer == () and len(batch.encode) == 1
    assert batch.num_tokens == len(turn.ids)


def test_turns_that_do_not_fit_are_found_before_training(tiny_tokenizer: Tokenizer) -> None:
    """A run that dies at step 3,000 because one turn of the file is too long."""
    short = Conversation((Interaction("Hi.", "Hello."),), id="short")
    long = Conversation(
        (
            Interaction("Hi.", "Hello."),
            Interaction("word " * 60, "Yes."),
        ),
        id="long",
    )
    turns = TurnEncoder(tiny_tokenizer, seq_len=40)
    turns.check_lengths([short], "file")
    with pytest.raises(UserError, match=r"file: 1 of 3 turns .*turn 2 of conversation 'long'"):
        turns.check_lengths([short, long], "file")
