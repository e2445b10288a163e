"""Batches against single conversations, for every attention type with and without experts.

What the held batch adds (modes, resets, leaving early) is in test_rxt_batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.rxt.attention_heads import LINEAR_KINDS
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]

NUM_TOKENS = 64
QUERIES = [[2, 5, 40, 41, 42], [], [2, 5, 7, 100, 101, 102, 103]]
NEXT_QUERIES = [[2, 5, 12, 13, 14, 15], [2, 5, 90], []]
"""Row 1 joins in the second turn, row 2 leaves after the first."""
FINE = {"atol": 1e-6, "rtol": 1e-6}
"""Rotary phases and memory norms compute in float32 even in a float64 model, so that a last bit of
the sums before them may come out one float32 unit apart. A padded token that is read counts far
more."""
EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1,
    "shared_expert_dim": 8,
}  # fmt: skip

PENALTIES = [1.0, 1.2, 1.3]
"""Of repetition: without one, an answer may be a single word 64 times over."""

kinds = pytest.mark.parametrize("kind", ["mha", "gqa", "mqa", "sqa", "local", *LINEAR_KINDS])
experts = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])


def model_of(make_model: ModelBuilder, kind: str, *, moe: bool) -> RxTAlpha:
    """A model in float64 whose layers all do something, and which never ends an answer."""
    fields: dict[str, Any] = {
        "num_layers": 1, "seq_len": 96, "att_query_groups": 2, "local_window_size": 8,
    }  # fmt: skip
    if kind in LINEAR_KINDS:
        fields |= {"use_linear_self_attn": True, "linear_attn_type": kind}
        fields |= {"linear_attn_use_short_conv": True}
    else:
        fields["self_att_type"] = kind
    model = make_model(eos_bias=-1e4, **fields, **(EXPERTS if moe else {})).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # At its start a model mostly repeats the last token, which would test little.
        for layer in (*model.decoder.all_layers, *model.encoder.all_layers):
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    return model


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows with padding on both sides, over ids that would be noticed if they were read."""
    width = max(len(row) for row in rows) + 3
    ids, mask = torch.full((len(rows), width), 77), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        end = width - 1 - index % 2
        ids[index, end - len(row) : end] = torch.tensor(row, dtype=torch.long)
        mask[index, end - len(row) : end] = True
    return {"input_ids": ids, "attention_mask": mask}


def close(one: ConversationState, other: ConversationState) -> None:
    torch.testing.assert_close(one.slots, other.slots, **FINE)
    assert (one.draws, one.num_turns) == (other.draws, other.num_turns)
    if one.carried is not None and other.carried is not None:
        torch.testing.assert_close(one.carried.states, other.carried.states, **FINE)
        assert torch.equal(one.carried.started, other.carried.started)


@experts
@kinds
def test_a_batch_talks_like_each_conversation_alone(
    kind: str, moe: bool, make_model: ModelBuilder
) -> None:
    """Catches rows that see the neighbours, their padding or their endings, in any of 64 greedy
    steps, in what is written to memory, or in the turn after it."""
    model = model_of(make_model, kind, moe=moe)
    model.set_batch_mode(True, batch_size=3, seed=5)
    start = model.export_conversation()
    limit = NUM_TOKENS + 9
    said, after = [], []
    for queries, max_seq_len in ((QUERIES, limit), (NEXT_QUERIES, 20)):
        said.append(
            model.batch_interactions(
                **left_padded(queries),
                max_seq_len=max_seq_len,
                temperature=0,
                repetition_penalty=PENALTIES,
            )
        )
        after.append(model.export_conversation())
    model.set_batch_mode(False)
    assert min(said[0].mask.sum(dim=1)[[0, 2]]) >= NUM_TOKENS
    for row in range(3):
        model.load_stm_state(start.select([row]))
        for turn, max_seq_len in enumerate((limit, 20)):
            query = (QUERIES, NEXT_QUERIES)[turn][row]
            alone = []
            if query:
                steps = model.interact(
                    torch.tensor([query]),
                    max_seq_len=max_seq_len,
                    temperature=0,
                    repetition_penalty=PENALTIES[row],
                )
                alone = list(steps)[:-2]
            together = said[turn].ids[row][said[turn].mask[row]].tolist()
            assert together == alone
            close(model.export_conversation(), after[turn].select([row]))
    assert len(set(said[0].ids[2].tolist())) > 4, "an answer of one word tests little"
    assert not torch.equal(after[0].slots[:, 0], start.slots[:, 0])


@experts
@kinds
@torch.no_grad()
def test_padding_does_not_reach_memory(kind: str, moe: bool, make_model: ModelBuilder) -> None:
    """Catches a turn that is remembered differently because of padding on its left, on its right,
    more of it, other ids under it, or beside a longer turn."""
    model = model_of(make_model, kind, moe=moe)
    turn = [2, 5, 40, 41, 42, 6, 50, 51, 52, 53, 3]
    state = model.update_memory(model.new_conversation(1, seed=2), [[2, 5, 7, 6, 8, 3]])
    expected = model.update_memory(state, [turn])
    changed = torch.linalg.vector_norm(expected.slots - state.slots)
    assert changed > 1e-2
    for left, right, filler in ((0, 1, 0), (0, 9, 77), (1, 0, 0), (7, 0, 88), (3, 4, 99)):
        ids = torch.tensor([[filler] * left + turn + [filler] * right])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, left : left + len(turn)] = True
        written = model.write_memory(state.slots, ids, mask)
        torch.testing.assert_close(written, expected.slots, **FINE)
        carried = model._carry(state.slots, ids, mask, state.carried)
        close(expected.replaced(slots=written, carried=carried), expected)
    longer = [*turn[:-1], *range(60, 80), 3]
    beside = model.update_memory(state.repeat(3), [longer, turn, []])
    close(beside.select([1]), expected)
    assert torch.equal(beside.slots[:, 2], state.slots[:, 0])
