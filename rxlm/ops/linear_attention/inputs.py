"""What goes into linear attention: checks, padding as identity steps, what the torch forms read.

Padding is turned into steps that change nothing (no decay, nothing written, nothing erased,
nothing read), so a padded token leaves no trace wherever it stands and whatever it holds.

Shapes: B batch, T tokens, H query/key heads, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rxlm.errors import UserError


@dataclass(frozen=True)
class Mechanism:
    """What tells one mechanism from another.

    Attributes:
        name: as users write it.
        decay: one gate per value head, one per channel of the key, or None for no decay.
        delta_rule: whether a write first erases what the state holds under the same key.
    """

    name: str
    decay: Literal["head", "channel"] | None
    delta_rule: bool


MECHANISMS: dict[str, Mechanism] = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism("gla", decay="channel", delta_rule=False),
        Mechanism("deltanet", decay=None, delta_rule=True),
        Mechanism("gated_deltanet", decay="head", delta_rule=True),
        Mechanism("kda", decay="channel", delta_rule=True),
    )
}
"""The mechanisms by name: what their states decay by, and whether they correct what is stored."""


@dataclass(frozen=True)
class Tokens:
    """One sequence per row, as given or (after :func:`for_torch`) as the torch forms read it.

    Attributes:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``.
        value: ``[B, T, HV, V]``.
        log_decay: ``[B, T, HV]`` or ``[B, T, HV, K]`` (torch forms: always four dimensions, the
            last of size 1 or K), or None.
        write_strength: ``[B, T, HV]``, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    write_strength: Tensor | None

    def split(self, size: int) -> list[Tokens]:
        """Cut into pieces of ``size`` tokens (the last may be shorter), at least one.

        In one operation for all pieces: the backward pass of a slice fills the whole sequence with
        zeros, so slicing piece by piece would take quadratic time.
        """
        parts = [
            None if tensor is None else tensor.split(size, dim=1)
            for tensor in (self.query, self.key, self.value, self.log_decay, self.write_strength)
        ]
        query, key, value, log_decay, write_strength = parts
        assert query is not None and key is not None and value is not None
        return [
            Tokens(
                query[piece],
                key[piece],
                value[piece],
                None if log_decay is None else log_decay[piece],
                None if write_strength is None else write_strength[piece],
            )
            for piece in range(len(query))
        ]


def check(
    mechanism: Mechanism, tokens: Tokens, initial_state: Tensor | None, key_mask: Tensor | None
) -> None:
    """Refuse tensors that do not fit together, naming the one at fault.

    Raises:
        UserError: on a wrong number of dimensions, shape or type.
    """
    for name in ("query", "key", "value"):
        tensor = getattr(tokens, name)
        if tensor.ndim != 4:
            raise UserError(
                f"{mechanism.name}: {name} has shape {list(tensor.shape)}, expected four "
                "dimensions [batch, tokens, heads, head dimension]."
            )
    batch, length, num_heads, key_dim = tokens.query.shape
    num_value_heads, value_dim = tokens.value.shape[2:]
    _expect(mechanism, "key", tokens.key, (batch, length, num_heads, key_dim))
    _expect(mechanism, "value", tokens.value, (batch, length, num_value_heads, value_dim))
    if num_value_heads % num_heads:
        raise UserError(
            f"{mechanism.name}: value has {num_value_heads} heads and query {num_heads}: the "
            "number of value heads must be a multiple of the number of query heads."
        )
    per_head = (batch, length, num_value_heads)
    if tokens.log_decay is not None:
        channels = (key_dim,) if mechanism.decay == "channel" else ()
        _expect(mechanism, "log_decay", tokens.log_decay, per_head + channels)
    if tokens.write_strength is not None:
        _expect(mechanism, "write_strength", tokens.write_strength, per_head)
    if initial_state is not None:
        expected = (batch, num_value_heads, key_dim, value_dim)
        _expect(mechanism, "initial_state", initial_state, expected)
    if key_mask is not None:
        _expect(mechanism, "key_mask", key_mask, (batch, length))
        if key_mask.dtype != torch.bool:
            raise UserError(
                f"{mechanism.name}: key_mask has type {key_mask.dtype}, expected torch.bool "
                "(True where the token is real): pass key_mask.bool()."
            )


def check_gates(mechanism: Mechanism, log_decay: Tensor | None) -> None:
    """Refuse gates that would make the state grow.

    Looks at the values, so only where that is free: not on a GPU, where the program would have to
    wait for the result, and not while compiling.

    Raises:
        UserError: if a gate is positive.
    """
    if log_decay is None or log_decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((log_decay > 0).any()):
        raise UserError(
            f"{mechanism.name}: log_decay reaches {float(log_decay.detach().max()):.4g}, expected "
            "natural logarithms of decays in (0, 1], so values <= 0; for a decay factor a pass "
            "a.log()."
        )


def ignore_padding(tokens: Tokens, key_mask: Tensor | None) -> Tokens:
    """Turn the tokens where ``key_mask`` ``[B, T]`` is False into steps without any effect."""
    if key_mask is None:
        return tokens
    padding = ~key_mask
    per_head, per_channel = padding[:, :, None], padding[:, :, None, None]
    log_decay, write_strength = tokens.log_decay, tokens.write_strength
    if log_decay is not None:
        log_decay = log_decay.masked_fill(per_head if log_decay.ndim == 3 else per_channel, 0.0)
    if write_strength is not None:
        write_strength = write_strength.masked_fill(per_head, 0.0)
    return Tokens(
        tokens.query.masked_fill(per_channel, 0.0),
        tokens.key.masked_fill(per_channel, 0.0),
        tokens.value.masked_fill(per_channel, 0.0),
        log_decay,
        write_strength,
    )


def repeat_heads(tokens: Tokens) -> Tokens:
    """Give queries and keys as many heads as the values: head i serves a run of HV / H of them."""
    repeats = tokens.value.shape[2] // tokens.query.shape[2]
    if repeats == 1:
        return tokens
    return replace(
        tokens,
        query=tokens.query.repeat_interleave(repeats, dim=2),
        key=tokens.key.repeat_interleave(repeats, dim=2),
    )


def for_torch(tokens: Tokens, initial_state: Tensor | None) -> tuple[Tokens, Tensor]:
    """Bring tokens and state to what the torch forms compute with.

    Returns:
        Tokens in float32 (float64 if the values are) with HV query and key heads and
        four-dimensional decays; the state ``[B, HV, K, V]``, zeros if there was none.
    """
    dtype = torch.float64 if tokens.value.dtype == torch.float64 else torch.float32
    key_dim = tokens.query.shape[-1]
    tokens = repeat_heads(tokens)
    batch, _, num_heads, value_dim = tokens.value.shape
    log_decay, write_strength = tokens.log_decay, tokens.write_strength
    if log_decay is not None:
        log_decay = (log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay).to(dtype)
    if initial_state is None:
        state = tokens.value.new_zeros(batch, num_heads, key_dim, value_dim, dtype=dtype)
    else:
        state = initial_state.to(dtype)
    prepared = Tokens(
        tokens.query.to(dtype),
        tokens.key.to(dtype),
        tokens.value.to(dtype),
        log_decay,
        None if write_strength is None else write_strength.to(dtype),
    )
    return prepared, state


def scaled(tokens: Tokens, scale: float) -> Tokens:
    """Multiply the queries by ``scale``."""
    return replace(tokens, query=tokens.query * scale)


def _expect(mechanism: Mechanism, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{mechanism.name}: {name} has shape {list(tensor.shape)}, expected {list(shape)} "
            "to go with query and value."
        )
