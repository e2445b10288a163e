"""Models on the Hugging Face Hub: download and upload of whole folders.

    hf://owner/name              the newest version of its main branch
    hf://owner/name@revision     a branch, a tag or a commit

Not here: what the files of a folder mean (:mod:`rxlm.storage.weights`).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rxlm.errors import RunError, UserError
from rxlm.storage.model_folder import CHECKPOINTS, COMPLETE, resolve_model_dir

HUB_PREFIX = "hf://"
"""Marks a model on the Hugging Face Hub, so that a mistyped path never becomes a download."""

_NOT_OF_THE_MODEL = ["train/**", COMPLETE, f"{CHECKPOINTS}/**", ".*.tmp"]
"""What a checkpoint holds besides its model."""


def local_folder(path: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the model folder that ``path`` means; ``hf://owner/name`` is downloaded.

    Args:
        path: a folder (see :func:`~rxlm.storage.model_folder.resolve_model_dir`), or
            ``hf://owner/name``, optionally with ``@revision``.
        revision: of a model on the Hub: a branch, a tag or a commit; None: its main branch.
        token: of the Hub, for models that are not public; None: the one that was logged in with.

    Raises:
        UserError: if there is no model, or a folder on this machine is given a revision.
        RunError: if the download fails.
    """
    text = str(path)
    if text.startswith(HUB_PREFIX):
        return download_model(text.removeprefix(HUB_PREFIX), revision, token)
    if revision is not None:
        raise UserError(
            f"revision='{revision}' was given for '{path}', which is a folder on this machine: "
            f"leave it out, or write {HUB_PREFIX}owner/name for a model on the Hugging Face Hub."
        )
    return resolve_model_dir(path)


def download_model(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download ``owner/name`` from the Hugging Face Hub (cached) and return its local folder.

    Args:
        repo_id: may end in ``@revision``.
        revision: the same, as an argument.
        token: see :func:`local_folder`.

    Raises:
        UserError: if the name is not valid, there is no such model or revision, or it is not
            public and the token does not open it.
        RunError: if the connection fails.
    """
    name, at, written = repo_id.partition("@")
    if at and (not written or (revision is not None and revision != written)):
        raise UserError(
            f"'{HUB_PREFIX}{repo_id}' with revision={revision!r}: write one revision, as "
            f"{HUB_PREFIX}{name}@main."
        )
    chosen = written or revision
    hub = _hugging_face_hub()
    wanted = f"{HUB_PREFIX}{name}" + (f"@{chosen}" if chosen else "")
    with _explained(hub, f"{wanted} could not be downloaded", "read"):
        return Path(hub.snapshot_download(name, revision=chosen, token=token))


def push_folder(
    write: Callable[[str], None],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload what ``write`` puts into a folder and return the address of the commit.

    Args:
        write: fills the folder that it is given.
        repo_id: ``owner/name``; made if it is not there.
        private: whether a new repository is private.
        token: of the Hub; None: the one that was logged in with.
        revision: the branch to write to; None: the main branch.
        commit_message: what the history of the repository says.

    Raises:
        UserError: if there is no token, it is not allowed to write, or the name is not valid.
        RunError: if the connection fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return _upload(folder, repo_id, private, token, revision, commit_message)


def push_model_folder(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload a model folder as it is, with its card; return the address of the commit.

    Args:
        path: a model folder, a checkpoint (without what only training needs), a run or a
            pipeline.
        repo_id: as the next four arguments, see :func:`push_folder`, which also says what is
            raised.
        private: see there.
        token: see there.
        revision: see there.
        commit_message: see there.
    """
    folder = str(resolve_model_dir(path))
    return _upload(folder, repo_id, private, token, revision, commit_message)


def _upload(
    folder: str,
    repo_id: str,
    private: bool,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    hub = _hugging_face_hub()
    name = repo_id.removeprefix(HUB_PREFIX)
    with _explained(hub, f"the model could not be uploaded to {HUB_PREFIX}{name}", "write"):
        api = hub.HfApi(token=token)
        # Asked first: without a token the Hub would say only that there is no such repository.
        if token is None and hub.get_token() is None:
            raise UserError(
                f"there is no token to upload to {HUB_PREFIX}{name} with: log in with "
                "`hf auth login`, set HF_TOKEN, or pass token=..."
            )
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                ignore_patterns=_NOT_OF_THE_MODEL,
            )
        )


def _hugging_face_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"models on the Hugging Face Hub need huggingface_hub, which cannot be imported "
            f"({error}): pip install huggingface-hub."
        ) from error


@contextlib.contextmanager
def _explained(hub: Any, failure: str, right: Literal["read", "write"]) -> Iterator[None]:
    """Turn what the client raises into a message with a remedy.

    ``right`` is what a token has to allow.
    """
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{failure}: {error} Expected owner/name.") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{failure}: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{failure}: its owner asks to accept terms first. Do that on its page, then log in "
            "with `hf auth login` (or pass token=...)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{failure}: there is no such revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{failure}: there is no such model, or it is not public: check the name, and log in "
            "with `hf auth login` (or pass token=...) if it is private."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # The client says so of a refused download, too, since it then looks into its cache.
        _check_not_refused(error.__cause__, failure, right)
        raise RunError(
            f"{failure}: no connection, and nothing of it is cached ({error})"
        ) from error
    except errors.HfHubHTTPError as error:
        _check_not_refused(error, failure, right)
        raise RunError(f"{failure}: {error}") from error
    except _connection_errors() as error:
        raise RunError(f"{failure}: {error}") from error


def _check_not_refused(error: BaseException | None, failure: str, right: str) -> None:
    """Raise ``UserError`` if ``error`` is the Hub's answer that this token may not do this."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        raise UserError(
            f"{failure}: the token is not valid or may not do this (status {status}): make one "
            f"that may {right} it on https://huggingface.co/settings/tokens."
        ) from error


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises without a connection: OSErrors, or those of its HTTP library,
    which is another one in each of its major versions."""
    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, *(library.TransportError for library in libraries))
