"""``SessionStore``: what is on disk, after kills, damage, deletion, and for whom."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rxlm.data.conversations import Interaction
from rxlm.errors import RunError, UserError
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.fingerprint import ModelFingerprint
from rxlm.serve.interface import NotFoundError, StateDamagedError
from rxlm.serve.state_files import StateShape
from rxlm.serve.store import SessionStore
from rxlm.serve.store_rows import NewSession, NewTurn

FINGERPRINT = ModelFingerprint("a" * 64, "b" * 64, "c" * 64)
SHAPE = StateShape((2, 3, 4), None)


def open_store(folder: Path, **options: Any) -> SessionStore:
    return SessionStore(folder, FINGERPRINT, SHAPE, **{"keep_versions": 3, **options})


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def state(value: float) -> ConversationState:
    return ConversationState(torch.full((2, 1, 3, 4), value), (7,), (int(value),), (int(value),))


def add(store: SessionStore, session_id: str, *numbers: int, detached: bool = False) -> None:
    """Add turns ``numbers`` to a session, made if missing; each remembers its number."""
    for number in numbers:
        head = None
        new = None
        try:
            head = store.turn(f"{session_id}-{number - 1}").turn_id
        except NotFoundError:
            new = NewSession(session_id, "sys", 7, time.time(), detached=detached)
            if not detached:
                store.add_session(new)
                new = None
        turn = NewTurn(
            f"{session_id}-{number}",
            session_id,
            head,
            Interaction(f"question {session_id} {number}", f"reply {session_id} {number}"),
            GREEDY,
            state(float(number)),
            time.time(),
            "eos",
            new_session=new,
        )
        (result,) = store.commit([turn])
        assert not isinstance(result, Exception), result


def test_turns_and_states_come_back(store: SessionStore, tmp_path: Path) -> None:
    """Fails if a value is lost on its way through the disk."""
    add(store, "s", 1, 2)
    store.close()
    again = open_store(tmp_path)
    try:
        assert [turn.query for turn in again.turns("s-2")] == ["question s 1", "question s 2"]
        found = again.state("s-2")
        assert torch.equal(found.slots, state(2.0).slots)
        assert (found.seeds, found.draws, found.num_turns) == ((7,), (2,), (2,))
        info = again.session("s")
        assert (info.head, info.num_turns) == ("s-2", 2) and (info.state_bytes or 0) > 96
    finally:
        again.close()


def test_only_the_last_versions_are_kept(store: SessionStore, tmp_path: Path) -> None:
    """Fails if a conversation grows on disk with its length, or what undo and forks need goes."""
    add(store, "s", *range(1, 9))
    files = {path.stem for path in (tmp_path / "states").iterdir()}
    assert files == {"s-5", "s-6", "s-7", "s-8"}
    fork = NewSession("fork", "sys", 7, time.time(), head="s-5", depth=5)
    store.add_session(fork)
    add(store, "s", 9, 10)
    files = {path.stem for path in (tmp_path / "states").iterdir()}
    # The fork's head, and what s can go back to; the fork's ancestors were gone before.
    assert files == {"s-5", "s-7", "s-8", "s-9", "s-10"}
    assert store.counts().state_files == 5
    with pytest.raises(NotFoundError, match="no longer kept"):
        store.state("s-6")
    with pytest.raises(UserError, match="3 can be"):
        store.undo("s", 4)
    assert [turn.turn_id for turn in store.undo("s", 2)] == ["s-9", "s-10"]
    files = {path.stem for path in (tmp_path / "states").iterdir()}
    assert files == {"s-5", "s-7", "s-8"}


def test_what_a_kill_leaves_is_swept(store: SessionStore, tmp_path: Path) -> None:
    """Fails if files of turns that were never committed stay for ever, or others go with them."""
    add(store, "s", 1)
    store.close()
    (tmp_path / "states" / "resp_orphan.safetensors").write_bytes(b"x")
    (tmp_path / "states" / "resp_half.tmp").write_bytes(b"x")
    again = open_store(tmp_path)
    try:
        assert [path.name for path in (tmp_path / "states").iterdir()] == ["s-1.safetensors"]
        assert again.state("s-1").num_turns == (1,)
    finally:
        again.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_damaged_version_is_refused_alone(tmp_path: Path, damage: str) -> None:
    """Fails if damage goes unnoticed, or takes more than its version."""
    store = open_store(tmp_path)
    add(store, "s", 1, 2)
    add(store, "t", 1)
    store.close()
    path = tmp_path / "states" / "s-2.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-8])
    elif damage == "swap":
        path.write_bytes((tmp_path / "states" / "t-1.safetensors").read_bytes())
    else:
        path.unlink()
    store = open_store(tmp_path)
    try:
        with pytest.raises(StateDamagedError, match="s-2"):
            store.state("s-2")
        assert store.state("t-1").num_turns == (1,)
        store.undo("s", 1)
        assert store.state("s-1").num_turns == (1,)
    finally:
        store.close()


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    """Fails if a memory is given to weights that did not write it, or the reason is not said."""
    open_store(tmp_path).close()
    other = FINGERPRINT._replace(weights="d" * 64)
    with pytest.raises(UserError, match="weights differs") as error:
        SessionStore(tmp_path, other, SHAPE)
    assert "tokenizer" not in str(error.value)
    open_store(tmp_path).close()


def test_one_process_at_a_time(store: SessionStore, tmp_path: Path) -> None:
    """Fails if two processes write one store."""
    script = (
        "from pathlib import Path\nfrom rxlm.errors import UserError\n"
        "from rxlm.rxt.fingerprint import ModelFingerprint\n"
        "from rxlm.serve.index import Index\n"
        f"try: Index(Path({str(tmp_path)!r}), ModelFingerprint('a' * 64, 'b' * 64, 'c' * 64))\n"
        "except UserError as error: print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert f"open in another process (process {os.getpid()})" in found.stdout


def test_deletion_leaves_no_text_behind(tmp_path: Path) -> None:
    """Fails if a deleted session's text or memory can still be read from the folder, or a fork
    loses what it goes on from."""
    store = open_store(tmp_path)
    add(store, "gone", 1, 2, 3)
    add(store, "other", 1)
    store.add_session(NewSession("fork", "sys", 7, time.time(), head="gone-1", depth=1))
    store.delete("gone")
    with pytest.raises(NotFoundError):
        store.turn("gone-2")
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in (b"reply gone 2", b"question gone 3"):
        assert text not in everything
    assert store.turns("gone-1")[0].session_id == "fork"
    store.delete("fork")
    store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"reply gone 1" not in everything and b"reply other 1" in everything
    assert [path.stem for path in (tmp_path / "states").iterdir()] == ["other-1"]


def test_the_heirs_of_a_session_keep_what_they_need_only(store: SessionStore) -> None:
    """Fails if turns that only a deleted fork needed stay with another fork."""
    add(store, "s", 1, 2, 3)
    for name, number in (("early", 1), ("late", 3)):
        store.add_session(NewSession(name, None, 7, time.time(), head=f"s-{number}", depth=number))
    store.delete("s")
    store.delete("late")
    assert store.turn("s-1").session_id == "early"
    for turn_id in ("s-2", "s-3"):
        with pytest.raises(NotFoundError):
            store.turn(turn_id)


def test_what_is_not_used_expires(store: SessionStore) -> None:
    """Fails if conversations without a session pile up, or a session goes that is in use."""
    add(store, "s", 1)
    for name in ("a", "b", "c"):
        add(store, name, 1, detached=True)
    assert store.expire(0.0, max_detached=2) == 1
    assert (store.counts().sessions, store.counts().detached) == (1, 2)
    with pytest.raises(NotFoundError):
        store.turn("a-1")
    assert store.expire(time.time() + 1, max_detached=2) == 3
    assert store.counts()[:3] == (0, 0, 0)


def test_a_forgotten_turn_is_gone_its_followers_stay(store: SessionStore, tmp_path: Path) -> None:
    """Fails if the text of a deleted response stays, or others lose their chain."""
    add(store, "a", 1, 2, 3, detached=True)
    store.forget("a-2")
    with pytest.raises(NotFoundError):
        store.turn("a-2")
    assert [turn.answer for turn in store.turns("a-3")] == ["reply a 1", "", "reply a 3"]
    store.forget("a-3")
    store.forget("a-1")
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"reply a" not in content
    add(store, "s", 1)
    with pytest.raises(UserError, match="belongs to a session"):
        store.forget("s-1")


def test_a_full_disk_loses_nothing_else(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a turn that could not be written has moved the head or left a file."""
    add(store, "s", 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rxlm.serve.state_files.os.fsync", full)
        with pytest.raises(RunError, match="No space left"):
            add(store, "s", 2)
    assert store.session("s").head == "s-1"
    add(store, "s", 2)
    assert store.state("s-2").num_turns == (2,)


def test_a_turn_of_a_session_that_is_gone(store: SessionStore) -> None:
    """Fails if a turn that was answered while its session was deleted brings something back."""
    turn = NewTurn("x", "gone", None, Interaction("a", "b"), GREEDY, state(1.0), time.time())
    later = NewTurn("y", "s", "x", Interaction("a", "b"), GREEDY, state(1.0), time.time())
    store.add_session(NewSession("s", None, 7, time.time()))
    first, second = store.commit([turn, later])
    assert isinstance(first, NotFoundError) and isinstance(second, RunError)
    assert store.counts().state_files == 0 and store.session("s").head is None
