"""A module and its weights on disk: saved once each, loaded strictly, hashed.

    model.safetensors   all weights, shared ones once
    config.json         the configuration, its architecture, and the version of rxlm
    README.md           a model card
    tokenizer files     see rxlm.tokenization.storage

Not here: which folder a path means (``model_folder``), what a configuration says.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rxlm.errors import RunError, UserError
from rxlm.storage.files import json_bytes, read_tensors, write_bytes, write_tensors
from rxlm.storage.model_card import write_card
from rxlm.storage.model_folder import CONFIG_FILE, WEIGHTS_FILE
from rxlm.tokenization import Tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_LISTED = 12

_WeightKey = tuple[tuple[str, int, int], ...]
_CACHE: WeakKeyDictionary[nn.Module, tuple[_WeightKey, str]] = WeakKeyDictionary()


def weights_fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 (hex) of all weights, shared ones once: names, types, shapes, bytes.

    Independent of the device. The last result is kept and used again until a weight is replaced
    or changed in place (optimizers and ``load_state_dict`` count; writes through ``.data`` do not
    tell and are not noticed).
    """
    weights = sorted(distinct_tensors(module).items())
    key = tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in weights)
    cached = _CACHE.get(module)
    if cached is not None and cached[0] == key:
        return cached[1]
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(_raw_bytes(tensor))
    _CACHE[module] = (key, digest.hexdigest())
    return digest.hexdigest()


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer once, under the first of its names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _raw_bytes(tensor: Tensor) -> memoryview:
    # Viewed as bytes first: NumPy has no bfloat16.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def save_model_folder(
    module: nn.Module,
    directory: str | Path,
    *,
    config: Mapping[str, Any],
    card: str,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
) -> None:
    """Write a model folder; every file is replaced at once, ``config.json`` last.

    Args:
        module: whose weights are saved.
        directory: made if missing; other files in it are left alone.
        config: content of ``config.json``.
        card: content of ``README.md``.
        tokenizer: saved beside the weights if there is one.
        overwrite: whether files of a model that is there may be replaced. A README.md that rxlm
            did not write, or that was edited, is kept in any case.

    Raises:
        UserError: if a file would be replaced and ``overwrite`` is false.
        RunError: if the disk refuses.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: a model is saved into a folder.")
    present = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if present and not overwrite:
        raise UserError(
            f"{folder} already holds {', '.join(present)}: save into another folder, or pass "
            "overwrite=True to replace the model that is there."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(folder, overwrite=overwrite)
    except OSError as error:
        raise RunError(f"could not write into {folder}: {error}.") from error
    write_tensors(folder / WEIGHTS_FILE, distinct_tensors(module), kind="model")
    write_card(folder, card)
    write_bytes(folder / CONFIG_FILE, json_bytes(dict(config)))


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Return the tokenizer in a model folder, None if there is none."""
    folder = Path(directory)
    return Tokenizer.load(folder) if (folder / _TOKENIZER_CONFIG).is_file() else None


def take_weights(module: nn.Module, directory: str | Path, *, strict: bool = True) -> None:
    """Make the weights in ``directory`` those of a new ``module``, in their saved dtype.

    Args:
        module: just built.
        directory: a model folder.
        strict: whether missing and unknown weights are errors; otherwise they are logged, and
            missing ones keep their initial values. Other shapes are always errors.

    Raises:
        UserError: if the file is missing or damaged, or does not fit.
    """
    path = Path(directory, WEIGHTS_FILE)
    weights, expected = read_tensors(path), distinct_tensors(module)
    problems = weight_problems(expected, weights)
    fatal = problems if strict else [text for text in problems if ": shape " in text]
    if fatal:
        raise UserError(
            f"{path} does not hold the weights that {CONFIG_FILE} describes:\n" + _shortened(fatal)
        )
    if problems:
        logger.warning("%s: loaded although\n%s", path, _shortened(problems))
    for name, tensor in expected.items():
        if name in weights:
            # Through .data, so that parameters keep their identity (sharing) and their marks.
            tensor.data = weights[name]


def copy_weights(module: nn.Module, path: str | Path, whose: str = "this model's weights") -> None:
    """Copy the weights of a file into ``module``, in place, in its dtype and device.

    Raises:
        UserError: if the file is missing or damaged, or does not hold exactly these weights.
            Nothing is copied then.
    """
    weights, expected = read_tensors(Path(path)), distinct_tensors(module)
    problems = weight_problems(expected, weights)
    if problems:
        raise UserError(f"{path} does not hold {whose}:\n" + _shortened(problems))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(weights[name])


def weight_problems(
    expected: dict[str, Tensor], given: dict[str, Tensor], prefix: str = ""
) -> list[str]:
    """Return one sentence per weight that is missing, unknown, or of another shape."""
    problems = [f"{prefix}{name}: missing" for name in expected if name not in given]
    problems += [f"{prefix}{name}: unknown to this model" for name in given if name not in expected]
    problems += [
        f"{prefix}{name}: shape {list(tensor.shape)}, this model's is {list(expected[name].shape)}"
        for name, tensor in given.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    return problems


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


def _shortened(problems: list[str]) -> str:
    more = len(problems) - _MAX_LISTED
    lines = [f"  {text}" for text in problems[:_MAX_LISTED]]
    return "\n".join([*lines, f"  ... and {more} more"] if more > 0 else lines)
