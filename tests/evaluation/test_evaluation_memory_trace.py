"""What a turn did with a memory: numbers that agree with the model, which stays as it was."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from rxlm.data import DialogueGenerator, Interaction
from rxlm.evaluation.memory_trace import (
    slot_changes,
    trace_conversation,
    trace_turn,
    write_map,
)
from rxlm.evaluation.memory_view import blocks, trace_png, turn_view
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization.template import render_parts

TURNS = DialogueGenerator().conversation(3, 4, "test").interactions


def test_weights_are_those_that_the_decoder_reads_with(model: RxTAlpha) -> None:
    """Catches weights of another place, layer, head or norm than those of the real forward pass.

    Replacing the values of the slots by the slots' numbers makes the real attention say what it
    read; the last layer's output must be what the weights predict.
    """
    state = model.new_conversation(seed=1)
    ids = torch.tensor([render_parts(model.require_tokenizer(), TURNS[0].parts()).ids])
    with torch.no_grad():
        memory = model.decoder.read_memory(state.slots)
        weights = model.decoder.slot_weights(ids, memory=memory)
    seen = []

    def spy(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.append((given[0], out))

    handles = [layer.cross_attention.register_forward_hook(spy) for layer in model.decoder.layers]
    with torch.no_grad():
        model.decoder(ids, memory=memory)
    for handle in handles:
        handle.remove()
    assert weights.shape == (2, 1, ids.shape[1], 4)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 1, ids.shape[1]), atol=1e-5)
    for layer, (x, out) in enumerate(seen):
        attention = model.decoder.layers[layer].cross_attention
        full = attention.weights(
            x, memory.layers[layer], None, model.decoder._phases(torch.arange(ids.shape[1]))
        )
        value = memory.layers[layer].value.transpose(1, 2)
        heads = (full @ value).transpose(1, 2)
        assert torch.allclose(attention.combine(heads, x), out, atol=1e-5)
        assert torch.allclose(full.mean(dim=1), weights[layer], atol=1e-5)


def test_looking_changes_nothing(model: RxTAlpha) -> None:
    """Catches hidden buffers, a mode that is left switched, and a state that is written."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [name for name, _ in model.named_buffers()]
    model.train()
    state = model.new_conversation()
    slots = state.slots.clone()
    after = model.update_memory(
        state, [render_parts(model.require_tokenizer(), TURNS[0].parts()).ids]
    )
    trace_turn(model, state, after, TURNS[0])
    assert model.training and torch.equal(state.slots, slots)
    assert [name for name, _ in model.named_buffers()] == buffers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_write_sizes() -> None:
    """Catches a size relative to the wrong norm, and a division by zero for empty slots."""
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    assert slot_changes(before, after).tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert slot_changes(before, before).tolist() == [0.0, 0.0, 0.0]
    assert slot_changes(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [0.0]


def test_the_map_is_the_mean_of_the_traces(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches a mean over the wrong axis: a heat map that mixes slots or turns."""
    model = make_model()
    dialogues = [
        DialogueGenerator().conversation(number, 3, "test").interactions for number in (0, 1)
    ]
    traces = [
        trace_conversation(model, turns, seed=number) for number, turns in enumerate(dialogues)
    ]
    found = write_map(model, dialogues)
    assert found.shape == (3, 2, 4)
    for turn in range(3):
        wanted = sum(trace[turn].written for trace in traces) / 2
        assert torch.allclose(found[turn], wanted, atol=1e-5)


def test_it_can_be_read_in_a_pipe(model: RxTAlpha) -> None:
    """Catches a view that says nothing without colours, or loses slots and tokens."""
    (trace,) = trace_conversation(model, [Interaction("My name is Ann.", "Nice to meet you, Ann.")])
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(turn_view(trace, 1))
    text = capture.get()
    assert "turn 1: My name is Ann." in text and "[A]" in text
    assert all(re.search(rf"^ +{layer} +\S{{4}} ", text, re.MULTILINE) for layer in (0, 1))
    assert f"darkest: {float(trace.written.max()):.3f}" in text
    assert blocks([0.0, 0.34, 1.0], 1.0).plain == "\u00b7-@"
    assert blocks([0.0] * 127 + [1.0], 1.0).plain == "\u00b7" * 63 + "@"
    assert trace_png([trace]).startswith(b"\x89PNG")
