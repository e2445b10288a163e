"""Sessions: events, undo and forks, and folders that survive restarts, kills and mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rxlm.data import load_conversations
from rxlm.errors import RunError, UserError
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.generation import AnswerStream
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import MemoryUpdated, Session, Stats, TextDelta, TurnEnd
from rxlm.rxt.session_files import META_FILE, SESSION_FILES
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

ModelBuilder = Callable[..., RxTAlpha]


@pytest.fixture(scope="module")
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(eos_bias=4.0)


def spoken(model: RxTAlpha, *texts: str, **options: Any) -> Session:
    session = model.session(seed=3, **options)
    for text in texts or ("My name is Ann.", "Hello", "I live in Oslo."):
        session.ask(text)
    return session


def same_state(one: Session, other: Session) -> bool:
    a, b = one.state, other.state
    return torch.equal(a.slots, b.slots) and (a.seeds, a.draws) == (b.seeds, b.draws)


def content(directory: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in directory.iterdir()}


# Turns.


def test_a_turn_gives_text_end_memory_and_stats(model: RxTAlpha) -> None:
    """Catches lost text, events out of order, and numbers that do not belong to the turn."""
    session = model.session(system="Your name is Ann.", settings=GREEDY)
    before = session.state
    events = list(session.interact("Hello"))
    *deltas, end, memory, stats = events
    assert isinstance(end, TurnEnd) and isinstance(stats, Stats)
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == end.answer
    assert len(deltas) == len([delta for delta in deltas if isinstance(delta, TextDelta)]) > 0
    assert isinstance(memory, MemoryUpdated) and 0 < memory.write_size < 2
    expected = model.generate(before, ["Hello"], GREEDY)
    assert end.answer == model.tokenizer.decode(expected.answers[0].ids)
    assert end.reason == expected.answers[0].reason
    assert stats.tokens == expected.state.draws[0]
    assert stats.tokens_per_second == pytest.approx(stats.tokens / stats.seconds)
    assert stats.memory_seconds is not None and stats.memory_seconds > 0
    written = model.update_memory(expected.state, [expected.answers[0].turn])
    assert torch.equal(session.state.slots, written.slots)
    (turn,) = session.turns
    assert (turn.query, turn.answer) == ("Hello", end.answer)


def test_looking_at_a_session_between_events_disturbs_nothing(model: RxTAlpha) -> None:
    """Catches turns that are recorded twice when somebody reads them during the answer."""
    session, other = model.session(seed=3), model.session(seed=3)
    for event in session.interact("Hello"):
        num_turns = len(session.turns)
        assert num_turns == 1 or isinstance(event, TextDelta)
    other.ask("Hello")
    assert session.turns == other.turns and len(session.turns) == 1
    assert same_state(session, other)


def test_background_sessions_say_the_same(model: RxTAlpha) -> None:
    """Catches a background update that the next turn, undo or fork does not wait for."""
    inline, background = model.session(seed=3), model.session(seed=3)
    for text in ("My name is Ann.", "Hello"):
        inline.ask(text)
        events = list(background.interact(text, memory_update="background"))
        assert isinstance(events[-1], Stats) and events[-1].memory_seconds is None
        assert not any(isinstance(event, MemoryUpdated) for event in events)
    assert background.turns == inline.turns and same_state(background, inline)
    list(background.interact("Hello", memory_update="background"))
    background.undo()
    assert same_state(background, inline)


def test_a_reader_who_leaves_early_loses_no_turn(model: RxTAlpha) -> None:
    """Catches turns that vanish, or appear although they were discarded."""
    session = model.session(seed=3, settings={"temperature": 0.5})
    for _ in session.interact("Hello", on_early_stop="discard"):
        break
    assert session.turns == ()
    said = ""
    for event in session.interact("My name is Ann."):
        assert isinstance(event, TextDelta)
        said += event.text
        break
    (turn,) = session.turns
    assert turn.query == "My name is Ann." and turn.answer.startswith(said)
    assert session.state.num_turns == (1,)


def test_a_stopped_answer_ends_properly(model: RxTAlpha) -> None:
    """Catches a stop that skips the memory update or the events after the answer."""
    session = model.session(seed=3)
    events = []
    for event in session.interact("Hello"):
        events.append(event)
        session.stop()
    end = next(event for event in events if isinstance(event, TurnEnd))
    assert end.reason == "stopped" and isinstance(events[-1], Stats)
    assert session.turns[0].answer == end.answer


def test_a_query_that_does_not_fit_changes_nothing(model: RxTAlpha) -> None:
    """Catches a session that is changed, or fails only when the answer is read."""
    session = spoken(model)
    before = session.state
    with pytest.raises(UserError, match="seq_len is 48"):
        session.interact("Hello " * 60)
    assert session.state is before and len(session.turns) == 3
    with pytest.raises(UserError, match="settings: top_k"):
        model.session(settings={"top_k": 0})


# Undo, retry, fork.


def test_compiled_decoding_reaches_the_answers(
    make_model: ModelBuilder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches an option that is taken and forgotten: by the turns, a fork, or a loaded session."""
    model = make_model(eos_bias=4.0)
    chosen: list[bool] = []
    init = AnswerStream.__init__

    def noted(stream: AnswerStream, *given: Any, compile_decode: bool, **options: Any) -> None:
        chosen.append(compile_decode)
        init(stream, *given, **options)

    session = model.session()
    monkeypatch.setattr(AnswerStream, "__init__", noted)
    monkeypatch.setenv("CXX", "no-such-compiler")
    session.save(tmp_path / "kept")
    for refused in (
        lambda: model.session(compile_decode=True),
        lambda: session.set_compile_decode(True),
        lambda: Session.load(tmp_path / "kept", model, compile_decode=True),
    ):
        with pytest.raises(UserError, match="no-such-compiler"):
            refused()
    monkeypatch.setattr("rxlm.rxt.session.check_compiler", lambda device: None)
    session.ask("Hello")
    session.set_compile_decode(True)
    session.ask("Hello")
    session.fork().ask("Hello")
    Session.load(tmp_path / "kept", model, compile_decode=True).ask("Hello")
    assert chosen == [False, True, True, True]


