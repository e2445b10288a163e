"""``ConversationService``: what conversations say, one after the other and many at once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rxlm.data.conversations import Interaction
from rxlm.data.sources import load_conversations
from rxlm.errors import UserError
from rxlm.ops.sampling import GREEDY, SamplingSettings
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import MemoryUpdated, Session, Stats, TextDelta, TurnEnd
from rxlm.serve.interface import (
    BusyError,
    ClosedError,
    NotFoundError,
    QueueFullError,
    TooManySessionsError,
    TurnCancelledError,
    TurnRequest,
    TurnTimeoutError,
)
from rxlm.serve.service import ConversationService
from rxlm.serve.turn import Turn

SAMPLED = SamplingSettings(temperature=0.9, top_k=30)
PENALIZED = SamplingSettings(temperature=0.0, repetition_penalty=1.2)
QUERIES = ["My name is Ann.", "Hello", "What is my name?", "I live in Oslo, and you?"]


def ask(service: ConversationService, session_id: str, text: str, **fields: Any) -> str:
    fields.setdefault("settings", GREEDY)
    return service.submit(session_id, TurnRequest(text, **fields)).result(30).answer


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_interleaved_sessions_say_what_they_say_alone(
    model: RxTAlpha, service: ConversationService, tmp_path: Path, count: int
) -> None:
    """Fails if anything of a session reaches another: memory, draws, settings, texts, order; or if
    joining, leaving and batched updates change a token."""
    chosen = [GREEDY, SAMPLED, PENALIZED]
    systems = [None, "Be brief.", "You are a pirate named Bob."]
    plans = []
    for index in range(count):
        generator = random.Random(index)
        session = service.create(seed=index, system=systems[index % 3])
        turns = [
            (f"{generator.choice(QUERIES)} {index}", chosen[(index + turn) % 3])
            for turn in range(generator.randint(1, 4))
        ]
        plans.append((session, turns))

    async def talk(session_id: str, turns: list[tuple[str, SamplingSettings]]) -> list[str]:
        said = []
        for text, settings in turns:
            handle = service.submit(session_id, TurnRequest(text, settings))
            pieces = [
                event.text async for event in handle.aevents() if isinstance(event, TextDelta)
            ]
            said.append("".join(pieces))
        return said

    async def everyone() -> list[list[str]]:
        return await asyncio.gather(*(talk(one.session_id, turns) for one, turns in plans))

    said = asyncio.run(everyone())
    for (info, turns), answers in zip(plans, said, strict=True):
        alone = model.session(system=info.system, seed=info.seed)
        for (text, settings), answer in zip(turns, answers, strict=True):
            assert answer == alone.ask(text, settings=settings)
        head = service.session(info.session_id).head
        assert head is not None
        stored = service._store.state(head)
        torch.testing.assert_close(stored.slots, alone.state.slots, atol=1e-6, rtol=1e-6)
        assert (stored.draws, stored.num_turns) == (alone.state.draws, alone.state.num_turns)
        kept = service.turns(info.session_id)
        assert [turn.query for turn in kept] == [text for text, _ in turns]
        assert {turn.session_id for turn in kept} == {info.session_id}
    # States hold numbers; nobody's words are in them, whoever's they are.
    files = list((tmp_path / "store" / "states").iterdir())
    assert len(files) == sum(len(turns) for _, turns in plans)
    content = b"".join(path.read_bytes() for path in files)
    assert not any(text.encode() in content for _, turns in plans for text, _ in turns)


def test_events_come_in_order_and_end(service: ConversationService) -> None:
    """Fails if the end is told after the update, or an event is missing."""
    session = service.create()
    handle = service.submit(session.session_id, TurnRequest("Hello", SAMPLED, max_tokens=6))
    events = list(handle.events())
    kinds = [type(event) for event in events]
    assert kinds[-3:] == [TurnEnd, MemoryUpdated, Stats]
    assert set(kinds[:-3]) <= {TextDelta}
    end = events[-3]
    assert isinstance(end, TurnEnd)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == end.answer
    info = handle.result()
    assert (info.answer, info.turn_id) == (end.answer, handle.turn_id)
    assert handle.turn_id.startswith("resp_") and len(handle.turn_id) == 29
    assert service.turns(session.session_id) == [info]


def test_one_answer_at_a_time_but_no_waiting_for_memory(service: ConversationService) -> None:
    """Fails if a session answers two turns at once, or refuses one because of a memory update."""
    session = service.create(seed=1)
    handle = service.submit(session.session_id, TurnRequest("Hello", SAMPLED))
    try:
        service.submit(session.session_id, TurnRequest("Hello"))
    except BusyError:
        pass
    else:  # It was over before we asked.
        assert handle.result(10)
    for event in handle.events():
        if isinstance(event, TurnEnd):
            break
    second = service.submit(session.session_id, TurnRequest("And now?", GREEDY))
    assert second.result(30).parent_id == handle.turn_id


def test_undo_fork_and_the_tree(model: RxTAlpha, service: ConversationService) -> None:
    """Fails if undo leaves something behind, a fork moves with its origin, or either loses text."""
    session = service.create(seed=3)
    sid = session.session_id
    first, second = (ask(service, sid, text, settings=SAMPLED) for text in QUERIES[:2])
    fork = service.fork(sid, at_turn=service.turns(sid)[0].turn_id, name="other")
    assert fork.num_turns == 1 and fork.forked_from == (sid, service.turns(sid)[0].turn_id)
    taken = service.undo(sid)
    assert [turn.answer for turn in taken] == [second]
    assert ask(service, sid, QUERIES[1], settings=SAMPLED) == second
    assert ask(service, fork.session_id, QUERIES[1], settings=SAMPLED) == second
    assert [turn.answer for turn in service.turns(fork.session_id)] == [first, second]
    with pytest.raises(UserError, match="cannot take back 3"):
        service.undo(sid, 3)
    service.undo(sid, 2)
    assert service.session(sid).head is None
    assert ask(service, sid, QUERIES[0], settings=SAMPLED) == first
    service.delete(sid)
    with pytest.raises(NotFoundError):
        service.session(sid)
    # What the fork goes on from is still there.
    assert service.turns(fork.session_id)[0].answer == first
    assert ask(service, fork.session_id, QUERIES[2])


def test_a_known_prefix_is_found_and_an_unknown_one_replayed(
    model: RxTAlpha, service: ConversationService
) -> None:
    """Fails if a stateless request continues from another conversation, or from too little."""
    system = "Be brief."
    pairs: list[tuple[str, str]] = []
    found, known = service.find_prefix(system, pairs)
    assert (found, known) == (None, 0)
    for text in QUERIES[:3]:
        found, known = service.find_prefix(system, pairs)
        assert known == len(pairs)
        handle = service.submit_detached(
            TurnRequest(text, GREEDY), system=system, turns=[], at_turn=found
        )
        pairs.append((text, handle.result(30).answer))
    assert service.find_prefix(None, pairs) == (None, 0)
    assert service.find_prefix(system, [*pairs, ("x", "y")])[1] == 3
    assert service.find_prefix(system, [(pairs[0][0], "other"), *pairs[1:]]) == (None, 0)
    assert service.sessions() == [] and service.stats().detached == 1
    # The same texts, never heard before: read into memory turn by turn.
    foreign = [Interaction("Hi there", "Good day."), Interaction("Who are you?", "Nobody.")]
    handle = service.submit_detached(
        TurnRequest(QUERIES[2], GREEDY), system=system, turns=foreign, at_turn=None
    )
    answer = handle.result(30).answer
    state = model.new_conversation(system=system)
    tokenizer = model.require_tokenizer()
    for turn in foreign:
        from rxlm.tokenization import encode_interaction

        ids = encode_interaction(tokenizer, turn.query, turn.answer).ids
        state = model.update_memory(state, [ids])
    (alone,) = model.generate(state, [QUERIES[2]], GREEDY).answers
    assert answer == tokenizer.decode(alone.ids)
    replayed = [(turn.query, turn.answer) for turn in foreign]
    assert service.find_prefix(system, replayed)[1] == 2
    # Two that go on from the same turn do not meet.
    at = service.find_prefix(system, replayed)[0]
    one, two = (
        service.submit_detached(TurnRequest(text, GREEDY), system=None, turns=[], at_turn=at)
        for text in ("One", "Two")
    )
    assert one.result(30).parent_id == two.result(30).parent_id == at


def test_answer_and_forget(service: ConversationService) -> None:
    """Fails if store=False leaves a turn, moves a head, or blocks the next turn."""
    session = service.create(seed=5)
    first = ask(service, session.session_id, "Hello")
    again = service.submit(session.session_id, TurnRequest("Secret", GREEDY, store=False))
    kinds = [type(event) for event in again.events()]
    assert MemoryUpdated not in kinds and kinds[-1] is Stats
    assert [turn.answer for turn in service.turns(session.session_id)] == [first]
    with pytest.raises(NotFoundError):
        service.turn(again.turn_id)
    assert ask(service, session.session_id, "Next")


def test_a_stop_text_ends_answer_and_memory(model: RxTAlpha, service: ConversationService) -> None:
    """Fails if the reader gets (part of) the stop text, or memory another text than the reader."""
    session = service.create(seed=6)
    whole = ask(service, session.session_id, "Hello", settings=SAMPLED)
    assert len(whole) > 4, "the test needs an answer to cut"
    stop = whole[2:4]
    other = service.create(seed=6)
    handle = service.submit(other.session_id, TurnRequest("Hello", SAMPLED, stop=(stop, "###")))
    events = list(handle.events())
    info = handle.result()
    cut = whole[: whole.index(stop)]
    assert info.answer == cut and info.reason == "stopped"
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == cut
    assert isinstance(handle, Turn)
    answer = handle.answer
    assert answer is not None
    assert model.require_tokenizer().decode(answer.ids) == cut
    slots = model.update_memory(model.session(seed=6).state, [answer.turn]).slots
    state = service._store.state(info.turn_id)
    torch.testing.assert_close(state.slots, slots, atol=1e-6, rtol=1e-6)


def test_cancelling(open_service: Any) -> None:
    """Fails if a cancelled answer is lost, or one that waits is answered after all."""
    service = open_service(max_running=1)
    session, other = service.create(seed=7), service.create(seed=8)
    handle = service.submit(session.session_id, TurnRequest("Hello", SAMPLED))
    waiting = service.submit(other.session_id, TurnRequest("Hello", SAMPLED))
    waiting.cancel()
    for event in handle.events():
        if isinstance(event, TextDelta):
            handle.cancel()
            break
    info = handle.result(30)
    assert info.answer and service.turns(session.session_id) == [info]
    try:
        waiting.result(30)
    except TurnCancelledError:
        assert service.turns(other.session_id) == []
    handle.cancel()  # Of no effect.


def test_limits_are_kept(open_service: Any) -> None:
    """Fails if the queue, the sessions, a text or an answer may grow beyond the limits."""
    service = open_service(
        max_running=1, max_queued=1, max_sessions=3, max_query_chars=20, max_new_tokens=3
    )
    ids = [service.create(seed=index).session_id for index in range(3)]
    with pytest.raises(TooManySessionsError):
        service.create()
    with pytest.raises(UserError, match="21 characters"):
        service.submit(ids[0], TurnRequest("x" * 21))
    with pytest.raises(UserError, match="stop text"):
        service.submit(ids[0], TurnRequest("x", stop=("",)))
    with service._engine._wake:  # The engine cannot take anything now.
        handles = [service.submit(sid, TurnRequest("Hello", SAMPLED)) for sid in ids[:2]]
        with pytest.raises(QueueFullError):
            service.submit(ids[2], TurnRequest("Hello", SAMPLED))
    assert all(handle.result(30).answer_tokens <= 3 for handle in handles)
    assert service.stats().refused_turns == 1
    assert service.submit(ids[2], TurnRequest("Hello")).result(30)


def test_a_turn_that_waits_too_long_is_dropped(open_service: Any) -> None:
    """Fails if a timeout ends the service, or leaves the session busy."""
    service = open_service(request_timeout_seconds=1e-9)
    sid = service.create().session_id
    with pytest.raises(TurnTimeoutError):
        ask(service, sid, "Hello")
    assert not service.session(sid).busy


def test_closing_finishes_what_runs(open_service: Any, model: RxTAlpha) -> None:
    """Fails if an accepted answer is lost at the end, or calls after it hang."""
    service = open_service()
    sid = service.create(seed=9).session_id
    handle = service.submit(sid, TurnRequest("Hello", GREEDY))
    next(iter(handle.events()))
    service.close()
    assert handle.result(0).answer == model.session(seed=9).ask("Hello", settings=GREEDY)
    for call in (service.create, lambda: service.turns(sid), service.sessions):
        with pytest.raises(ClosedError):
            call()
    again = open_service()
    assert [turn.turn_id for turn in again.turns(sid)] == [handle.turn_id]


def test_an_error_of_one_turn_stays_there(
    open_service: Any, model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a turn whose update fails takes its neighbours along, or its session is stuck."""
    real = model.update_memory
    poisoned = model.require_tokenizer().encode("poison")

    def update(state: Any, turns: Any) -> Any:
        for turn in turns:
            text = model.require_tokenizer().decode(turn)
            if "poison" in text:
                raise RuntimeError("cannot remember that")
        return real(state, turns)

    assert poisoned
    monkeypatch.setattr(model, "update_memory", update)
    service = open_service()
    ids = [service.create(seed=index).session_id for index in range(4)]
    texts = ["Hello", "poison", "Hello", "poison"]
    handles = [
        service.submit(sid, TurnRequest(text, GREEDY, max_tokens=4))
        for sid, text in zip(ids, texts, strict=True)
    ]
    assert handles[0].result(30) and handles[2].result(30)
    for handle in (handles[1], handles[3]):
        with pytest.raises(RuntimeError, match="cannot remember"):
            list(handle.events())
    assert service.turns(ids[1]) == []
    assert ask(service, ids[1], "Hello")


