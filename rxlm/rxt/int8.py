"""A Reactive Transformer with int8 weights, made of a trained one, and what its folder says.

Quantised are the matrices that multiply every token: the projections of attention (softmax and
linear) and dense feed-forward networks, in encoder and decoder. In float32 stay the token embedding
and the output layer, experts and their routers, gates, norms, convolutions, and all of memory
attention: what is written into a memory is read for the rest of the conversation.

Not here: arithmetic (:mod:`rxlm.nn.int8_linear`), files (:mod:`rxlm.rxt.saving`), measuring what
is lost (:mod:`rxlm.evaluation.int8_loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from rxlm.errors import UserError
from rxlm.nn.attention import Attention
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.int8_linear import Int8Linear, is_int8
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.rxt.reactive import ReactiveModel

ModelType = TypeVar("ModelType", bound=ReactiveModel)

QUANTIZATION = "quantization"
"""Key of ``config.json``. A version of rxlm that does not know it refuses the file."""
INT8 = {"method": "int8_dynamic", "version": 1}
"""Its value: int8 weights per output channel, inputs quantised per row."""

_QUANTIZED: dict[type[nn.Module], tuple[str, ...]] = {
    Attention: ("query", "key", "value", "output"),
    LinearSelfAttention: ("query_key_value", "output"),
    FeedForward: ("up", "down"),
}


def quantize_int8(model: ModelType) -> ModelType:
    """Return an int8 form of ``model`` for inference on a CPU; the given one is not changed.

    It is another model: its fingerprint differs, so conversations of the given one are refused.

    Raises:
        UserError: if the model is quantised already, is not in float32, or is not on a CPU.
    """
    if is_int8(model):
        raise UserError("this model has int8 weights already: quantise the one it was made of.")
    if model.device.type != "cpu":
        raise UserError(
            f"the model is on {model.device}, and int8 models run on a CPU: model.to('cpu') first."
        )
    others = {str(item.dtype) for item in model.parameters() if item.dtype != torch.float32}
    if others:
        raise UserError(
            f"the model has weights in {', '.join(sorted(others))}, and int8 is made of float32: "
            "model.float() first."
        )
    # Not a deep copy: the model may hold a conversation whose memory is being updated.
    with torch.random.fork_rng(devices=[]):
        made = type(model).from_config(model.config, model.tokenizer)
    made.load_state_dict(model.state_dict())
    _replace(made, Int8Linear.of)
    return made.requires_grad_(False).eval()


def make_room_for_int8(model: ReactiveModel) -> None:
    """Replace the layers of a new ``model`` by empty int8 ones, whose weights are loaded next."""
    _replace(model, Int8Linear.like)
    model.requires_grad_(False)


def check_int8(model: ReactiveModel, where: str) -> None:
    """Raise ``UserError`` unless the loaded int8 layers hold int8 weights and usable scales."""
    for name, layer in model.named_modules():
        if not isinstance(layer, Int8Linear):
            continue
        scale = layer.scale
        types = (layer.weight.dtype, scale.dtype)
        usable = types == (torch.int8, torch.float32) and bool((scale > 0).all())
        if not usable or not bool(scale.isfinite().all()):
            raise UserError(
                f"{where}: {name} has {types[0]} weights and {types[1]} scales, expected int8 and "
                "positive float32: the file is damaged; export the model again."
            )


def check_quantization(value: Any, where: str) -> None:
    """Raise ``UserError`` unless ``value`` of ``config.json`` is one that this rxlm reads."""
    if value != INT8:
        raise UserError(
            f"{where} has {QUANTIZATION}={value!r}; this rxlm reads {INT8}: use the version of "
            "rxlm that wrote it."
        )


def quantized_share(model: ReactiveModel) -> float:
    """Return which share of the model's parameters is int8."""
    layers = [part for part in model.modules() if isinstance(part, Int8Linear)]
    total = sum(item.numel() for item in model.parameters())
    return sum(layer.weight.numel() for layer in layers) / total


def _replace(model: ReactiveModel, make: Callable[[nn.Linear], Int8Linear]) -> None:
    for part in list(model.modules()):
        for name in _QUANTIZED.get(type(part), ()):
            setattr(part, name, make(getattr(part, name)))
