"""Answers that join and leave a batch (``rxlm.rxt.answer_batch``), against the same alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt.answer_batch import AnswerBatch
from rxlm.rxt.answer_row import Answer, AnswerRow
from rxlm.rxt.attention_heads import LINEAR_KINDS
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.decode_batch import fill_holes
from rxlm.rxt.generation import AnswerLimits, answer_row
from rxlm.rxt.models import RxTAlpha, RxTBeta
from rxlm.tokenization import Tokenizer

ModelBuilder = Callable[..., RxTAlpha]

KINDS = ["mha", "gqa", "mqa", "sqa", "local", *LINEAR_KINDS]
EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1,
    "shared_expert_dim": 8,
}  # fmt: skip
SETTINGS = [
    GREEDY,
    SamplingSettings(temperature=0.0, repetition_penalty=1.3),
    SamplingSettings(temperature=1.0, top_k=20),
    SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
]


def model_of(make_model: ModelBuilder, kind: str, **fields: Any) -> RxTAlpha:
    fields = {
        "num_layers": 2,
        "seq_len": 96,
        "att_query_groups": 2,
        "local_window_size": 8,
    } | fields
    if kind in LINEAR_KINDS:
        fields |= {"use_linear_self_attn": True, "linear_attn_type": kind}
        fields |= {"linear_attn_use_short_conv": True}
    else:
        fields["self_att_type"] = kind
    model = make_model(eos_bias=1.0, **fields).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # At its start a model mostly repeats the last token, which would test little.
        for layer in (*model.decoder.all_layers, *model.encoder.all_layers):
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    return model


def conversations(model: RxTAlpha, count: int) -> list[ConversationState]:
    """Conversations with different pasts: different memories, carried states and draws."""
    states = []
    for row in range(count):
        state = model.new_conversation(seed=row)
        for turn in range(row % 3):
            state = model.update_memory(state, [[2, 5, 20 + row, 40 + turn, 6, 60 + row, 3]])
        states.append(state)
    return states


def prompts(count: int) -> list[list[int]]:
    return [[2, 5, *range(30 + row, 34 + row + 5 * (row % 4))] for row in range(count)]


def alone(
    model: RxTAlpha,
    state: ConversationState,
    prompt: list[int],
    chosen: SamplingSettings,
    most: int,
) -> tuple[Answer, int]:
    answers, after = model.generate(state, [prompt], chosen, max_new_tokens=most)
    return answers[0], after.draws[0]


def row_of(
    model: RxTAlpha,
    state: ConversationState,
    prompt: list[int],
    chosen: SamplingSettings,
    most: int,
) -> AnswerRow:
    limits = AnswerLimits(None, most)
    return answer_row(
        model, prompt, limits, model.answer_form(), chosen, state.seeds[0], state.draws[0]
    )


def run(
    model: RxTAlpha,
    states: list[ConversationState],
    rows: list[AnswerRow],
    arrivals: list[int],
    most_rows: int,
) -> None:
    """Let row i join at step ``arrivals[i]`` at the earliest, when there is a place."""
    batch, waiting, step = AnswerBatch(model), list(range(len(rows))), 0
    while waiting or batch.rows:
        room = most_rows - len(batch.rows)
        joining = [index for index in waiting if arrivals[index] <= step][:room]
        if joining:
            state = ConversationState.stack([states[index] for index in joining])
            batch.join(state, [rows[index] for index in joining])
            waiting = [index for index in waiting if index not in joining]
            batch.leave()
        batch.step()
        batch.leave()
        step += 1
    assert not batch.errors


@pytest.mark.parametrize(
    ("kind", "moe"), [*((kind, False) for kind in KINDS), ("gqa", True), ("md_gdn", True)]
)
def test_joining_and_leaving_changes_no_answer(
    make_model: ModelBuilder, kind: str, moe: bool
) -> None:
    """Fails if a row reads a neighbour's keys, place, memory, carried state or draws, if a buffer
    loses something when it grows, or if the row that fills a hole is not wholly moved."""
    model = model_of(make_model, kind, **(EXPERTS if moe else {}))
    count = 9
    states, given_prompts = conversations(model, count), prompts(count)
    most = [1, 30, 7, 70, 12, 3, 25, 18, 40]
    chosen = [SETTINGS[index % len(SETTINGS)] for index in range(count)]
    rows = [
        row_of(model, *parts) for parts in zip(states, given_prompts, chosen, most, strict=True)
    ]
    run(model, states, rows, arrivals=[0, 0, 1, 1, 2, 5, 9, 9, 30], most_rows=5)
    expected = [
        alone(model, *parts) for parts in zip(states, given_prompts, chosen, most, strict=True)
    ]
    # One by one: pytest explains lists of long lists for minutes.
    for row, (answer, draws) in zip(rows, expected, strict=True):
        said = row.answer()
        assert said.ids == answer.ids
        assert (said.reason, row.draws) == (answer.reason, draws) and said.turn == answer.turn
    assert len({len(answer.ids) for answer, _ in expected}) > 3, "the test needs different lengths"


def test_a_model_that_thinks_keeps_its_form(tiny_tokenizer: Tokenizer) -> None:
    """Fails if forms of different modes are mixed up in one batch."""
    sizes = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 48}
    part = {**sizes, "vocab_size": tiny_tokenizer.vocab_size, "ff_dim": 16}
    part |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**sizes, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RxTBeta(part, part, memory, tokenizer=tiny_tokenizer).double().eval()
    states, given_prompts = conversations(model, 6), prompts(6)
    modes = ["fast", "extended", "auto"] * 2
    rows = [
        answer_row(
            model, prompt, AnswerLimits(None, 12), model.answer_form(mode), SETTINGS[2],
            state.seeds[0], state.draws[0],
        )
        for state, prompt, mode in zip(states, given_prompts, modes, strict=True)
    ]  # fmt: skip
    run(model, states, rows, arrivals=[0, 0, 1, 2, 3, 3], most_rows=4)
    for row, state, prompt, mode in zip(rows, states, given_prompts, modes, strict=True):
        expected = model.generate(
            state, [prompt], SETTINGS[2], max_new_tokens=12, thinking_mode=mode
        )
        assert row.answer() == expected.answers[0]


def test_one_diverged_memory_fails_alone(make_model: ModelBuilder) -> None:
    """Fails if scores that are not finite end the answers of the neighbours."""
    model = model_of(make_model, "gqa")
    states = conversations(model, 3)
    states[1] = states[1].replaced(slots=torch.full_like(states[1].slots, float("nan")))
    rows = [
        row_of(model, state, prompt, GREEDY, 8)
        for state, prompt in zip(states, prompts(3), strict=True)
    ]
    batch = AnswerBatch(model)
    batch.join(ConversationState.stack(states), rows)
    assert [row for row in batch.errors] == [rows[1]]
    assert batch.leave() == [rows[1]]
    while batch.rows:
        batch.step()
        batch.leave()
    for index in (0, 2):
        assert rows[index].answer() == alone(model, states[index], prompts(3)[index], GREEDY, 8)[0]


def test_grad_mode_does_not_leak(make_model: ModelBuilder) -> None:
    model = model_of(make_model, "gqa")
    batch = AnswerBatch(model)
    state = model.new_conversation()
    batch.join(state, [row_of(model, state, [2, 5, 7], GREEDY, 4)])
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    batch.step()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@settings(max_examples=50)
@given(st.integers(1, 12), st.data())
def test_holes_are_filled_from_the_end(count: int, data: st.DataObject) -> None:
    """Fails if a row is lost, doubled, or moved although it could stay."""
    leaving = data.draw(st.sets(st.integers(0, count - 1)))
    moves = fill_holes(count, leaving)
    assert sorted(moves.order) == [row for row in range(count) if row not in leaving]
    moved = [new for new, old in enumerate(moves.order) if new != old]
    assert moved == moves.targets and [moves.order[new] for new in moved] == moves.sources