def test_undo_restores_everything(model: RxTAlpha) -> None:
    """Catches memory, randomness or text that is left over from the turn taken back."""
    short, longer = spoken(model, "Hello"), spoken(model, "Hello", "My name is Ann.", "I live")
    taken = longer.undo(2)
    assert [turn.query for turn in taken] == ["My name is Ann.", "I live"]
    assert longer.turns == short.turns and same_state(longer, short)
    assert longer.ask("Hello") == short.ask("Hello")


def test_undo_keeps_as_many_memories_as_promised(model: RxTAlpha) -> None:
    """Catches memories that pile up, and an undo that stops half-way."""
    session = Session(model, seed=3, undo_depth=2)
    for _ in range(4):
        session.ask("Hello")
    with pytest.raises(UserError, match=r"cannot take back 3 of 4 turns.*last 2"):
        session.undo(3)
    assert len(session.turns) == 4
    session.undo(2)
    with pytest.raises(UserError, match="cannot take back 1"):
        session.undo()
    assert len(session.turns) == 2
    with pytest.raises(UserError, match="must be positive"):
        session.undo(0)


def test_retry_asks_again_with_new_draws(make_model: ModelBuilder) -> None:
    """Catches a retry that repeats the same sampled answer, or leaves both turns."""
    session = spoken(make_model(), "Hello", "My name is Ann.")
    first = session.turns
    list(session.retry())
    second = session.turns
    assert len(second) == 2 and second[0] == first[0]
    assert second[1].query == first[1].query and second[1].answer != first[1].answer
    list(session.retry(settings=GREEDY))
    greedy = session.turns[1].answer
    list(session.retry(settings=GREEDY))
    assert session.turns[1].answer == greedy


def test_a_fork_goes_its_own_way(model: RxTAlpha) -> None:
    """Catches forks that share memory, turns or history."""
    original, untouched = spoken(model), spoken(model)
    fork = original.fork(name="other")
    assert fork.name == "other" and same_state(fork, original)
    fork.undo()
    fork.ask("My name is Bob.")
    fork.ask("Hello")
    assert original.turns == untouched.turns and same_state(original, untouched)
    assert original.ask("Hello") == untouched.ask("Hello")
    original.undo(2)
    assert len(fork.turns) == 4


# Folders.


