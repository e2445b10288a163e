"""What the model of a run costs, read off its checkpoint's configuration; nothing is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rxlm.training.checkpoint import find_latest


class Costs(NamedTuple):
    """Parameters, and bytes of what is held while a sequence is continued."""

    parameters: int
    non_embedding: int
    """Without the token embedding (and an output layer that is its own)."""
    decode_bytes: int
    """Decode state of one sequence after ``decode_tokens`` tokens, fp32."""
    decode_tokens: int
    memory_bytes: int | None
    """Short-term memory of a conversation; None for a model without one."""


def costs_of_run(folder: Path) -> Costs | None:
    """Return the costs of the model in a run's newest checkpoint; None if there is no checkpoint
    of a model of this package."""
    checkpoint = find_latest(folder)
    if checkpoint is None or not (checkpoint / "tokenizer_config.json").is_file():
        return None
    from rxlm.lm.language_model import is_language_model

    return _of_language_model(checkpoint) if is_language_model(checkpoint) else _of_rxt(checkpoint)


def _of_language_model(checkpoint: Path) -> Costs:
    from rxlm.lm.language_model import read_lm_config
    from rxlm.lm.model import state_bytes
    from rxlm.training.build_lm import build_lm_on_meta

    config = read_lm_config(checkpoint)
    model = build_lm_on_meta(config)
    total = sum(item.numel() for item in model.parameters())
    tables = {id(item): item.numel() for item in (model.embedding.weight, model.head.weight)}
    length = config.max_seq_len
    return Costs(total, total - sum(tables.values()), state_bytes(config, length), length, None)


def _of_rxt(checkpoint: Path) -> Costs:
    import torch

    from rxlm.rxt.accounting import EMBEDDING, model_costs
    from rxlm.rxt.model import RxTNetwork
    from rxlm.rxt.saving import read_model_config

    config = read_model_config(checkpoint).config
    with torch.device("meta"):
        costs = model_costs(RxTNetwork(config))
    tables = sum(
        parts.get(name, 0)
        for parts in costs.parameters.values()
        for name in (EMBEDDING, "output layer")
    )
    return Costs(
        parameters=costs.num_parameters,
        non_embedding=costs.num_parameters - tables,
        decode_bytes=costs.decode_bytes,
        decode_tokens=config.decoder.seq_len,
        memory_bytes=costs.memory_bytes,
    )
