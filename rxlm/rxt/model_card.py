"""The model card of a Reactive Transformer: what it is, what it costs, what was measured.

Not here: the form of a card and when a file may be replaced (:mod:`rxlm.storage.model_card`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rxlm.nn.int8_linear import is_int8
from rxlm.rxt.accounting import ModelCosts, model_costs
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.model import RxTNetwork
from rxlm.storage.model_card import Metrics, front_matter, metrics_table, write_card

TAGS = ("reactive-transformer", "memory", "dialogue")

_INT8 = (
    "**Quantised for CPUs**: the projections of attention and of dense feed-forward networks have "
    "int8 weights, one scale per output channel, and quantise their inputs row by row; all else is "
    "float32. Needs rxlm with `rxlm export`; cannot be trained or moved to a GPU. Conversations of "
    "the model that it was made of cannot go on with it."
)


def model_card(
    model: RxTNetwork,
    metrics: Metrics | None = None,
    *,
    measured_on: str = "",
    sections: Mapping[str, str] | None = None,
) -> str:
    """Return the model card.

    Args:
        model: what is described.
        metrics: measured numbers by name; they are also in the head, where the Hub finds them.
        measured_on: the data that they were measured on.
        sections: more Markdown by title, for example tables of an evaluation.

    Raises:
        UserError: if a metric is no finite number.
    """
    name = type(model).__name__
    config: RxTConfig = model.config
    decoder, memory = config.decoder, config.memory_attention
    costs = model_costs(model)
    parts = [
        front_matter(name=name, tags=TAGS, metrics=metrics, measured_on=measured_on) + f"# {name}",
        "A Reactive Transformer (arXiv 2510.03561): it answers each turn reading that turn and a "
        "memory of fixed size, which it rewrites after the answer.",
        f"{decoder.num_layers} layers, width {decoder.embed_dim}, vocabulary "
        f"{decoder.vocab_size}, memory {decoder.stm_size} slots a layer (`{memory.variant}`), "
        f"turns of up to {decoder.seq_len} tokens. Self-attention: "
        f"{_kinds(config)}; memory cross-attention: `{decoder.cross_att_type}`.",
        *([_INT8] if is_int8(model) else []),
        _parameters(costs),
        _costs(costs, decoder.seq_len),
    ]
    if metrics:
        parts.append("## Results\n\n" + metrics_table(metrics, measured_on).rstrip("\n"))
    parts += [f"## {title}\n\n{text.strip()}" for title, text in (sections or {}).items()]
    parts.append(
        "## Use\n\n```python\nimport rxlm\n\n"
        'session = rxlm.load("path/to/this/folder").session()\n'
        'print(session.ask("Hi, I am Ann."))\n```\n\n'
        "A model on the Hub is loaded as `hf://owner/name`. All settings are in `config.json`."
    )
    return "\n\n".join(parts) + "\n"


def write_model_card(
    model: RxTNetwork,
    directory: str | Path,
    metrics: Metrics | None = None,
    *,
    measured_on: str = "",
    sections: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> bool:
    """Write the card into a model folder that is there, and return whether it was written.

    Args:
        model: see :func:`model_card`, as for the next three.
        directory: the folder.
        metrics: see there.
        measured_on: see there.
        sections: see there.
        overwrite: whether to replace a README.md that rxlm did not write, or that was edited.

    Raises:
        UserError: if a metric is no finite number.
        RunError: if the disk refuses.
    """
    card = model_card(model, metrics, measured_on=measured_on, sections=sections)
    return write_card(directory, card, overwrite=overwrite)


def _kinds(config: RxTConfig) -> str:
    kinds = dict.fromkeys(plan.attention for _, plan in config.decoder.layer_plans)
    return ", ".join(f"`{kind}`" for kind in kinds)


def _parameters(costs: ModelCosts) -> str:
    rows = [
        f"| {name} | {sum(parts.values()):,} | {costs.active[name]:,} |"
        for name, parts in costs.parameters.items()
    ]
    total = f"| total | {costs.num_parameters:,} | {sum(costs.active.values()):,} |"
    return "\n".join(["| part | parameters | used by a token |", "|---|---:|---:|", *rows, total])


def _costs(costs: ModelCosts, length: int) -> str:
    rows = [
        ("operations of an answer token", costs.token_operations),
        ("bytes of memory of a conversation", costs.memory_bytes),
        (f"bytes of decode state after {length:,} tokens", costs.decode_bytes),
        ("bytes of weights", costs.weight_bytes),
    ]
    if costs.carried_bytes:
        rows.insert(2, ("bytes carried from turn to turn", costs.carried_bytes))
    return "\n".join(["| costs | |", "|---|---:|", *(f"| {k} | {v:,} |" for k, v in rows)])
