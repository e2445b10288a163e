"""A tiny Beta that learns a handful of dialogues: the whole way from rows to tools in a session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rxlm.data import Conversation, ConversationList
from rxlm.data.conversation_source import conversation_texts
from rxlm.data.sources import parse_conversation
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.models import RxTBeta
from rxlm.rxt.session import ThinkDelta, ToolResult, TurnEnd
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings

SEQ_LEN = 64


def call(city: str) -> str:
    return json.dumps({"name": "weather", "arguments": {"city": city}})


def asked(city: str, weather: str) -> dict[str, Any]:
    """Return a dialogue in which the tool says what cannot be known otherwise."""
    turns = [
        {"query": f"Weather in {city}?", "tool_call": call(city)},
        {"tool_response": weather, "answer": f"It is {weather}."},
    ]
    return {"interactions": turns}


ROWS = [
    {"interactions": [{"query": "Two plus three?", "think": "two three five", "answer": "five"}]},
    {"interactions": [{"query": "Two plus three?", "answer": "maybe five"}]},
    {"interactions": [{"query": "Two plus three?", "think": "two three five", "answer": "five"}]},
    {"interactions": [{"query": "Hello!", "answer": "Hi there."}]},
    {"interactions": [{"query": "Hello!", "answer": "Hi there."}]},
    {"interactions": [{"query": "Hello!", "think": "polite", "answer": "Hi there."}]},
    asked("Oslo", "snow"),
    asked("Oslo", "rain"),
    asked("Rome", "rain"),
    asked("Rome", "sun"),
]


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return [parse_conversation(row, "row") for row in ROWS]


@pytest.fixture(scope="module")
def beta(conversations: list[Conversation]) -> Iterator[RxTBeta]:
    """A Beta of one layer, trained on ROWS by the memory-aware stage."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(
        list(conversation_texts(conversations)) * 4, TokenizerTraining(vocab_size=340)
    )
    sizes = {"num_layers": 1, "embed_dim": 32, "att_heads": 4, "stm_size": 4, "seq_len": SEQ_LEN}
    component = {
        **sizes,
        "vocab_size": tokenizer.vocab_size,
        "ff_dim": 64,
        "self_att_type": "mha",
        "cross_att_type": "mha",
    }
    memory = {**sizes, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RxTBeta(component, component, memory, tokenizer=tokenizer)
    source = ConversationList(conversations)
    objective = MemoryAwareObjective(
        model,
        source,
        source,
        TurnEncoder(model.require_tokenizer(), SEQ_LEN),
        MemoryAwareSettings(phases=(Phase(turns=2, dialogues=len(ROWS)),), num_buckets=1),
        seed=0,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = objective.batch(0, 0)
    for step in range(80):
        optimizer.zero_grad()
        output = objective.loss(batch, step)
        output.loss.backward()
        optimizer.step()
    torch.set_num_threads(before)
    yield model.eval()


def test_it_thinks_as_the_mode_says(beta: RxTBeta) -> None:
    """A mode that changes nothing, or thinking that is mistaken for the answer."""
    session = beta.session(settings=GREEDY)
    for mode, thought, answer in (
        ("fast", None, "maybe five"),
        ("extended", "two three five", "five"),
        ("auto", "two three five", "five"),  # of its examples, most think
    ):
        events = list(session.fork().interact("Two plus three?", thinking_mode=mode))
        (end,) = (event for event in events if isinstance(event, TurnEnd))
        assert (end.think, end.answer, end.reason) == (thought, answer, "eos")
        said = "".join(event.text for event in events if isinstance(event, ThinkDelta))
        assert said == (thought or "")
    (end,) = (event for event in session.interact("Hello!") if isinstance(event, TurnEnd))
    assert (end.think, end.answer) == (None, "Hi there.")


@pytest.mark.parametrize(("city", "weather"), [("Oslo", "rain"), ("Rome", "sun"), ("Oslo", "sun")])
def test_it_calls_a_tool_and_says_what_that_found(beta: RxTBeta, city: str, weather: str) -> None:
    """A call that is not run, or a result that does not reach the answer (one pair is new)."""
    cities = []

    def look(city: str) -> str:
        cities.append(city)
        return weather

    session = beta.session(settings=GREEDY, thinking_mode="fast", tools={"weather": look})
    events = list(session.interact(f"Weather in {city}?"))
    ends = [event for event in events if isinstance(event, TurnEnd)]
    assert [end.tool_call for end in ends] == [call(city), None]
    assert [event for event in events if isinstance(event, ToolResult)] == [
        ToolResult("weather", weather)
    ]
    assert cities == [city]
    assert ends[-1].answer == f"It is {weather}."
    assert [turn.tool_use for turn in session.turns] == [None, weather]
