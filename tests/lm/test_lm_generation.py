"""Generation: cached steps choose what full forwards choose; a row does not know its batch."""

from __future__ import annotations

import pytest
import torch

from rxlm.errors import UserError
from rxlm.lm.generation import TokenStream
from rxlm.lm.model import LMNetwork
from rxlm.nn.mixers import MIXERS
from rxlm.ops.sampling import GREEDY, SamplingSettings

TOLERANCES = {
    torch.float32: (1e-3, 3e-4),
    torch.bfloat16: (5e-2, 1e-2),
    torch.float16: (1e-2, 5e-4),
}
"""Based's own (absolute, relative), see https://github.com/HazyResearch/based."""
STEPS = 64


def network(attention: str) -> LMNetwork:
    torch.manual_seed(0)
    config = {"vocab_size": 50, "dim": 16, "depth": 2, "num_heads": 2, "attention": attention}
    return LMNetwork(config | {"init_std": 0.2}).eval()


def written(model: LMNetwork, prompts, settings=GREEDY, steps=12, **options) -> list[list[int]]:
    stream = TokenStream(model, prompts, settings, max_new_tokens=steps, **options)
    list(stream)
    return stream.continuations


@pytest.mark.parametrize("attention", list(MIXERS))
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("prefill", [1, 128])
def test_generate_scores_equal_a_full_forward(attention, dtype, prefill) -> None:
    """Catches a decode state that is not that of the sequence (Based's own test left out linear
    attention). Greedy tokens, then every step's scores against one forward of all of them."""
    model = network(attention).to(dtype)
    prompt = torch.randint(0, 50, (1, prefill), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden, cache = model(prompt)
        scores, ids = [model.logits(hidden[:, -1])], prompt
        for _ in range(STEPS):
            token = scores[-1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), 1)
            hidden, cache = model(token, cache=cache)
            scores.append(model.logits(hidden[:, -1]))
        full = model.logits(model(ids)[0])[:, prefill - 1 :]
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(torch.stack(scores, 1), full, atol=atol, rtol=rtol)


@pytest.mark.parametrize("attention", list(MIXERS))
def test_generate_batched_equals_single(attention: str) -> None:
    """Catches padding of shorter prompts, or an ended row, that reaches another row; and draws
    that depend on the row's place."""
    model = network(attention).double()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    for settings in (GREEDY, SamplingSettings(temperature=0.9, top_k=20, repetition_penalty=1.1)):
        together = written(model, prompts, settings, eos_id=3, seeds=[5, 6, 7])
        for prompt, seed, expected in zip(prompts, (5, 6, 7), together, strict=True):
            assert written(model, [prompt], settings, eos_id=3, seeds=[seed]) == [expected]


def test_generate_greedy_equals_growing_forwards() -> None:
    """Catches a first token taken from the wrong position, and an eos that is written."""
    model = network("gla").double()
    ids = [1, 2, 3]
    for _ in range(10):
        hidden, _ = model(torch.tensor([ids]))
        ids.append(int(model.logits(hidden[0, -1]).argmax()))
    assert written(model, [[1, 2, 3]], steps=10) == [ids[3:]]
    stop = TokenStream(model, [[1, 2, 3]], GREEDY, max_new_tokens=10, eos_id=ids[5])
    steps = list(stop)
    ends = ids[3:].index(ids[5])
    assert stop.continuations == [ids[3 : 3 + ends]]
    assert steps[-1] == [ids[5]]
    assert stop.reasons == ["eos"]


def test_generate_refuses_bad_prompts() -> None:
    """Catches an index error deep inside for an id of another tokenizer or an empty prompt."""
    model = network("gla")
    for prompts, match in (([[]], "empty"), ([[50]], "outside the model's vocabulary")):
        with pytest.raises(UserError, match=match):
            TokenStream(model, prompts, GREEDY, max_new_tokens=3)
    with pytest.raises(UserError, match="max_new_tokens=0"):
        TokenStream(model, [[1]], GREEDY, max_new_tokens=0)
