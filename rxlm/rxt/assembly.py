"""A model out of components, and components into a model: strict about kind, settings and weights.

A component is given as a module, as the folder that its ``save_pretrained`` wrote (or
``hf://owner/name``), or as bare weights. Equal shapes are not enough: attention with another
number of heads has the same weights and computes something else, so settings are compared, too.

Not here: the folders (:mod:`rxlm.rxt.component_saving`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.rxt.component_saving import COMPONENT_KINDS, StoredComponent
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.config import NOT_ARCHITECTURE, RxTConfig, TokenizerConfig
from rxlm.rxt.memory_building import RxTMemoryAttention
from rxlm.storage.weights import weight_problems

Component = nn.Module | Mapping[str, Tensor] | str | Path
"""A component: a module, its weights by name, or where it was saved."""
Embedding = Literal["equal", "encoder", "decoder"]
"""Whose token embedding a model gets: that of both, which must be equal, or that of one."""

_EMBEDDING = "embedding.weight"
_CLASSES: dict[str, type[StoredComponent]] = {
    "decoder": RxTDecoder,
    "encoder": RxTEncoder,
    "memory_attention": RxTMemoryAttention,
}
# What a component's weights and function do not depend on.
_NO_MATTER = {
    "decoder": frozenset({"stm_size"}),
    "encoder": frozenset(
        {
            "stm_size", "tie_embeddings", "use_head_norm", "head_norm_type", "cross_att_type",
            "cross_att_groups", "cross_att_query_groups", "use_gated_cross_attention",
            "skip_memory_cross_attention", "memory_fusion_mode",
        }
    ),
    "memory_attention": frozenset({"seq_len"}),
}  # fmt: skip


class Parts(NamedTuple):
    """The three components of a model."""

    decoder: StoredComponent
    encoder: StoredComponent
    memory_attention: StoredComponent

    def config(self, tokenizer: TokenizerConfig) -> RxTConfig:
        """Return the configuration of a model made of them.

        Raises:
            UserError: if they do not fit together.
        """
        return RxTConfig.parse(
            {
                "decoder": self.decoder.config,
                "encoder": self.encoder.config,
                "memory_attention": self.memory_attention.config,
                "tokenizer": tokenizer,
            },
            "these components do not fit together",
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of all their weights.

        Raises:
            UserError: if it is not one.
        """
        types = {
            name: sorted({str(item.dtype) for item in part.parameters()})
            for name, part in self._asdict().items()
        }
        if len({tuple(names) for names in types.values()} - {()}) != 1:
            given = ", ".join(f"{name} {'/'.join(names)}" for name, names in types.items())
            raise UserError(
                f"the components have weights of different types ({given}): convert them first, "
                "for example with component.to(torch.float32)."
            )
        return next(self.decoder.parameters()).dtype


def open_parts(
    decoder: nn.Module | str | Path,
    encoder: nn.Module | str | Path,
    memory_attention: nn.Module | str | Path,
) -> Parts:
    """Return three components, read if they are folders.

    Raises:
        UserError: if one is not of its kind, or a folder is missing or damaged.
    """
    given = {"decoder": decoder, "encoder": encoder, "memory_attention": memory_attention}
    opened: dict[str, StoredComponent] = {}
    for name, value in given.items():
        part = _opened(name, value)
        if not isinstance(part, StoredComponent):
            raise UserError(
                f"{name} is a {type(part).__name__}: a model is built of components that know "
                f"their configuration; give an {_CLASSES[name].KIND} or its folder."
            )
        opened[name] = part
    return Parts(**opened)


def load_components(
    network: nn.Module,
    *,
    decoder: Component | None = None,
    encoder: Component | None = None,
    memory_attention: Component | None = None,
    embedding: Embedding = "equal",
) -> None:
    """Copy the weights of whole components into ``network``, in its dtype and device.

    Args:
        network: has the three components as attributes; their token embedding is shared.
        decoder: None leaves it as it is, as for the next two.
        encoder: see there.
        memory_attention: see there.
        embedding: whose token embedding is taken if both bring one.

    Raises:
        UserError: if one is not of its kind, has other settings (bare weights have none), weights
            are missing, unknown or of another shape, or the embeddings differ. Nothing is copied
            then.
    """
    if embedding not in get_args(Embedding):
        raise UserError(f"embedding='{embedding}': use {', '.join(get_args(Embedding))}.")
    given = {"decoder": decoder, "encoder": encoder, "memory_attention": memory_attention}
    problems: list[str] = []
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in given.items():
        if value is None:
            continue
        part = _opened(name, value)
        problems += _setting_problems(name, getattr(network, name), part)
        weights = part.state_dict() if isinstance(part, nn.Module) else dict(part)
        problems += weight_problems(getattr(network, name).state_dict(), weights, f"{name}.")
        states[name] = weights
    if not problems:
        problems = _choose_embedding(network, states, embedding)
    if problems:
        raise UserError("these weights do not fit:\n" + "\n".join(problems))
    for name, weights in states.items():
        getattr(network, name).load_state_dict(weights)


def _opened(name: str, part: Component) -> nn.Module | Mapping[str, Tensor]:
    """Return a component, read if it is a folder, checked for its kind."""
    if isinstance(part, str | Path):
        return _CLASSES[name].from_pretrained(part)
    if isinstance(part, StoredComponent) and COMPONENT_KINDS[part.KIND] != name:
        raise UserError(f"{name} was given an {part.KIND}: give an {_CLASSES[name].KIND}.")
    return part


def _setting_problems(
    name: str, ours: StoredComponent, given: nn.Module | Mapping[str, Tensor]
) -> list[str]:
    """Return one sentence per setting in which a component computes something else."""
    if not isinstance(given, StoredComponent):
        return []
    left_out = set(NOT_ARCHITECTURE | _NO_MATTER[name])
    mine: dict[str, Any] = ours.config.model_dump(mode="json", exclude=left_out)
    theirs: dict[str, Any] = given.config.model_dump(mode="json", exclude=left_out)
    return [
        f"{name}.{field}={theirs[field]!r}, this model's is {value!r}"
        for field, value in mine.items()
        if theirs[field] != value
    ]


def _choose_embedding(
    network: nn.Module, states: dict[str, dict[str, Tensor]], embedding: Embedding
) -> list[str]:
    """Put the chosen embedding into both components' weights; return what stands against it."""
    owners = [name for name in ("decoder", "encoder") if _EMBEDDING in states.get(name, {})]
    if len(owners) < 2:
        return []
    ours, theirs = (states[name][_EMBEDDING] for name in owners)
    if torch.equal(ours.to(theirs.device), theirs):
        return []
    if embedding == "equal":
        return [
            "decoder.embedding.weight and encoder.embedding.weight differ, but the two share one "
            "token embedding: leave one out of its component's weights or make them equal, or "
            "choose one with embedding='encoder' or embedding='decoder'"
        ]
    decoder: Any = network.get_submodule("decoder")
    if embedding == "encoder" and decoder.config.tie_embeddings:
        return [
            "embedding='encoder' would replace the decoder's output layer, which is its embedding "
            "(tie_embeddings=True): use embedding='decoder'"
        ]
    for name in owners:
        states[name] = {**states[name], _EMBEDDING: states[embedding][_EMBEDDING]}
    return []