def test_the_end_of_the_engine_reaches_everybody(
    open_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if somebody waits for ever, or later calls seem to work."""
    service = open_service()
    sid = service.create().session_id

    def broken() -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(service._engine, "_admit", broken)
    handle = service.submit(sid, TurnRequest("Hello"))
    with pytest.raises(RuntimeError, match="engine has failed"):
        handle.result(30)
    with pytest.raises(RuntimeError, match="engine has failed"):
        service.submit(sid, TurnRequest("Hello"))


def test_a_folder_goes_out_and_in(
    model: RxTAlpha, service: ConversationService, tmp_path: Path
) -> None:
    """Fails if an exported session is another one, not training data, or cannot go on."""
    sid = service.create(seed=4, system="Be brief.").session_id
    said = [ask(service, sid, text, settings=SAMPLED) for text in QUERIES[:2]]
    service.export(sid, tmp_path / "out")
    (conversation,) = load_conversations(tmp_path / "out" / "turns.jsonl")
    assert [turn.answer for turn in conversation.interactions] == said
    loaded = Session.load(tmp_path / "out", model)
    back = service.import_session(tmp_path / "out", name="back")
    assert (back.num_turns, back.system, back.name) == (2, "Be brief.", "back")
    expected = ask(service, sid, "Next", settings=SAMPLED)
    assert ask(service, back.session_id, "Next", settings=SAMPLED) == expected
    assert loaded.ask("Next", settings=SAMPLED) == expected
    view = service.memory(sid)
    assert (view.num_layers, view.num_slots) == (2, 6) and 0 < view.write_size < 2
    assert len(view.changes) == 2 and len(view.changes[0]) == 6


def test_sessions_are_listed_newest_first(service: ConversationService) -> None:
    """Fails if a page repeats or leaves out a session."""
    ids = [service.create(seed=index).session_id for index in range(5)]
    ask(service, ids[1], "Hello")
    listed = [info.session_id for info in service.sessions(limit=2)]
    listed += [info.session_id for info in service.sessions(limit=9, after=listed[-1])]
    assert listed == [ids[1], ids[4], ids[3], ids[2], ids[0]]
    assert service.rename(ids[0], "first").name == "first"
