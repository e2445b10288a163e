"""Token ids of documents in a memory-mapped file, made once for a content and a tokenizer.

A store is a folder: ``tokens.bin`` (all documents end to end), ``offsets.bin`` (where each begins)
and ``info.json``, complete from the instant in which it has its name. Its name is a hash of what is
in the files, of the tokenizer and of how records are read, so it never has to be refreshed. Not
here: which documents are for training, and rows (``rxlm.training``).

Shapes: N documents, M tokens of all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rxlm.data.files import TEXT_SUFFIXES
from rxlm.errors import RunError, UserError

if TYPE_CHECKING:
    import numpy

logger = logging.getLogger(__name__)

FORMAT = 2
CACHE_VARIABLE = "RXLM_CACHE"
TOKENS_FILE, OFFSETS_FILE, INFO_FILE = "tokens.bin", "offsets.bin", "info.json"
_TEXTS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 4_000_000
_READ_BYTES = 2**22
_RACY_NANOSECONDS = 2_000_000_000

EncodeBatch = Callable[[list[str]], list[list[int]]]


class TokenStore(NamedTuple):
    """Documents as ids.

    Attributes:
        tokens: unsigned ``[M]``, mapped from a file or in memory.
        offsets: int64 ``[N + 1]``; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``, and
            may be empty.
        info: what the builder noted, as JSON values.
    """

    tokens: numpy.ndarray
    offsets: numpy.ndarray
    info: Mapping[str, Any]

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.offsets) - 1


def default_cache() -> Path:
    """Return the folder of caches: ``$RXLM_CACHE``, else ``rxlm`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser() / "tokens"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rxlm" / "tokens"


def tokens_in_memory(documents: Iterable[str], encode: EncodeBatch) -> TokenStore:
    """Return a store that is not on disk, four bytes a token."""
    import numpy

    parts: list[numpy.ndarray] = []
    lengths = [0]
    for ids in encoded(documents, encode):
        parts.append(numpy.asarray(ids, dtype=numpy.uint32))
        lengths.append(len(ids))
    tokens = numpy.concatenate(parts) if parts else numpy.empty(0, numpy.uint32)
    return TokenStore(tokens, numpy.cumsum(lengths, dtype=numpy.int64), {})


def encoded(documents: Iterable[str], encode: EncodeBatch) -> Iterator[list[int]]:
    """Yield the ids of each document; batches are bounded in documents and in characters."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == _TEXTS_AT_ONCE or size > _CHARACTERS_AT_ONCE:
            yield from encode(batch)
            batch, size = [], 0
    yield from encode(batch)


def store_key(content: str, tokenizer: str, options: Mapping[str, Any]) -> str:
    """Return the name of a store: 32 hexadecimal digits.

    Args:
        content: fingerprint of the files (:func:`content_fingerprint`).
        tokenizer: fingerprint of the tokenizer.
        options: everything else that decides the documents, as JSON values.
    """
    text = json.dumps([FORMAT, content, tokenizer, dict(options)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_store(
    cache: Path,
    key: str,
    build: Callable[[], tuple[Iterable[str], Callable[[], Mapping[str, Any]]]],
    encode: EncodeBatch,
    vocab_size: int,
    verify: Callable[[], None] | None = None,
) -> TokenStore:
    """Return the store of ``key``; the first process that asks makes it, others wait.

    Args:
        cache: folder of all stores.
        key: see :func:`store_key`.
        build: called only if there is no store yet: the documents, and a function that is called
            after the last one for what ``info`` is to say.
        encode: from texts to ids, all below ``vocab_size``.
        vocab_size: decides whether an id takes two bytes or four.
        verify: called after the last document, before the store is kept: raises if what was read
            is not what ``key`` says, and then nothing is kept.

    Raises:
        UserError: from the documents, or for a store that was damaged.
        RunError: when the disk refuses.
    """
    folder = cache / key
    if not folder.is_dir():
        with _lock(cache, key):
            if not folder.is_dir():
                _make(folder, *build(), encode, vocab_size, verify)
    store = _read(folder)
    logger.info(
        "%s: %s tokens of %s documents, memory-mapped",
        folder,
        f"{len(store.tokens):,}",
        f"{store.num_documents:,}",
    )
    return store


@contextlib.contextmanager
def _lock(cache: Path, key: str) -> Iterator[None]:
    """Hold the lock of a key; the system frees it when a process dies."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / f".{key}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{cache}: the token cache cannot be written ({error.strerror}). Set data.token_cache "
            f"or ${CACHE_VARIABLE} to a folder that can."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("%s: another process is making this store; waiting for it", cache / key)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(
    folder: Path,
    documents: Iterable[str],
    describe: Callable[[], Mapping[str, Any]],
    encode: EncodeBatch,
    vocab_size: int,
    verify: Callable[[], None] | None,
) -> None:
    import numpy

    # The lock is held, so what lies here was left by a process that was killed.
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    begin = time.perf_counter()
    dtype = numpy.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    num_tokens = num_documents = 0
    try:
        temporary.mkdir()
        with (
            (temporary / TOKENS_FILE).open("wb") as tokens,
            (temporary / OFFSETS_FILE).open("wb") as offsets,
        ):
            offsets.write(numpy.zeros(1, "<i8").tobytes())
            for ids in encoded(documents, encode):
                tokens.write(numpy.asarray(ids, dtype).tobytes())
                num_tokens += len(ids)
                num_documents += 1
                offsets.write(numpy.asarray([num_tokens], "<i8").tobytes())
            for file in (tokens, offsets):
                _to_disk(file)
        info = {
            "format": FORMAT,
            "dtype": dtype.str,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            **describe(),
        }
        with (temporary / INFO_FILE).open("wb") as file:
            file.write((json.dumps(info, indent=2) + "\n").encode())
            _to_disk(file)
        if verify is not None:
            verify()
        os.rename(temporary, folder)
    except OSError as error:
        raise RunError(
            f"{folder}: the token store could not be written ({error.strerror or error}). Free "
            "some space, or set data.token_cache to another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - begin
    logger.info("%s: %s tokens written in %.0f s", folder, f"{num_tokens:,}", seconds)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(folder: Path) -> TokenStore:
    import numpy

    try:
        info = json.loads((folder / INFO_FILE).read_bytes())
        dtype = numpy.dtype(info["dtype"])
        sizes = {
            TOKENS_FILE: info["num_tokens"] * dtype.itemsize,
            OFFSETS_FILE: (info["num_documents"] + 1) * 8,
        }
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{folder}: this token store is damaged. Delete the folder; it is remade.")
    # An empty file cannot be mapped.
    tokens = (
        numpy.memmap(folder / TOKENS_FILE, dtype, "r")
        if info["num_tokens"]
        else numpy.empty(0, dtype)
    )
    return TokenStore(tokens, numpy.memmap(folder / OFFSETS_FILE, "<i8", "r"), info)


def content_fingerprint(files: Sequence[Path], cache: Path) -> str:
    """Return a SHA-256 (hex) of the bytes of files and of their types, whatever their names.

    The hash of a file is kept in ``cache`` and taken again as long as size and times of change of
    the file are the same; a file that changed in the last two seconds is always read.

    Raises:
        UserError: for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        # What a file is read as goes by the end of its name, and by nothing before that.
        suffix = next((end for end in TEXT_SUFFIXES if file.name.endswith(end)), "")
        digest.update(f"{suffix}\0{_file_hash(file, cache)}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path, cache: Path) -> str:
    resolved = file.resolve()
    name = hashlib.sha256(str(resolved).encode()).hexdigest()[:32]
    note = cache / "hashes" / f"{name}.json"
    try:
        before = _signature(resolved)
        known = _noted(note)
        if known.get("signature") == before:
            return str(known["sha256"])
        digest = hashlib.sha256()
        with resolved.open("rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from error
    value = digest.hexdigest()
    # Times of change are as coarse as the clock's tick, so a fresh file may change unseen.
    if time.time_ns() - max(before[1:3]) > _RACY_NANOSECONDS:
        with contextlib.suppress(OSError):  # A note that is not kept only costs time.
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"signature": before, "sha256": value}))
            os.replace(temporary, note)
    return value


def _noted(note: Path) -> dict[str, Any]:
    """Return what a note says; nothing if there is none, or it is not one that was written here."""
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("sha256"), str) else {}


def _signature(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