def test_a_saved_session_is_as_it_was(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches anything that a folder forgets: settings, history, text, randomness."""
    session = spoken(
        model, system="Your name is Ann.", settings={"temperature": 0.7, "top_k": 20}, name="ann"
    )
    session.max_seq_len = 40
    session.save(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(SESSION_FILES)
    loaded = Session.load(tmp_path, model)
    for field in ("name", "system", "settings", "turns", "max_seq_len", "session_id"):
        assert getattr(loaded, field) == getattr(session, field), field
    assert same_state(loaded, session) and loaded.state.num_turns == (3,)
    assert loaded.undo(3) == session.undo(3)
    assert same_state(loaded, session)
    assert loaded.ask("Hello") == session.ask("Hello")


SCRIPT = """
import sys
import rxlm
from rxlm.rxt.session import Session
model = rxlm.load(sys.argv[1])
session = Session.load(sys.argv[2], model)
answers = [session.ask("Hello"), session.ask("I live in Oslo.")]
model.load_stm_state(Session.load(sys.argv[2], model).state)
ids = list(model.interact(**model.tokenize_query("Hello"), temperature=0))
import json
print(json.dumps([answers, ids, "tests" in sys.modules]))
"""


def test_a_restarted_program_says_the_same_next_tokens(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches state that lives in the process: global randomness, caches, unsaved memory."""
    session = spoken(model)
    session.save(tmp_path / "session")
    model.save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "session")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=True,
    )
    model.load_stm_state(session.state)
    ids = list(model.interact(**model.tokenize_query("Hello"), temperature=0))
    answers = [session.ask("Hello"), session.ask("I live in Oslo.")]
    assert json.loads(result.stdout) == [answers, ids, False]


def test_the_turns_are_training_data(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches a turns.jsonl that the data loaders cannot read."""
    session = spoken(model, system="Your name is Ann.", name="ann")
    session.save(tmp_path)
    (conversation,) = load_conversations(tmp_path / "turns.jsonl")
    assert conversation.system == "Your name is Ann."
    assert [turn.query for turn in conversation.interactions] == [
        turn.query for turn in session.turns
    ]


def test_a_session_updates_its_own_folder_only(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches a conversation overwritten by another one, or by a fork."""
    session = model.session(seed=3)
    session.save(tmp_path)
    session.ask("Hello")
    session.save(tmp_path)
    assert Session.load(tmp_path, model).turns == session.turns
    fork = session.fork()
    with pytest.raises(UserError, match=r"holds another session.*overwrite=True"):
        fork.save(tmp_path)
    fork.ask("My name is Bob.")
    fork.save(tmp_path, overwrite=True)
    assert Session.load(tmp_path, model).turns == fork.turns


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "meta.json", "memory.safetensors"])
def test_a_foreign_folder_is_refused(
    model: RxTAlpha, tmp_path: Path, name: str, overwrite: bool
) -> None:
    """Catches somebody's files being replaced by a session."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="is not a saved session"):
        spoken(model, "Hello").save(tmp_path, overwrite=overwrite)
    assert content(tmp_path) == {name: b"{}"}
    with pytest.raises(UserError, match="is a file"):
        spoken(model, "Hello").save(tmp_path / name)


def test_another_model_is_refused_with_the_reason(
    make_model: ModelBuilder, model: RxTAlpha, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches a memory that is read by a model to which it means nothing."""
    spoken(model, "Hello").save(tmp_path)
    other_words = train_tokenizer(
        ["Completely other words are learned here, over and over again."] * 4,
        TokenizerTraining(vocab_size=tiny_tokenizer.vocab_size),
    )
    others = {
        "weights": make_model(seed=5),
        "architecture": make_model(eos_bias=4.0, att_heads=4),
        "tokenizer": make_model(eos_bias=4.0, tokenizer=other_words),
    }
    for part, other in others.items():
        with pytest.raises(UserError, match=f"another model: .*{part} differs"):
            Session.load(tmp_path, other)
    with pytest.raises(UserError, match="weights differs"):
        Session.load(tmp_path, make_model(eos_bias=4.0).double())
    with pytest.raises(UserError, match="architecture differs"):
        Session.load(tmp_path, make_model(eos_bias=4.0, stm_size=7))
    with pytest.raises(UserError) as error:
        Session.load(tmp_path, others["weights"])
    assert "architecture differs" not in str(error.value)


def edit_meta(folder: Path, **values: Any) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**meta, **values}))


