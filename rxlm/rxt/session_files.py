"""A session as a folder.

    memory.safetensors   the memory ('slots') and those before the last turns ('previous.<i>');
                         of a model that carries a state also that ('<name>.carried') and whether
                         there is one yet ('<name>.started')
    turns.jsonl          what was said: one line, a conversation as the data loaders read it
    meta.json            format version, model fingerprint, randomness, settings, and the digests
                         of the two other files

``meta.json`` is replaced last and decides: while the other files are being replaced, those it
names by digest are kept under ``*.previous``, so a kill at any instant leaves a session that can
be loaded, the old one or the new one. Not here: what a session does (``session``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import rxlm
from rxlm.configuration import Config
from rxlm.data.conversations import Conversation, Interaction
from rxlm.errors import RunError, UserError
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import ThinkingMode
from rxlm.rxt.conversation import ConversationState, check_carried, check_slots
from rxlm.rxt.fingerprint import ModelFingerprint
from rxlm.storage.files import (
    json_bytes,
    listing,
    read_json,
    read_tensors,
    sync_directory,
    write_bytes,
    write_tensors,
)

SESSION_FORMAT = 1
CARRYING_FORMAT = 2
"""Format of sessions with a carried state; an rxlm that does not know of it refuses them."""
MEMORY_FILE = "memory.safetensors"
TURNS_FILE = "turns.jsonl"
META_FILE = "meta.json"
SESSION_FILES = (MEMORY_FILE, TURNS_FILE, META_FILE)
_KEPT = ".previous"


class StoredSession(NamedTuple):
    """Everything that a session is, apart from the model.

    ``history``: the states before the last turns, oldest first.
    """

    session_id: str
    name: str | None
    system: str | None
    settings: SamplingSettings
    max_seq_len: int | None
    turns: tuple[Interaction, ...]
    state: ConversationState
    history: tuple[ConversationState, ...]
    fingerprint: ModelFingerprint
    thinking_mode: ThinkingMode | None = None


class _Counters(Config):
    """The part of a single conversation's state that is not its memory."""

    seed: int
    draws: int
    num_turns: int


class _Meta(Config):
    """The content of ``meta.json``."""

    format_version: int
    rxlm_version: str
    session_id: str
    name: str | None
    system: str | None
    settings: SamplingSettings
    max_seq_len: int | None
    thinking_mode: ThinkingMode | None = None
    """Only in the file of a session with a model that thinks."""
    model: dict[str, str]
    state: _Counters
    history: list[_Counters]
    sha256: dict[str, str]


def write_session(directory: str | Path, session: StoredSession, overwrite: bool = False) -> None:
    """Write ``session`` into ``directory``.

    Args:
        directory: made if missing. A folder of this very session is updated.
        session: what to write.
        overwrite: whether another session's folder may be replaced.

    Raises:
        UserError: if the folder holds another session, or anything that is not a session.
        RunError: if the disk refuses; the session that was there is intact.
    """
    folder = Path(directory).resolve()
    _check_target(folder, session.session_id, overwrite)
    try:
        if is_session_folder(folder):
            _keep_committed(folder)
            _write_files(folder, session)
        else:
            _write_folder(folder, session)
    except OSError as error:
        raise RunError(f"could not write {folder}: {error}.") from error


