"""The decode step: buffers that belong to it, rows that end, and its compiled form."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rxlm.errors import UserError
from rxlm.nn.attention import KeyValue
from rxlm.ops.padding import padded
from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt import decode_compile, decode_step
from rxlm.rxt.decode_step import DecodeStep
from rxlm.rxt.decode_values import DecodeCache, MemoryReading
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]

EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1,
    "shared_expert_dim": 8, "num_layers": 1,
}  # fmt: skip
RAGGED = [[2, 5, 40, 41, 42, 6], [2, 5, 90, 6]]
EVEN = [[2, 5, 40, 6], [2, 5, 90, 6]]
STEPS: list[list[int | None]] = [[50, 60], [51, 61], [52, None], [53, None]]


def prompt_of(
    model: RxTAlpha, prompts: list[list[int]]
) -> tuple[MemoryReading, DecodeCache, torch.Tensor]:
    """Return what a turn reads and its cache after the prompts, and the prompts' mask."""
    state = model.new_conversation(len(prompts), seed=3)
    memory = model.decoder.read_memory(state.slots)
    ids, mask = padded(prompts, 0)
    return memory, model.decoder(ids, mask, memory=memory)[1], mask


def keys_of(cache: DecodeCache) -> list[torch.Tensor]:
    return [part.clone() for layer in cache.layers if isinstance(layer, KeyValue) for part in layer]


@torch.no_grad()
def scores_of(model: RxTAlpha, *, compiled: bool, prompts: list[list[int]] = RAGGED) -> list[Any]:
    """Return the scores after each of :data:`STEPS`."""
    memory, cache, _ = prompt_of(model, prompts)
    step = DecodeStep(model.decoder, memory, cache, len(STEPS), compiled=compiled)
    return [step(tokens) for tokens in STEPS]


@torch.no_grad()
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_steps_score_like_the_plain_forward(
    make_model: ModelBuilder, prompts: list[list[int]]
) -> None:
    """Catches a wrong column, position or mask; in the even batch no mask exists until a row
    ends."""
    model = make_model().double()
    memory, cache, _ = prompt_of(model, prompts)
    for tokens, scores in zip(
        STEPS, scores_of(model, compiled=False, prompts=prompts), strict=True
    ):
        ids, mask = padded([[] if token is None else [token] for token in tokens], 0)
        hidden, cache = model.decoder(ids, mask, memory=memory, cache=cache)
        rows = mask[:, 0]
        torch.testing.assert_close(scores[rows], model.decoder.logits(hidden[:, -1])[rows])


@torch.no_grad()
def test_a_step_leaves_the_cache_it_started_from_alone(make_model: ModelBuilder) -> None:
    """Catches buffers that are views of a cache which another continuation still needs."""
    model = make_model()
    memory, cache, mask = prompt_of(model, RAGGED)
    before, counts = keys_of(cache), cache.lengths.clone()
    first, second = (DecodeStep(model.decoder, memory, cache, 3) for _ in range(2))
    one = [first([50, 60]), first([51, 61])]
    second([70, 80])
    assert all(map(torch.equal, keys_of(cache), before))
    assert torch.equal(cache.key_mask, mask) and torch.equal(cache.lengths, counts)
    again = DecodeStep(model.decoder, memory, cache, 3)
    assert torch.equal(again([50, 60]), one[0]) and torch.equal(again([51, 61]), one[1])


