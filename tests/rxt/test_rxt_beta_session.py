"""Sessions with a model that thinks: events, tools, their limits and failures, files, undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rxlm.errors import UserError
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.generation import AnswerStream
from rxlm.rxt.models import RxTBeta
from rxlm.rxt.session import (
    Session,
    TextDelta,
    ThinkDelta,
    ToolCallDelta,
    ToolResult,
    TurnEnd,
)
from rxlm.rxt.tools import run_tool
from rxlm.tokenization import Tokenizer, encode_given, render_parts

CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
Script = Callable[..., RxTBeta]


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def scripted(tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a builder of a Beta that says the given parts, interaction by interaction."""
    sizes = {"num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 120}
    part = {**sizes, "vocab_size": tiny_tokenizer.vocab_size, "ff_dim": 16}
    part |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**sizes, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RxTBeta(part, part, memory, tokenizer=tiny_tokenizer).eval()

    def script(*turns: dict[str, str]) -> RxTBeta:
        tokenizer = model.require_tokenizer()
        waiting = []
        for turn in turns:
            ids, start = render_parts(tokenizer, {"query": "", **turn}).turn
            waiting.append(ids[start:])
        texts = iter(waiting)
        running: dict[int, Iterator[int]] = {}

        def choose(stream: AnswerStream, logits: torch.Tensor) -> list[int]:
            if id(stream) not in running:
                (row,) = stream._rows
                form: AnswerForm | None = row.form
                assert form is not None
                ids = next(texts)
                opened = form.opening_of(row.prompt) is not None
                running[id(stream)] = iter(ids[1:] if opened else ids)
                streams.append(stream)
            return [next(running[id(stream)])]

        streams: list[AnswerStream] = []  # keeps ids unique
        monkeypatch.setattr(AnswerStream, "_choose", choose)
        return model

    return script


def results(events: list[Any]) -> list[ToolResult]:
    return [event for event in events if isinstance(event, ToolResult)]


def ends(events: list[Any]) -> list[TurnEnd]:
    return [event for event in events if isinstance(event, TurnEnd)]


def test_events_tell_the_parts_apart(scripted: Script) -> None:
    """Thinking shown as answer, a call shown to the user, or turns that forget either."""
    model = scripted({"think": "hm [A]", "answer": "Hello, Ann.", "tool_call": CALL})
    session = model.session(thinking_mode="auto")
    events = list(session.interact("Hi", internal="be kind"))
    for kind, text in ((ThinkDelta, "hm [A]"), (TextDelta, "Hello, Ann."), (ToolCallDelta, CALL)):
        assert "".join(event.text for event in events if isinstance(event, kind)) == text
    assert ends(events) == [TurnEnd("eos", "Hello, Ann.", "hm [A]", CALL)]
    (turn,) = session.turns
    assert (turn.query, turn.internal, turn.think, turn.tool_call) == (
        "Hi", "be kind", "hm [A]", CALL)  # fmt: skip
    assert results(events) == []  # without tools a call is reported, not run


@pytest.mark.parametrize("memory_update", ["inline", "background"])
def test_a_result_opens_the_next_interaction(scripted: Script, memory_update: Any) -> None:
    """A tool that is not run, run twice, or whose result is not written."""
    model = scripted({"tool_call": CALL}, {"think": "so", "answer": "3"})
    session = model.session(tools={"add": add})
    events = list(session.interact("1 + 2?", memory_update=memory_update))
    assert results(events) == [ToolResult("add", "3")]
    assert [end.answer for end in ends(events)] == ["", "3"]
    assert [(turn.query, turn.tool_use) for turn in session.turns] == [("1 + 2?", None), ("", "3")]
    assert session.state.num_turns == (2,)


def test_the_caller_may_run_the_tool(scripted: Script) -> None:
    """A result that can only come from a function."""
    session = scripted({"tool_call": CALL}, {"answer": "3"}).session()
    assert session.ask("1 + 2?") == ""
    assert ends(list(session.tool_result("3")))[0].answer == "3"
    assert session.turns[-1].tool_use == "3"


def test_calls_end(scripted: Script) -> None:
    """A model that calls for ever, or one that is cut off without a word about it."""
    model = scripted(*[{"tool_call": CALL}] * 3, {"answer": "enough"})
    allowed: list[bool] = []
    plain = model.answer_form

    def form(mode: Any = None, tool_calls: bool = True) -> AnswerForm:
        allowed.append(tool_calls)
        return plain(mode, tool_calls)

    model.answer_form = form  # type: ignore[method-assign]
    session = model.session(tools={"add": add}, max_tool_rounds=2)
    found = results(list(session.interact("1 + 2?")))
    assert [item.failed for item in found] == [False, False, True]
    assert "no more than 2 tool calls" in found[-1].text
    assert allowed[-1] is False and allowed.count(False) == 1
    del model.answer_form


def boom(**_: Any) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("{add", "not JSON"),
        ("[1]", "no tool is named"),
        ('{"name": "ad"}', "no tool is called 'ad': did you mean 'add'"),
        ('{"name": "zzz"}', "there is: add, boom, odd"),
        ('{"name": "add", "argument": {}}', "did you mean 'arguments'"),
        ('{"name": "add", "arguments": [1]}', "'arguments' is no object"),
        ('{"name": "add", "arguments": {"a": 1}}', "missing a required argument: 'b'"),
        ('{"name": "boom"}', "boom failed: KeyError: 'x'"),
        ('{"name": "odd"}', "returned a object, which is neither text nor JSON"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(call: str, message: str) -> None:
    """A model's mistake that ends the program, or says nothing that would help it."""
    tools = {"add": add, "boom": boom, "odd": object}
    result = run_tool(tools, call)
    assert result.failed and result.text.startswith("error: ") and message in result.text


def test_a_result_that_does_not_fit_is_an_error_for_the_model(scripted: Script) -> None:
    """A long result that breaks the conversation off in the middle."""
    model = scripted({"tool_call": '{"name": "long"}'}, {"answer": "sorry"})
    session = model.session(tools={"long": lambda: "x y z " * 200})
    (result,) = results(list(session.interact("Hi")))
    assert result.failed and "too long" in result.text
    assert len(session.turns) == 2


def test_a_stopped_call_is_not_run(scripted: Script) -> None:
    """Half a call that is carried out after the reader said stop."""
    session = scripted({"tool_call": CALL}).session(tools={"add": boom}, thinking_mode="fast")
    events = []
    for event in session.interact("Hi"):
        events.append(event)
        if isinstance(event, ToolCallDelta):
            session.stop()
    assert ends(events)[0].reason == "stopped" and results(events) == []


def test_retry_goes_back_to_the_query(scripted: Script) -> None:
    """A tool result that is asked again as if it were the user's words."""
    model = scripted({"tool_call": CALL}, {"answer": "3"}, {"answer": "three"})
    session = model.session(tools={"add": add})
    session.ask("1 + 2?")
    assert ends(list(session.retry()))[0].answer == "three"
    assert [turn.query for turn in session.turns] == ["1 + 2?"]


def test_a_saved_session_keeps_its_mode_and_turns(scripted: Script, tmp_path: Path) -> None:
    """Thinking that is lost in files, or a mode that falls back to another one."""
    model = scripted({"tool_call": CALL, "answer": "so"}, {"answer": "3", "think": "t"})
    session = model.session(thinking_mode="extended", system="Be kind.")
    session.set_thinking_mode("auto")
    session.set_tools({"add": add})
    session.ask("1 + 2?")
    session.save(tmp_path / "one")
    loaded = Session.load(tmp_path / "one", model)
    assert (loaded.thinking_mode, loaded.turns) == ("auto", session.turns)


def test_mistakes_are_named(scripted: Script, make_model: Any) -> None:
    """Tools that an Alpha never calls, and what is no tool at all."""
    model = scripted()
    with pytest.raises(UserError, match="RxTAlpha calls no tools"):
        Session(make_model(), tools={"add": add})
    with pytest.raises(UserError, match="give a mapping"):
        model.session(tools=[add])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a tool is a function"):
        model.session(tools={"add": 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="did you mean 'auto'"):
        model.session(thinking_mode="aut")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_tool_rounds=0"):
        model.session(max_tool_rounds=0)
    alpha = make_model().session()
    with pytest.raises(UserError, match="no part 'tool_use'"):
        alpha.tool_result("3")


def test_a_call_is_not_run_once_the_reader_has_said_stop(scripted: Script) -> None:
    """A tool, with all that it does, that runs after stop() at the end of the turn."""
    session = scripted({"tool_call": CALL}).session(tools={"add": boom}, thinking_mode="fast")
    events = []
    for event in session.interact("Hi"):
        events.append(event)
        if isinstance(event, TurnEnd):
            session.stop()
    assert ends(events)[0].reason == "eos" and results(events) == []


def test_a_turn_ends_where_no_result_fits(
    scripted: Script, caplog: pytest.LogCaptureFixture
) -> None:
    """An error out of the middle of the events, after the turn was said to fit."""
    short_call = '{"name": "add"}'
    session = scripted({"tool_call": short_call}).session(tools={"add": add})
    tokenizer = session.model.require_tokenizer()
    # Room for the query, and for no result at all.
    short = len(encode_given(tokenizer, {"tool_use": "error: the result is too long"}))
    session.max_seq_len = short
    events = list(session.interact("Hi"))
    assert results(events)[0].failed and len(ends(events)) == 1
    assert "leaves no room" in caplog.text


def test_retry_takes_back_all_interactions_of_a_query(scripted: Script) -> None:
    """A query with more calls than turns that can be taken back by default."""
    model = scripted(*[{"tool_call": CALL}] * 10, {"answer": "3"}, {"answer": "three"})
    session = model.session(tools={"add": add}, max_tool_rounds=10)
    session.ask("1 + 2?")
    assert len(session.turns) == 11
    assert ends(list(session.retry()))[0].answer == "three"
    assert [turn.query for turn in session.turns] == ["1 + 2?"]