def _write_folder(folder: Path, session: StoredSession) -> None:
    """Write a folder that is not there yet (or is empty); it appears with all its files."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, session)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(folder.parent)


def _write_files(folder: Path, session: StoredSession) -> None:
    states = {"slots": session.state}
    states |= {f"previous.{index}": state for index, state in enumerate(session.history)}
    tensors = {
        key: tensor for name, state in states.items() for key, tensor in _tensors(name, state)
    }
    write_tensors(folder / MEMORY_FILE, tensors, kind="session")
    write_bytes(folder / TURNS_FILE, _turns_bytes(session))
    meta = _Meta(
        format_version=SESSION_FORMAT if session.state.carried is None else CARRYING_FORMAT,
        rxlm_version=rxlm.__version__,
        session_id=session.session_id,
        name=session.name,
        system=session.system,
        settings=session.settings,
        max_seq_len=session.max_seq_len,
        thinking_mode=session.thinking_mode,
        model=session.fingerprint._asdict(),
        state=_counters(session.state),
        history=[_counters(state) for state in session.history],
        sha256={name: _digest(folder / name) for name in (MEMORY_FILE, TURNS_FILE)},
    )
    unset = None if session.thinking_mode else {"thinking_mode"}
    write_bytes(folder / META_FILE, json_bytes(meta.model_dump(mode="json", exclude=unset)))
    for name in (MEMORY_FILE, TURNS_FILE):
        _kept(folder / name).unlink(missing_ok=True)


def read_session(
    directory: str | Path,
    fingerprint: ModelFingerprint,
    memory_shape: tuple[int, int, int],
    carried_shape: tuple[int, int, int, int] | None = None,
) -> StoredSession:
    """Return the session in ``directory``.

    Args:
        directory: written by :func:`write_session`.
        fingerprint: of the model that is to continue it.
        memory_shape: (L, S, D) of that model.
        carried_shape: (R, HV, K, V) of the state that model carries; None if it carries none.

    Raises:
        UserError: if there is no session, it is damaged, or it belongs to another model.
    """
    folder = Path(directory)
    meta = _read_meta(folder)
    _check_model(folder, meta, fingerprint)
    expected_format = SESSION_FORMAT if carried_shape is None else CARRYING_FORMAT
    if meta.format_version != expected_format:
        raise UserError(
            f"{folder / META_FILE} has format_version={meta.format_version}, but sessions of this "
            f"model have {expected_format} ({CARRYING_FORMAT}: with a carried state): the session "
            "is damaged."
        )
    memory_path = _committed(folder / MEMORY_FILE, meta)
    tensors = read_tensors(memory_path)
    counters = {"slots": meta.state}
    counters |= {f"previous.{index}": item for index, item in enumerate(meta.history)}
    names = {key for name in counters for key in _tensor_names(name, carried_shape is not None)}
    if tensors.keys() != names:
        raise UserError(
            f"{memory_path} holds {sorted(tensors)}, but {META_FILE} describes "
            f"{sorted(names)}: the session is damaged."
        )
    states = []
    for name, item in counters.items():
        check_slots(tensors[name], memory_shape, f"{memory_path}: '{name}'")
        carried = None
        if carried_shape is not None:
            parts = (tensors[key] for key in _tensor_names(name, True)[1:])
            carried = CarriedState(*parts)
            what = f"{memory_path}: '{name}.carried'"
            check_carried(carried, carried_shape, tensors[name].shape[1], what)
        states.append(_state(tensors[name], item, carried))
    return StoredSession(
        meta.session_id,
        meta.name,
        meta.system,
        meta.settings,
        meta.max_seq_len,
        _read_turns(_committed(folder / TURNS_FILE, meta)),
        states[0],
        tuple(states[1:]),
        fingerprint,
        meta.thinking_mode,
    )


def is_session_folder(directory: str | Path) -> bool:
    """Return whether ``directory`` looks like a saved session."""
    path = Path(directory, META_FILE)
    if not path.is_file():
        return False
    try:
        return {"format_version", "session_id"} <= read_json(path).keys()
    except UserError:
        return False


def _check_target(folder: Path, session_id: str, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: a session is saved into a folder.")
    if not any(folder.iterdir()):
        return
    if not is_session_folder(folder):
        raise UserError(
            f"{folder} is not a saved session (it holds {listing(folder)}): choose a new or an "
            "empty folder."
        )
    there = str(read_json(folder / META_FILE)["session_id"])
    if there != session_id and not overwrite:
        raise UserError(
            f"{folder} holds another session: save into another folder, or pass overwrite=True to "
            "replace it."
        )


def _keep_committed(folder: Path) -> None:
    """Put the files that ``meta.json`` names aside; it still finds them there."""
    digests = read_json(folder / META_FILE).get("sha256", {})
    for name in (MEMORY_FILE, TURNS_FILE):
        path = folder / name
        # Not if it is what a killed save left: the kept file is then the one that counts.
        if path.is_file() and _digest(path) == digests.get(name):
            os.replace(path, _kept(path))


def _committed(path: Path, meta: _Meta) -> Path:
    """Return where the content of ``path`` is that ``meta`` describes."""
    for candidate in (path, _kept(path)):
        if candidate.is_file() and _digest(candidate) == meta.sha256.get(path.name):
            return candidate
    what = "was changed or damaged after it was saved" if path.is_file() else "is missing"
    raise UserError(
        f"{path} {what}: memory, turns and {META_FILE} no longer belong together. Restore the "
        "folder from a copy."
    )


def _kept(path: Path) -> Path:
    return path.with_name(path.name + _KEPT)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _counters(state: ConversationState) -> _Counters:
    return _Counters(seed=state.seeds[0], draws=state.draws[0], num_turns=state.num_turns[0])


def _state(slots: Tensor, counters: _Counters, carried: CarriedState | None) -> ConversationState:
    return ConversationState(
        slots, (counters.seed,), (counters.draws,), (counters.num_turns,), carried
    )


def _tensor_names(name: str, carries: bool) -> tuple[str, ...]:
    return (name, f"{name}.carried", f"{name}.started") if carries else (name,)


def _tensors(name: str, state: ConversationState) -> Iterator[tuple[str, Tensor]]:
    carried = state.carried
    parts = (state.slots,) if carried is None else (state.slots, *carried)
    yield from zip(_tensor_names(name, carried is not None), parts, strict=True)


def _turns_bytes(session: StoredSession) -> bytes:
    """Return the turns as training data; a session without turns is an empty file."""
    if not session.turns:
        return b""
    conversation = Conversation(
        session.turns,
        system=session.system,
        id=session.name or session.session_id,
        source="session",
    )
    return (json.dumps(conversation.to_dict(), ensure_ascii=False) + "\n").encode("utf-8")


def _read_turns(path: Path) -> tuple[Interaction, ...]:
    text = path.read_text(encoding="utf-8")
    return Conversation.from_dict(json.loads(text)).interactions if text else ()


def _read_meta(folder: Path) -> _Meta:
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give the folder of a saved session.")
    if not (folder / META_FILE).is_file():
        raise UserError(
            f"{folder} is not a saved session: no {META_FILE} (it holds {listing(folder)})."
        )
    path = folder / META_FILE
    values: dict[str, Any] = read_json(path)
    version = values.get("format_version")
    if version not in (SESSION_FORMAT, CARRYING_FORMAT):
        raise UserError(
            f"{path} has format_version={version!r}; this rxlm reads {SESSION_FORMAT} and "
            f"{CARRYING_FORMAT}: use the version of rxlm that wrote it."
        )
    return _Meta.parse(values, str(path))


def _check_model(folder: Path, meta: _Meta, fingerprint: ModelFingerprint) -> None:
    parts = ModelFingerprint._fields
    if set(meta.model) != set(parts):
        raise UserError(f"{folder / META_FILE}: 'model' must have the keys {', '.join(parts)}.")
    saved = ModelFingerprint(**meta.model)
    differing = saved.differences(fingerprint)
    if not differing:
        return
    reasons = [
        f"{part} differs (session {getattr(saved, part)[:12] or 'none'}, model "
        f"{getattr(fingerprint, part)[:12] or 'none'})"
        for part in differing
    ]
    raise UserError(
        f"{folder} was saved with another model: {'; '.join(reasons)}. A memory can be read only "
        "by the model that wrote it: load the session with that model."
    )
