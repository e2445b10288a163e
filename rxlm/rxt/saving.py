"""Models as folders: weights, configuration, tokenizer and a card, saved and loaded strictly.

    model.safetensors   all weights, shared ones once
    config.json         the RxTConfig, its format version, and the version of rxlm
    README.md           a model card
    tokenizer files     see rxlm.tokenization.storage

Not here: which folder a path means (``model_folder``), training state (checkpoints have it beside
these files).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import rxlm
from rxlm.errors import RunError, UserError
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.fingerprint import distinct_tensors
from rxlm.rxt.model_folder import (
    CARD_FILE,
    CONFIG_FILE,
    MODEL_FILES,
    WEIGHTS_FILE,
    read_model_config,
    resolve_model_dir,
)
from rxlm.rxt.reactive import ReactiveModel, weight_problems
from rxlm.rxt.state_files import json_bytes, read_tensors, write_bytes, write_tensors
from rxlm.tokenization import Tokenizer

logger = logging.getLogger(__name__)

ModelType = TypeVar("ModelType", bound=ReactiveModel)

HUB_PREFIX = "hf://"
"""Marks a model on the Hugging Face Hub, so that a mistyped path never becomes a download."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_LISTED = 12


def save_model(model: ReactiveModel, directory: str | Path, overwrite: bool = False) -> None:
    """Write a model folder; every file is replaced at once, ``config.json`` last.

    Args:
        model: what to save.
        directory: made if missing; other files in it are left alone.
        overwrite: whether files of a model that is there may be replaced.

    Raises:
        UserError: if a file would be replaced and ``overwrite`` is false.
        RunError: if the disk refuses.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: a model is saved into a folder.")
    present = [name for name in MODEL_FILES if (folder / name).exists()]
    if present and not overwrite:
        raise UserError(
            f"{folder} already holds {', '.join(present)}: save into another folder, or pass "
            "overwrite=True to replace the model that is there."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if model.tokenizer is not None:
            model.tokenizer.save(folder, overwrite=overwrite)
    except OSError as error:
        raise RunError(f"could not write into {folder}: {error}.") from error
    write_tensors(folder / WEIGHTS_FILE, distinct_tensors(model), kind="model")
    write_bytes(folder / CARD_FILE, model_card(model).encode("utf-8"))
    write_bytes(folder / CONFIG_FILE, json_bytes(stored_config(model)))


def load_model(
    cls: type[ModelType],
    directory: str | Path,
    *,
    strict: bool = True,
    device: torch.device | str = "cpu",
) -> ModelType:
    """Read a model folder; the model comes in evaluation mode, its weights in their saved dtype.

    Loading does not touch the global random generators.

    Args:
        cls: the class to build.
        directory: a model folder (see :func:`rxlm.rxt.model_folder.resolve_model_dir`).
        strict: whether missing and unknown weights are errors; otherwise they are logged, and
            missing ones keep their initial values. Other shapes are always errors.
        device: where the model goes.

    Raises:
        UserError: if the folder is no model, is damaged, or its parts do not fit together.
    """
    folder = Path(directory)
    config = read_model_config(folder).config
    weights = read_tensors(folder / WEIGHTS_FILE)
    tokenizer = Tokenizer.load(folder) if (folder / _TOKENIZER_CONFIG).is_file() else None
    with torch.random.fork_rng(devices=[]):
        try:
            model = cls.from_config(config, tokenizer)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    expected = distinct_tensors(model)
    problems = weight_problems(expected, weights)
    fatal = problems if strict else [text for text in problems if ": shape " in text]
    if fatal:
        raise UserError(
            f"{folder / WEIGHTS_FILE} does not hold the weights that {CONFIG_FILE} describes:\n"
            + _shortened(fatal)
        )
    if problems:
        logger.warning("%s: loaded although\n%s", folder / WEIGHTS_FILE, _shortened(problems))
    for name, tensor in expected.items():
        if name in weights:
            # Through .data, so that parameters keep their identity (sharing) and their marks.
            tensor.data = weights[name]
    return model.to(device).eval()


def load_weights(model: ReactiveModel, directory: str | Path) -> None:
    """Copy the weights in ``directory`` into ``model``, in place, in the model's dtype and device.

    Raises:
        UserError: if the file is missing or damaged, or does not fit the model. Nothing is
            copied then.
    """
    path = Path(directory, WEIGHTS_FILE)
    weights = read_tensors(path)
    expected = distinct_tensors(model)
    problems = weight_problems(expected, weights)
    if problems:
        raise UserError(f"{path} does not hold this model's weights:\n" + _shortened(problems))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])


def push_model(
    model: ReactiveModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Upload the model folder to the Hugging Face Hub and return the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        )


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


def stored_config(model: ReactiveModel) -> dict[str, object]:
    """Return the content of ``config.json``."""
    return {
        "architecture": type(model).__name__,
        "rxlm_version": rxlm.__version__,
        **model.config.model_dump(mode="json"),
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters by part; what parts share counts in the first."""
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.split(".", 1)[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def model_card(model: ReactiveModel) -> str:
    """Return the model card: what the model is, its size, how to use it."""
    config: RxTConfig = model.config
    decoder, memory = config.decoder, config.memory_attention
    counts = count_parameters(model)
    rows = [f"| {part} | {count:,} |" for part, count in counts.items()]
    return "\n".join(
        [
            "---",
            "library_name: rxlm",
            "pipeline_tag: text-generation",
            "tags: [reactive-transformer, memory, dialogue]",
            "---",
            f"# {type(model).__name__}",
            "",
            "A Reactive Transformer (arXiv 2510.03561): it answers each turn reading that turn and "
            "a memory of fixed size, which it rewrites after the answer.",
            "",
            f"{decoder.num_layers} layers, width {decoder.embed_dim}, vocabulary "
            f"{decoder.vocab_size}, memory {decoder.stm_size} slots a layer "
            f"(`{memory.variant}`), turns of up to {decoder.seq_len} tokens.",
            "",
            "| part | parameters |",
            "|---|---|",
            *rows,
            f"| total | {sum(counts.values()):,} |",
            "",
            "```python",
            "import rxlm",
            "",
            'session = rxlm.load("path/to/this/folder").session()',
            'print(session.ask("Hi, I am Ann."))',
            "```",
            "",
        ]
    )


def _shortened(problems: list[str]) -> str:
    more = len(problems) - _MAX_LISTED
    lines = [f"  {text}" for text in problems[:_MAX_LISTED]]
    return "\n".join([*lines, f"  ... and {more} more"] if more > 0 else lines)
