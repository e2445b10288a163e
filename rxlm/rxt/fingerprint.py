"""Which model a memory belongs to: architecture, tokenizer and weights, hashed apart.

A memory is meaningful only to the weights that wrote it. Three hashes instead of one, so that a
refusal can say what differs.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class ModelFingerprint(NamedTuple):
    """SHA-256 (hex) of each part; ``tokenizer`` is '' for a model without one."""

    architecture: str
    tokenizer: str
    weights: str

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Return the names of the parts that differ."""
        return [
            name
            for name, mine, theirs in zip(self._fields, self, other, strict=True)
            if mine != theirs
        ]


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
