"""What a model costs: parameters by part, operations a token, bytes of memory and of decode state.

Everything is read off a built model (one on the meta device will do: no storage is touched).
Operations count matrix products, two for every multiplication with an addition; norms, activations,
softmax and sampling are left out.

    token      2 * (weights that multiply a token) + attention to T tokens and S slots
    attention  4 * max(H, G) * K * (tokens or slots seen)             softmax, local
    linear     4 * HV * K * V, and 2 more * HV * K * V for the delta rule

Not here: time, activations, optimizers.

Shapes: L layers with memory, S slots, D width, T tokens of a turn, H query heads, G key/value
heads, K/V head dimensions, HV value heads, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from rxlm.memory.attention import MemoryAttention
from rxlm.nn.attention import Attention
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.moe import MixtureOfExperts
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.layers import ReactiveLayer
from rxlm.rxt.model import RxTNetwork

EMBEDDING = "token embedding"
"""Name of the part that decoder and encoder share; it counts in the decoder."""

_PARTS = (
    (".router.", "router"),
    (".experts.", "routed experts"),
    (".shared", "shared experts"),
    (".feed_forward.", "feed-forward"),
    (".cross_attention.", "memory cross-attention"),
    (".memory_fusion.", "memory in the gates"),
    (".self_attention.", "self-attention"),
    ("embedding.", EMBEDDING),
    ("head_norm.", "norms"),
    ("head_", "output layer"),
    ("norm", "norms"),
    # Of memory attention.
    ("write_attention.", "write attention"),
    ("mix_attention.", "attention before the write"),
    ("gate.", "gates"),
    ("slot_identity", "slot identities"),
    ("initial.", "initial memory"),
)
_ONCE_A_TURN = (".cross_attention.key.", ".cross_attention.value.", ".memory_fusion.")
_EVERY_TOKEN = (".memory_fusion.tokens.", ".memory_fusion.up.")
_STATE_BYTES = 4
"""Of a number in the state of linear attention: float32 in models of any type below float64."""


class ModelCosts(NamedTuple):
    """The costs of a model.

    ``parameters``: by component, by part; ``active``: parameters of each component that one token
    uses (of routed experts only those that it visits); ``token_operations``: of the decoder, for
    the last token of a turn of T = ``seq_len`` tokens that reads the memory; ``turn_operations``:
    by step, of what happens once a turn of T tokens: ``read`` (slots projected for the decoder),
    ``encode``, ``write``; ``memory_bytes``: short-term memory of a conversation; ``carried_bytes``:
    what linear attention carries between turns; ``decode_bytes``: decode state at the end of a turn
    of T tokens; ``weight_bytes``: of all parameters, shared ones once.
    """

    parameters: dict[str, dict[str, int]]
    active: dict[str, int]
    token_operations: int
    turn_operations: dict[str, int]
    memory_bytes: int
    carried_bytes: int
    decode_bytes: int
    weight_bytes: int

    @property
    def num_parameters(self) -> int:
        """All parameters, shared ones once."""
        return sum(sum(parts.values()) for parts in self.parameters.values())


def model_costs(network: RxTNetwork) -> ModelCosts:
    """Return the costs of a built model."""
    config = network.config.decoder
    components = {
        "decoder": network.decoder,
        "encoder": network.encoder,
        "memory attention": network.memory_attention,
    }
    seen: set[int] = set()
    parameters = {name: _parts(module, seen) for name, module in components.items()}
    length = config.seq_len
    memory = network.config.memory_attention
    element = network.encoder.embedding.weight.element_size()
    carried = network.decoder.carried_shape
    return ModelCosts(
        parameters=parameters,
        active={
            name: sum(parameters[name].values()) - _idle(module)
            for name, module in components.items()
        },
        token_operations=decoder_token_operations(network.decoder, length),
        turn_operations={
            "read": read_operations(network.decoder),
            "encode": length * encoder_token_operations(network.encoder, length),
            "write": write_operations(network.memory_attention, length),
        },
        memory_bytes=element * memory.num_layers * memory.stm_size * memory.embed_dim,
        # One more byte: whether there has been an interaction.
        carried_bytes=0 if carried is None else _STATE_BYTES * math.prod(carried) + 1,
        decode_bytes=decode_state_bytes(network.decoder, length),
        weight_bytes=sum(item.numel() * item.element_size() for item in network.parameters()),
    )


def decoder_token_operations(decoder: RxTDecoder, length: int) -> int:
    """Return the operations for the last token of a turn of ``length`` tokens, output included."""
    config = decoder.config
    total = 2 * config.vocab_size * config.embed_dim
    for layer in decoder.all_layers:
        total += 2 * _weights_per_token(layer) + _mixing(layer, length)
        if layer.reads_memory:
            total += _softmax_operations(layer.cross_attention, config.stm_size)
    return total


def encoder_token_operations(encoder: RxTEncoder, length: int) -> int:
    """Return the operations for one token of a turn of ``length`` tokens."""
    return sum(
        2 * _weights_per_token(layer) + _mixing(layer, length) for layer in encoder.all_layers
    )


def read_operations(decoder: RxTDecoder) -> int:
    """Return the operations that project all slots for the decoder, once a turn."""
    slots = decoder.config.stm_size
    total = 0
    for layer in decoder.all_layers:
        if layer.reads_memory:
            attention = layer.cross_attention
            total += 2 * slots * (attention.key.weight.numel() + attention.value.weight.numel())
    return total


def write_operations(memory: MemoryAttention, length: int) -> int:
    """Return the operations that write an encoded turn of ``length`` tokens."""
    settings = memory.settings
    slots = settings.num_slots
    total = 0
    for name, parameter in memory.named_parameters():
        if parameter.ndim != 3 or not name.endswith(("query", "key", "value", "output", "weight")):
            continue
        from_tokens = name in ("write_attention.key", "write_attention.value")
        total += 2 * parameter.numel() * (length if from_tokens else slots)
    steps = [(settings.write_heads, length)]
    if hasattr(memory, "mix_attention"):
        steps.append((settings.mix_heads, slots))
    for heads, seen in steps:
        widest = max(heads.num_heads, heads.num_key_value_heads) * heads.head_dim
        total += settings.num_layers * slots * 4 * widest * seen
    return total


def decode_state_bytes(decoder: RxTDecoder, length: int) -> int:
    """Return the size of the decode cache of one conversation after ``length`` tokens of a turn."""
    element = decoder.embedding.weight.element_size()
    total, has_keys = 8, False  # The number of tokens so far.
    for layer in decoder.all_layers:
        attention = layer.self_attention
        if isinstance(attention, LinearSelfAttention):
            settings = attention.settings
            state = settings.value_heads * settings.key_dim * settings.value_dim
            channels = attention.query_key_value.out_features
            total += _STATE_BYTES * state
            total += element * channels * ((settings.conv_size or 1) - 1)
            continue
        width = attention.settings.num_key_value_heads * attention.settings.head_dim
        if layer.local_pattern is not None:
            total += 2 * element * width * layer.local_pattern.reach[0] + 8
        else:
            has_keys = True
            total += 2 * element * width * length
    return total + (length if has_keys else 0)  # Which tokens are real: one byte each.


def part_of(name: str) -> str:
    """Return the part to which the parameter ``name`` of a component belongs."""
    for pattern, part in _PARTS:
        if pattern in f".{name}" if pattern.startswith(".") else pattern in name:
            return part
    return "other"


def _parts(module: nn.Module, seen: set[int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = part_of(name)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _mixtures(module: nn.Module) -> Iterator[MixtureOfExperts]:
    return (part for part in module.modules() if isinstance(part, MixtureOfExperts))


def _idle(module: nn.Module) -> int:
    """Return how many parameters of routed experts a token leaves out."""
    total = 0
    for mixture in _mixtures(module):
        experts, settings = mixture.experts, mixture.settings
        each = [item.numel() // len(item) for item in experts.parameters() if len(item) > 1]
        if settings.num_experts > 1:
            total += sum(each) * (settings.num_experts - settings.top_k)
    return total


def _weights_per_token(layer: ReactiveLayer) -> int:
    """Return how many weights of matrices multiply every token."""
    total = 0
    for name, parameter in layer.named_parameters():
        dotted = f".{name}"
        once = any(key in dotted for key in _ONCE_A_TURN)
        if once and not (_token_fusion(layer) and any(key in dotted for key in _EVERY_TOKEN)):
            continue
        if parameter.ndim < 2 or name.endswith("_bias"):
            continue
        count: Any = parameter.numel()
        if isinstance(layer.feed_forward, MixtureOfExperts) and ".experts." in dotted:
            settings = layer.feed_forward.settings
            count = count // settings.num_experts * settings.top_k
        total += count
    return total


def _token_fusion(layer: ReactiveLayer) -> bool:
    attention = layer.self_attention
    return (
        isinstance(attention, LinearSelfAttention) and attention.settings.memory_fusion == "concat"
    )


def _mixing(layer: ReactiveLayer, length: int) -> int:
    """Return the operations of self-attention for a token that can see ``length``."""
    attention = layer.self_attention
    if isinstance(attention, LinearSelfAttention):
        settings = attention.settings
        state = settings.value_heads * settings.key_dim * settings.value_dim
        products = 4 if settings.mechanism == "gla" else 6
        return products * state * (2 if settings.bidirectional else 1)
    if layer.local_pattern is not None:
        length = min(length, sum(layer.local_pattern.reach) + 1)
    return _softmax_operations(attention, length)


def _softmax_operations(attention: Attention, num_seen: int) -> int:
    settings = attention.settings
    heads = max(settings.num_heads, settings.num_key_value_heads)
    return 4 * heads * settings.head_dim * num_seen
