"""Memory updates in the background: order, leaving early, errors, waiting, the side stream."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session, TextDelta, TurnEnd
from rxlm.rxt.side_stream import SideStream

ModelBuilder = Callable[..., RxTAlpha]
SAMPLED = SamplingSettings(temperature=0.8)


@pytest.fixture
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(eos_bias=2.0)


class Gate:
    """Holds updates of a model back until it is opened; notes in which thread they run."""

    def __init__(self, model: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.threads = threading.Event(), list[str]()
        self.errors: list[Exception] = []
        update = model.update_memory

        def held_back(state: Any, turns: Any) -> Any:
            assert self.open.wait(60)
            self.threads.append(threading.current_thread().name)
            if self.errors:
                raise self.errors.pop()
            return update(state, turns)

        monkeypatch.setattr(model, "update_memory", held_back)


def say(session: Session, text: str) -> str:
    events = list(session.interact(text, settings=SAMPLED, memory_update="background"))
    (end,) = (event for event in events if isinstance(event, TurnEnd))
    return end.answer


def test_many_turns_are_those_of_inline_updates(model: RxTAlpha) -> None:
    """Fails if a turn begins before the update of the one before it, or updates change places."""
    inline, background = model.session(seed=1), model.session(seed=1)
    for number in range(6):
        text = f"My name is {number}"
        assert say(background, text) == inline.ask(text, settings=SAMPLED)
    background.wait_for_memory()
    assert torch.equal(background.state.slots, inline.state.slots)
    assert background.turns == inline.turns


def test_the_reader_has_the_answer_before_the_update(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the end of the answer waits for memory, or the state does not."""
    session = model.session(seed=2)
    before = session.state
    gate = Gate(model, monkeypatch)
    say(session, "Hello")  # Returns although no update can run.
    assert gate.threads == []
    timer = threading.Timer(0.1, gate.open.set)
    timer.start()
    session.wait_for_memory()
    assert gate.open.is_set() and gate.threads[0].startswith("rxlm-memory")
    assert not torch.equal(session.state.slots, before.slots) and len(session.turns) == 1
    timer.join()


def test_an_error_is_seen_at_the_next_use_and_the_turn_kept(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an update that went wrong is forgotten, or its turn is."""
    session, inline = model.session(seed=3), model.session(seed=3)
    expected = inline.ask("Hello", settings=SAMPLED)
    gate = Gate(model, monkeypatch)
    gate.open.set()
    gate.errors.append(RuntimeError("out of memory"))
    assert say(session, "Hello") == expected
    with pytest.raises(RuntimeError, match="out of memory"):
        session.wait_for_memory()
    session.wait_for_memory()  # Tried again.
    assert torch.equal(session.state.slots, inline.state.slots)
    assert [turn.answer for turn in session.turns] == [expected]


def test_a_reader_who_leaves_loses_nothing(model: RxTAlpha) -> None:
    """Fails if leaving in the middle, or right after the end, drops the turn or leaks grad mode."""
    session = model.session(seed=4, settings=GREEDY)
    events = session.interact("Hello", memory_update="background")
    for event in events:
        if isinstance(event, TextDelta):
            break
    events.close()  # type: ignore[attr-defined]
    session.wait_for_memory()
    assert len(session.turns) == 1
    events = session.interact("Hello again", memory_update="background")
    for event in events:
        if isinstance(event, TurnEnd):
            break
    events.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    session.wait_for_memory()
    assert len(session.turns) == 2 and session.state.num_turns == (2,)


def test_a_fork_and_an_undo_wait(model: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one of them goes on from the memory before the update."""
    session = model.session(seed=5)
    start = session.state
    gate = Gate(model, monkeypatch)
    say(session, "Hello")
    threading.Timer(0.05, gate.open.set).start()
    fork = session.fork()
    assert fork.state.num_turns == (1,)
    session.undo()
    assert torch.equal(session.state.slots, start.slots)


def test_the_held_conversation_waits_as_well(
    model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if ``model.wait_for_memory()`` returns too early, or swallows an error."""
    gate = Gate(model, monkeypatch)
    gate.errors.append(RuntimeError("out of memory"))
    query = model.tokenize_query("Hello")
    assert list(model.interact(**query, memory_update="background"))[-1] == -1
    gate.open.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        model.wait_for_memory()
    model.wait_for_memory()
    assert model.export_conversation().num_turns == (1,)


def test_a_side_stream_of_a_cpu_is_nothing() -> None:
    aside = SideStream(torch.device("cpu"))
    value = torch.ones(2)
    with aside.working([value]):
        result = value * 2
    aside.hand_over([result])
    assert result.tolist() == [2.0, 2.0]


@pytest.mark.gpu
def test_a_side_stream_computes_what_its_maker_had(make_model: ModelBuilder) -> None:
    """Fails if the update reads its inputs too early, or its results are used too early."""
    one = make_model(eos_bias=2.0).cuda()
    inline, background = one.session(seed=6), one.session(seed=6)
    for number in range(8):
        text = f"My name is {number}"
        assert say(background, text) == inline.ask(text, settings=SAMPLED)
    assert torch.equal(background.state.slots, inline.state.slots)