def edit_memory(
    folder: Path, edit: Callable[[torch.Tensor], torch.Tensor], forge: bool = False
) -> None:
    """Change every memory in a session; ``forge`` makes meta.json agree."""
    path = folder / "memory.safetensors"
    save_file({name: edit(slots).contiguous() for name, slots in load_file(path).items()}, path)
    if forge:
        digests = json.loads((folder / META_FILE).read_text())["sha256"]
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_meta(folder, sha256=digests)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: [item.unlink() for item in folder.iterdir()], "no meta.json"),
    "memory cut": (
        lambda folder: os.truncate(folder / "memory.safetensors", 100),
        "memory.safetensors was changed or damaged",
    ),
    "memory gone": (lambda folder: (folder / "memory.safetensors").unlink(), "is missing"),
    "another type": (
        lambda folder: edit_memory(folder, lambda slots: slots.bfloat16()),
        "memory.safetensors was changed or damaged",
    ),
    "another shape": (
        lambda folder: edit_memory(folder, lambda slots: slots[:, :, :-1], forge=True),
        r"has shape \[2, 1, 5, 16\].*another model",
    ),
    "turns edited": (
        lambda folder: (folder / "turns.jsonl").write_text("{}\n"),
        "turns.jsonl was changed",
    ),
    "no JSON": (lambda folder: (folder / META_FILE).write_text("{"), "not valid JSON"),
    "a list": (lambda folder: (folder / META_FILE).write_text("[]"), "expected a JSON object"),
    "newer": (lambda folder: edit_meta(folder, format_version=2), "format_version=2"),
    "wrong type": (lambda folder: edit_meta(folder, state="x"), "state"),
    "unknown key": (lambda folder: edit_meta(folder, sed=1), "no field 'sed'"),
    "no history": (lambda folder: edit_meta(folder, history=[]), "the session is damaged"),
    "no model": (lambda folder: edit_meta(folder, model={}), "must have the keys"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_session_is_refused(model: RxTAlpha, tmp_path: Path, damage: str) -> None:
    """Catches tracebacks, and parts of different sessions put together."""
    spoken(model, "Hello").save(tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        Session.load(tmp_path, model)


class KilledError(BaseException):
    """Stands for kill -9: nothing catches it, and nothing after it runs."""


def save_until_killed(
    session: Session, folder: Path, patch: pytest.MonkeyPatch, num_replaced: int
) -> None:
    """Save, but die when more than ``num_replaced`` files or folders have got their names."""
    replace = os.replace
    left = num_replaced

    def replace_or_die(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        replace(*args)

    with patch.context() as killed:
        killed.setattr(os, "replace", replace_or_die)
        killed.setattr(Path, "unlink", lambda *args, **kwargs: None)
        killed.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        try:
            session.save(folder)
        except KilledError:
            assert left == -1


@pytest.mark.parametrize("num_replaced", range(6))
def test_a_kill_while_saving_leaves_a_whole_session(
    model: RxTAlpha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_replaced: int
) -> None:
    """Catches a folder that is neither the old session nor the new one after a kill, twice."""
    session = spoken(model, "Hello")
    session.save(tmp_path)
    versions = [session.fork()]
    for _ in range(2):
        session.ask("My name is Ann.")
        versions.append(session.fork())
        save_until_killed(session, tmp_path, monkeypatch, num_replaced)
        loaded = Session.load(tmp_path, model)
        (found,) = [version for version in versions if version.turns == loaded.turns]
        assert same_state(loaded, found)
        versions = versions[versions.index(found) :]
    # Five replacements make a save; three do when a killed one has left the old files aside.
    assert (len(versions) == 3) == (num_replaced < 3)
    session.save(tmp_path)
    assert Session.load(tmp_path, model).turns == session.turns


@pytest.mark.parametrize("num_replaced", range(4))
def test_a_kill_in_the_first_save_leaves_no_folder(
    model: RxTAlpha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_replaced: int
) -> None:
    """Catches a half-written folder that is taken for somebody else's ever after."""
    session = spoken(model, "Hello")
    save_until_killed(session, tmp_path / "session", monkeypatch, num_replaced)
    assert not (tmp_path / "session").exists()
    session.save(tmp_path / "session")
    assert Session.load(tmp_path / "session", model).turns == session.turns
    assert [item.name for item in tmp_path.iterdir()] == ["session"]


def test_a_full_disk_leaves_the_saved_session(
    model: RxTAlpha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, and a saved session lost because a new one did not fit."""
    session = spoken(model, "Hello")
    session.save(tmp_path)
    saved = session.fork()
    session.ask("My name is Ann.")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("rxlm.storage.files.save_file", full)
            with pytest.raises(RunError, match="No space left on device"):
                session.save(tmp_path)
        assert Session.load(tmp_path, model).turns == saved.turns
    session.save(tmp_path)
    assert Session.load(tmp_path, model).turns == session.turns
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(SESSION_FILES)