@torch.no_grad()
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_buffers_grow(
    make_model: ModelBuilder, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches keys, marks or phases that are lost when a buffer is full."""
    model = make_model()
    roomy = scores_of(model, compiled=False, prompts=prompts)
    monkeypatch.setattr(decode_step, "FIRST_ROOM", 1)
    for tight, scores in zip(scores_of(model, compiled=False, prompts=prompts), roomy, strict=True):
        assert torch.equal(tight, scores)


def test_rows_of_equal_prompts_may_end_at_different_steps(make_model: ModelBuilder) -> None:
    """Catches a mask that comes too late, or a row that hides the tokens of another."""
    model = make_model(eos_bias=6.0)
    prompts = [[2, 5, 40], [2, 5, 90], [2, 5, 7]]
    state = model.new_conversation(3, seed=7)
    drawn = SamplingSettings(temperature=0.9)
    together = model.generate(state, prompts, drawn).answers
    assert len({len(answer.ids) for answer in together}) > 1
    for row, prompt in enumerate(prompts):
        assert model.generate(state.select([row]), [prompt], drawn).answers == [together[row]]


@pytest.mark.parametrize("kind", ["gqa", "sqa", "local", "gla", "kda"])
def test_the_compiled_form_traces_whole_and_scores_alike(
    kind: str, make_model: ModelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches what a compiler cannot read (it would break the graph), and the forms that run only
    when compiled: whole buffers, rotation without complex numbers, experts by index. No code is
    generated here: the trace runs as it is."""
    compile_of_torch = torch.compile
    monkeypatch.setattr(
        decode_compile.torch,
        "compile",
        lambda step, **options: compile_of_torch(step, backend="eager", **options),
    )
    # Only inductor compiles ahead of time.
    monkeypatch.setattr(decode_compile, "_called_directly", lambda compiled, *given: compiled)
    monkeypatch.setattr(decode_compile, "check_compiler", lambda device: None)
    fields: dict[str, Any] = {"local_window_size": 4, "att_query_groups": 1, **EXPERTS}
    if kind in ("gla", "kda"):
        fields |= {"use_linear_self_attn": True, "linear_attn_type": kind}
    else:
        fields["self_att_type"] = kind
    model = make_model(**fields).double()
    for plain, compiled, tokens in zip(
        scores_of(model, compiled=False), scores_of(model, compiled=True), STEPS, strict=True
    ):
        rows = torch.tensor([token is not None for token in tokens])
        torch.testing.assert_close(compiled[rows], plain[rows], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling a step needs g++")
def test_compiled_answers_are_the_answers(
    make_model: ModelBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches kernels that compute something else, a compilation for every turn, weights that were
    baked in, or a compilation that no log tells of."""
    model = make_model(**EXPERTS)
    state = model.new_conversation(2, seed=1)
    with caplog.at_level(logging.INFO, logger="rxlm.rxt.decode_compile"):
        for turn in range(3):
            plain = model.generate(state, RAGGED, GREEDY).answers
            compiled = model.generate(state, RAGGED, GREEDY, compile_decode=True).answers
            assert compiled == plain
            # Once in its place, once by another object: nothing guards the parameters.
            changed = model.decoder.head_bias.detach().clone()
            changed[plain[0].ids[0]] -= 5.0
            if turn == 0:
                model.decoder.head_bias.data.copy_(changed)
            else:
                model.decoder.head_bias = nn.Parameter(changed)
    assert [record.message[:22] for record in caplog.records] == ["decode step: compiling"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling a step needs g++")
@pytest.mark.parametrize("kind", ["kda", "gated_deltanet", "local"])
@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_answers_of_other_attention(
    kind: str, rows: int, make_model: ModelBuilder
) -> None:
    """Catches caches that leave the compiled code laid out otherwise than they came from the
    prompt: nothing guards the code that reads them."""
    fields: dict[str, Any] = {"self_att_type": kind}
    if kind == "local":
        fields["local_window_size"] = 4
    model = make_model(**fields)
    state = model.new_conversation(rows, seed=1)
    plain, compiled = (
        model.generate(state, RAGGED[:rows], GREEDY, compile_decode=compiled).answers
        for compiled in (False, True)
    )
    assert compiled == plain and len(plain[0].ids) > 3


def test_without_a_compiler_nothing_begins(
    make_model: ModelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a silent fallback to the plain step, or an error after the prompt was read."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = make_model()
    with pytest.raises(UserError, match=r"no-such-compiler.*install g\+\+"):
        model.stream(model.new_conversation(), [[2, 5, 40]], GREEDY, compile_decode=True)
