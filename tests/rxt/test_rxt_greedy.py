"""Greedy answers against the plainest decoding: the whole turn again for every token.

For every type of self-attention, dense and with experts, alone and in a batch of rows of different
length, with layers without memory around those with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rxlm.ops.sampling import GREEDY
from rxlm.rxt.attention_heads import LINEAR_KINDS
from rxlm.rxt.models import RxTAlpha

NUM_TOKENS = 64
PROMPTS = [[2, 5, 40, 41, 42, 6], [2, 5, 90, 6], [2, 5, 7, 100, 101, 102, 103, 6]]
EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1,
    "shared_expert_dim": 8,
}  # fmt: skip


def fields_of(kind: str, *, moe: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "num_layers": 1, "seq_len": 96, "stateless_layers_config": ["dense"], "dense_layer_dim": 16,
        "final_stateless_layers_config": ["moe" if moe else "dense"],
        "att_query_groups": 2, "cross_att_type": "mha", "local_window_size": 8,
    }  # fmt: skip
    if kind in LINEAR_KINDS:
        fields |= {"use_linear_self_attn": True, "linear_attn_type": kind}
        fields |= {"linear_attn_use_short_conv": True}
    else:
        fields["self_att_type"] = kind
    return fields | (EXPERTS if moe else {})


@torch.no_grad()
def argmax_of_full_forwards(model: RxTAlpha, slots: torch.Tensor) -> list[int]:
    """Return what follows the first prompt, from one whole forward pass for every token."""
    decoder = model.decoder
    memory = decoder.read_memory(slots[:, :1])
    ids = list(PROMPTS[0])
    for _ in range(NUM_TOKENS):
        hidden, _ = decoder(torch.tensor([ids]), memory=memory)
        ids.append(int(decoder.logits(hidden[0, -1]).argmax()))
    return ids[len(PROMPTS[0]) :]


@torch.no_grad()
def argmax_along(model: RxTAlpha, row: int, slots: torch.Tensor, answer: list[int]) -> list[int]:
    """Return the likeliest token at each place of an answer, from one pass over the whole turn."""
    decoder = model.decoder
    memory = decoder.read_memory(slots[:, row : row + 1])
    hidden, _ = decoder(torch.tensor([PROMPTS[row] + answer[:-1]]), memory=memory)
    best: list[int] = decoder.logits(hidden[0]).argmax(dim=-1).tolist()
    return best[len(PROMPTS[row]) - 1 :]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa", "sqa", "local", *LINEAR_KINDS])
def test_greedy_answers_are_the_argmax_of_full_forwards(
    kind: str, moe: bool, make_model: Callable[..., RxTAlpha]
) -> None:
    """Catches decode states, positions, masks or experts that go wrong in any of 64 steps, for one
    row or for one that shares its batch with shorter and longer ones."""
    model = make_model(eos_bias=-1e4, **fields_of(kind, moe=moe)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # At its start a model mostly repeats the last token, which would test little.
        for parameter in model.decoder.all_layers[0].parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.5 * noise)
    state = model.new_conversation(batch_size=len(PROMPTS), seed=3)
    slots = torch.randn(state.slots.shape, generator=generator, dtype=torch.float64)
    state = state.replaced(slots=slots)
    together = model.generate(state, PROMPTS, GREEDY, max_new_tokens=NUM_TOKENS).answers
    alone = model.generate(state.select([0]), PROMPTS[:1], GREEDY, max_new_tokens=NUM_TOKENS)
    expected = argmax_of_full_forwards(model, slots)
    assert alone.answers[0].ids == expected
    assert together[0].ids == expected
    for row, answer in enumerate(together):
        assert len(answer.ids) == NUM_TOKENS
        assert answer.ids == argmax_along(model, row, slots, answer.ids)
    assert len({token for answer in together for token in answer.ids}) > 6
