"""Decoding: the cache against the full forward, batches against single rows, limits, modes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rxlm.errors import UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerStream
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]

DRAWN = SamplingSettings(temperature=0.9, top_p=0.97, repetition_penalty=1.1)
PROMPTS = [[2, 5, 40, 41, 42], [2, 5, 90], [2, 5, 7, 100, 101, 102, 103, 104], [2, 5, 12, 13]]


@pytest.fixture(scope="module")
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model()


def remembering(model: RxTAlpha, batch_size: int, seed: int = 0) -> ConversationState:
    """Conversations with different things in memory."""
    turns = [[2, 5, 30 + row, 6, 50 + 3 * row, 3] for row in range(batch_size)]
    return model.update_memory(model.new_conversation(batch_size, seed=seed), turns)


@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
@settings(max_examples=15)
def test_prefill_and_steps_equal_one_full_forward(
    model: RxTAlpha, pieces: list[int], left: int, right: int
) -> None:
    """Catches wrong positions, a wrong mask or a lost key in the cache, padding on either side."""
    length = sum(pieces)
    ids = torch.randint(11, 90, (2, length), generator=torch.Generator().manual_seed(length))
    memory = model.decoder.read_memory(remembering(model, 2).slots)
    with torch.no_grad():
        full, _ = model.decoder(ids, memory=memory)
        cache, hidden = None, []
        for start, piece in zip(
            [sum(pieces[:index]) for index in range(len(pieces))], pieces, strict=True
        ):
            new = nn.functional.pad(ids[:, start : start + piece], (left, right))
            mask = torch.zeros_like(new, dtype=torch.bool)
            mask[:, left : left + piece] = True
            before = (
                None if cache is None else [key_value.key.clone() for key_value in cache.layers]
            )
            part, next_cache = model.decoder(new, mask, memory=memory, cache=cache)
            if cache is not None and before is not None:
                for key_value, key in zip(cache.layers, before, strict=True):
                    assert torch.equal(key_value.key, key), "the cache that was passed in changed"
            cache = next_cache
            hidden.append(part[:, left : left + piece])
    torch.testing.assert_close(torch.cat(hidden, dim=1), full, atol=1e-5, rtol=1e-5)


def test_greedy_answers_are_those_of_repeated_full_forwards(model: RxTAlpha) -> None:
    """Catches a stream that reads logits at a wrong position or feeds a wrong token back."""
    state = remembering(model, 1)
    ids = [*PROMPTS[0], 6]
    memory = model.decoder.read_memory(state.slots)
    for _ in range(12):
        with torch.no_grad():
            hidden, _ = model.decoder(torch.tensor([ids]), memory=memory)
        ids.append(int(model.decoder.logits(hidden[0, -1]).argmax()))
    generated = model.generate(state, [PROMPTS[0]], GREEDY, max_new_tokens=12)
    assert generated.answers[0].ids == ids[len(PROMPTS[0]) + 1 :]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_answers_like_each_conversation_alone(
    make_model: ModelBuilder, sampling: SamplingSettings
) -> None:
    """Catches rows that see each other's padding, memory, draws or endings."""
    model = make_model(eos_bias=6.0)
    state = remembering(model, 4, seed=7)
    together = model.generate(state, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(state.select([row]), [prompt], sampling)
        assert alone.answers[0] == together.answers[row]
        assert alone.state.draws[0] == together.state.draws[row]
    if sampling is DRAWN:
        lengths = {len(answer.ids) for answer in together.answers}
        assert len(lengths) > 1, "the answers should end at different steps"


def test_memory_decides_the_answer(model: RxTAlpha) -> None:
    """Catches decoding that does not read the memory (the tests above would not notice)."""
    state = remembering(model, 2)
    one, other = model.generate(state, [PROMPTS[0]] * 2, GREEDY, max_new_tokens=12).answers
    assert one.ids != other.ids


def test_draws_depend_on_seed_and_count_only(make_model: ModelBuilder) -> None:
    """Catches hidden randomness: the same state gives the same answer, the next one another."""
    model = make_model()
    state = remembering(model, 1, seed=11)
    first = model.generate(state, [PROMPTS[0]], DRAWN)
    torch.manual_seed(99)
    again = model.generate(state, [PROMPTS[0]], DRAWN)
    assert first.answers == again.answers
    assert first.state.draws == again.state.draws == (len(first.answers[0].ids) + 1,)
    later = model.generate(first.state, [PROMPTS[0]], DRAWN)
    assert later.answers != first.answers
    other_seed = model.generate(state.replaced(seeds=(12,)), [PROMPTS[0]], DRAWN)
    assert other_seed.answers != first.answers


def test_generation_leaves_the_state_alone(model: RxTAlpha) -> None:
    """Catches answers that write to the memory they read."""
    state = remembering(model, 2)
    before = state.slots.clone()
    result = model.generate(state, PROMPTS[:2], GREEDY)
    assert torch.equal(state.slots, before) and state.draws == (0, 0)
    assert torch.equal(result.state.slots, before)


@pytest.mark.parametrize("max_seq_len", [8, 20, 48, None])
def test_a_cut_answer_leaves_room_for_eos(model: RxTAlpha, max_seq_len: int | None) -> None:
    """Catches turns longer than the limit, or without [EOS], entering memory."""
    answer = model.generate(
        remembering(model, 1), [PROMPTS[0]], GREEDY, max_seq_len=max_seq_len
    ).answers[0]
    assert answer.reason == "length"
    assert len(answer.turn) == (max_seq_len or 48)
    assert answer.turn == [*PROMPTS[0], 6, *answer.ids, 3]


def test_max_new_tokens_counts_the_answer_only(make_model: ModelBuilder) -> None:
    """Catches an off-by-one: an answer that ends exactly at the limit was ended by the model."""
    model = make_model(eos_bias=6.0)
    state = remembering(model, 1, seed=3)
    whole = model.generate(state, [PROMPTS[0]], DRAWN).answers[0]
    assert whole.reason == "eos" and len(whole.ids) > 1
    exact = model.generate(state, [PROMPTS[0]], DRAWN, max_new_tokens=len(whole.ids)).answers[0]
    assert exact == whole
    cut = model.generate(state, [PROMPTS[0]], DRAWN, max_new_tokens=len(whole.ids) - 1).answers[0]
    assert (cut.reason, cut.ids) == ("length", whole.ids[:-1])


def test_a_stream_gives_each_token_once_and_none_after_the_end(make_model: ModelBuilder) -> None:
    """Catches streams that lose or repeat tokens of one row when another has ended."""
    model = make_model(eos_bias=6.0)
    state = remembering(model, 4, seed=7)
    stream = model.stream(state, PROMPTS, DRAWN)
    steps = list(stream)
    assert stream.done and next(stream, None) is None
    for row, answer in enumerate(stream.answers()):
        column = [step[row] for step in steps]
        ended = [3] if answer.reason == "eos" else []
        expected = [*answer.ids, *ended]
        assert column[: len(expected)] == expected
        assert set(column[len(expected) :]) <= {None}
        assert stream.state.draws[row] == len(answer.ids) + 1


def test_a_stopped_stream_ends_with_what_was_said(model: RxTAlpha) -> None:
    """Catches a stop that loses the answer so far or computes on."""
    stream = model.stream(remembering(model, 1), [PROMPTS[0]], GREEDY)
    said = [next(stream)[0] for _ in range(3)]
    stream.stop()
    assert list(stream) == []
    answer = stream.answers()[0]
    assert answer.reason == "stopped"
    assert answer.turn == [*PROMPTS[0], 6, *said, 3]


def test_an_answer_token_in_the_prompt_is_not_doubled(model: RxTAlpha) -> None:
    """Catches '[A] [A]' for callers whose prompt has it already."""
    state = remembering(model, 1)
    without = model.generate(state, [PROMPTS[0]], GREEDY)
    given_one = model.generate(state, [[*PROMPTS[0], 6]], GREEDY)
    assert without.answers == given_one.answers


@pytest.mark.parametrize(
    ("prompts", "limit", "message"),
    [
        ([[2, 5, *range(20, 70)]], None, "52 tokens.*needs 55.*seq_len is 48"),
        ([[2, 5, 20, 21]], 6, "4 tokens.*needs 7.*max_seq_len is 6.*raise max_seq_len"),
        ([[]], None, "empty"),
        ([[2, 5, 100000]], None, "token id 100000.*vocabulary"),
        ([[2, 5, -1]], None, "token id -1"),
        ([[2, 5], [2, 5]], None, "2 prompts for 1 conversations"),
        ([[2, 5, 20]], 0, "max_seq_len=0"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(
    model: RxTAlpha, prompts: list[list[int]], limit: int | None, message: str
) -> None:
    """Catches queries that are cut silently, or fail deep inside an embedding."""
    with pytest.raises(UserError, match=message):
        model.stream(model.new_conversation(), prompts, max_seq_len=limit)


def test_nothing_of_the_evaluation_shows_between_steps(make_model: ModelBuilder) -> None:
    """Catches streams that leave gradients off or dropout off while their reader works."""
    model = make_model(ff_dropout=0.5, att_dropout=0.5).train()
    model.memory_attention.eval()
    modes = [part.training for part in model.modules()]
    stream = AnswerStream(model, model.new_conversation(), [PROMPTS[0]], GREEDY)
    first = []
    for step in stream:
        first.append(step)
        assert torch.is_grad_enabled()
        assert [part.training for part in model.modules()] == modes
        if len(first) == 5:
            break
    evaluated = model.eval().generate(
        model.new_conversation(), [PROMPTS[0]], GREEDY, max_new_tokens=5
    )
    assert [step[0] for step in first] == evaluated.answers[0].ids, "dropout was active"


def test_evaluation_mode_lasts_until_the_last_thread_leaves() -> None:
    """Catches a thread that switches dropout on again under another that still computes."""
    module = nn.Sequential(nn.Dropout(), nn.Dropout())
    module[1].eval()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with evaluation_mode(module):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with evaluation_mode(module):
        thread.start()
        assert inside.wait(10)
    assert not any(part.training for part in module.modules())
    leave.set()
    thread.join()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_padding_keeps_ragged_and_empty_rows_apart() -> None:
    """Catches a mask that counts filler as real, and a width of zero."""
    ids, mask = padded([[7, 8], [], [9]], 0)
    assert ids.tolist() == [[7, 8], [0, 0], [9, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    assert padded([[], []], 0)[0].shape == (2, 1)
