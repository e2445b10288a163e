"""Reactive Transformers as model folders (:mod:`rxlm.storage.weights` says which files).

``config.json`` holds the RxTConfig, its format version, and the version of rxlm. Not here: which
folder a path means (:mod:`rxlm.storage.model_folder`), training state (checkpoints have it beside
these files).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

import rxlm
from rxlm.errors import UserError
from rxlm.nn.int8_linear import is_int8
from rxlm.rxt.component_saving import COMPONENT_KINDS
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.int8 import (
    INT8,
    QUANTIZATION,
    check_int8,
    check_quantization,
    make_room_for_int8,
)
from rxlm.rxt.model_card import model_card
from rxlm.rxt.reactive import ReactiveModel
from rxlm.storage.hub import push_folder
from rxlm.storage.model_card import Metrics
from rxlm.storage.model_folder import CONFIG_FILE, WEIGHTS_FILE, read_config_file
from rxlm.storage.weights import (
    copy_weights,
    load_tokenizer,
    save_model_folder,
    take_weights,
)

ModelType = TypeVar("ModelType", bound=ReactiveModel)


_LANGUAGE_MODEL = "LanguageModel"
"""What ``config.json`` names as the architecture of :mod:`rxlm.lm`."""


class StoredConfig(NamedTuple):
    """The content of ``config.json``: the model, and what wrote it."""

    config: RxTConfig
    architecture: str
    rxlm_version: str
    is_int8: bool = False


def read_model_config(directory: str | Path) -> StoredConfig:
    """Return the configuration of the model in ``directory``.

    Raises:
        UserError: if the file is missing, damaged, of another format or architecture, or invalid.
    """
    values = read_config_file(directory)
    path = Path(directory, CONFIG_FILE)
    architecture = str(values.pop("architecture", ""))
    version = str(values.pop("rxlm_version", ""))
    if architecture == _LANGUAGE_MODEL:
        raise UserError(
            f"{directory} is a language model without a memory, not a Reactive Transformer: "
            f"measure it with `rxlm eval lm {directory}`, load it with "
            "rxlm.lm.LanguageModel.from_pretrained."
        )
    if architecture in COMPONENT_KINDS:
        raise UserError(
            f"{directory} holds an {architecture}, one component of a model: load it with "
            f"{architecture}.from_pretrained, or build a model of three with "
            "RxTAlpha.from_components."
        )
    if "decoder" not in values:
        raise UserError(
            f"{path} does not describe a model of rxlm (it has no 'decoder'): was it written by "
            "another library?"
        )
    quantized = QUANTIZATION in values
    if quantized:
        check_quantization(values.pop(QUANTIZATION), str(path))
    return StoredConfig(RxTConfig.parse(values, str(path)), architecture, version, quantized)


def save_model(
    model: ReactiveModel,
    directory: str | Path,
    overwrite: bool = False,
    metrics: Metrics | None = None,
) -> None:
    """Write a model folder; every file is replaced at once, ``config.json`` last.

    Args:
        model: what to save.
        directory: made if missing; other files in it are left alone.
        overwrite: whether files of a model that is there may be replaced. A README.md that rxlm
            did not write, or that was edited, is kept in any case.
        metrics: measured numbers by name, for the card.

    Raises:
        UserError: if a file would be replaced and ``overwrite`` is false.
        RunError: if the disk refuses.
    """
    save_model_folder(
        model,
        directory,
        config=stored_config(model),
        card=model_card(model, metrics),
        tokenizer=model.tokenizer,
        overwrite=overwrite,
    )


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
        directory: a model folder (see :func:`rxlm.storage.model_folder.resolve_model_dir`).
        strict: see :func:`rxlm.storage.weights.take_weights`.
        device: where the model goes.

    Raises:
        UserError: if the folder is no model, is damaged, or its parts do not fit together.
    """
    folder = Path(directory)
    stored = read_model_config(folder)
    if stored.is_int8 and torch.device(device).type != "cpu":
        raise UserError(
            f"{folder} is an int8 model, which runs on a CPU, not on {device}: load it with "
            "device='cpu', or take the model that it was exported from."
        )
    tokenizer = load_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        try:
            model = cls.from_config(stored.config, tokenizer)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    if stored.is_int8:
        make_room_for_int8(model)
    take_weights(model, folder, strict=strict)
    if stored.is_int8:
        check_int8(model, str(folder))
    return model.to(device).eval()


def load_weights(model: ReactiveModel, directory: str | Path) -> None:
    """Copy the weights in ``directory`` into ``model``, in place, in the model's dtype and device.

    Raises:
        UserError: if the file is missing or damaged, or does not fit the model. Nothing is
            copied then.
    """
    copy_weights(model, Path(directory, WEIGHTS_FILE))


def push_model(
    model: ReactiveModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
    metrics: Metrics | None = None,
) -> str:
    """Upload the model folder to the Hugging Face Hub and return the address of the commit.

    A folder with a card of its own is uploaded as it is by
    :func:`rxlm.storage.hub.push_model_folder`.

    Args:
        model: what to upload.
        repo_id: ``owner/name``; made if it is not there.
        private: whether a new repository is private.
        token: of the Hub; None: the one that was logged in with.
        commit_message: what the history of the repository says.
        metrics: measured numbers by name, for the card.

    Raises:
        UserError: if there is no token, or it may not write there.
        RunError: if the connection fails.
    """
    return push_folder(
        lambda folder: save_model(model, folder, metrics=metrics),
        repo_id,
        private=private,
        token=token,
        commit_message=commit_message,
    )


def stored_config(model: ReactiveModel) -> dict[str, object]:
    """Return the content of ``config.json``."""
    return {
        "architecture": type(model).__name__,
        "rxlm_version": rxlm.__version__,
        **({QUANTIZATION: INT8} if is_int8(model) else {}),
        **model.config.model_dump(mode="json"),
    }
