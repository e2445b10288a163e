"""Models on the Hugging Face Hub: download and upload of whole folders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from rxlm.errors import RunError
from rxlm.storage.model_folder import resolve_model_dir

HUB_PREFIX = "hf://"
"""Marks a model on the Hugging Face Hub, so that a mistyped path never becomes a download."""


def local_folder(path: str | Path) -> Path:
    """Return the model folder that ``path`` means; ``hf://owner/name`` is downloaded."""
    if str(path).startswith(HUB_PREFIX):
        return download_model(str(path).removeprefix(HUB_PREFIX))
    return resolve_model_dir(path)


def download_model(repo_id: str) -> Path:
    """Download ``owner/name`` from the Hugging Face Hub (cached) and return its local folder.

    Raises:
        RunError: if that fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise RunError(f"hf://{repo_id} could not be downloaded: {error}") from error


def push_folder(
    write: Callable[[str], None],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload what ``write`` puts into a folder and return the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        )
