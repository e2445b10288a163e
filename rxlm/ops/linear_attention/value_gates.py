"""The delta rule with gates per value channel and several updates a token.

    S_t,0 = S_t-1 diag(alpha_t)
    S_t,j = S_t,j-1 + k_t,j (beta_t,j * (v_t,j - S_t,j-1^T k_t,j))^T      j = 1 .. n
    o_t   = S_t,n^T q_t

S is ``[K, V]``; alpha and beta are vectors over the V columns of S (or one number for all), so each
value channel is a gated delta rule (arXiv:2412.06464) of its own with scalar gates, and every step
is a contraction for beta |k|^2 <= 2. With one number per head and n = 1 this is DeltaNet or Gated
DeltaNet, with n > 1 Gated DeltaProduct (arXiv:2502.10297). The mechanisms with decays per *key*
channel are elsewhere (:mod:`.mechanisms`): theirs can share one system for all columns, and have
kernels.

The chunk form solves one triangular system per chunk and *gate*, so a gate per channel costs V
systems of C x C where a gate per head costs one. It is exact for any chunk size.

Shapes: B batch, T tokens, n updates a token, H heads, K/V head dimensions, G gates of a head (1 or
V), C tokens of a chunk, U = C * n updates of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rxlm.errors import UserError
from rxlm.ops.linear_attention.decay import decay_factors
from rxlm.ops.linear_attention.mechanisms import LinearAttentionResult

StateActivation = Callable[[Tensor], Tensor]
PER_CHANNEL_CHUNK = 16
"""Tokens of a chunk are limited to this where each channel has a gate: memory grows with V C^2."""


class _Updates(NamedTuple):
    """What the forms read, heads first; the decay holds for a token, the strength for an update.

    Attributes:
        query: ``[B, H, T, K]``.
        key: ``[B, H, T * n, K]``.
        value: ``[B, H, T * n, V]``.
        log_decay: ``[B, H, T, G]`` or None.
        write_strength: ``[B, H, T * n, G]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    write_strength: Tensor


def value_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    write_strength: Tensor,
    *,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    form: Literal["chunk", "recurrent"] = "chunk",
    chunk_size: int = 64,
    state_activation: StateActivation | None = None,
    recompute: bool = False,
) -> LinearAttentionResult:
    """Run the recurrence above over all tokens.

    Args:
        query: ``[B, T, H, K]``; used as it is (no scale).
        key: ``[B, T, n, H, K]``, of length at most 1.
        value: ``[B, T, n, H, V]``.
        log_decay: ``[B, T, H, G]``, logarithms <= 0 of alpha; None for alpha = 1.
        write_strength: ``[B, T, n, H, G]``, beta, from 0 to 1 (at most 2).
        initial_state: ``[B, H, K, V]``; None = zeros.
        key_mask: ``[B, T]`` bool, True at real tokens; the others change nothing and read zeros.
        form: ``chunk``, or ``recurrent``: one token after the other, the definition.
        chunk_size: most tokens computed at once, at least 1. Never changes the result. The largest
            power of two within it is used, at most 16 with a gate per channel.
        state_activation: applied to the state after each *token*; such a state cannot be computed
            by chunks, so ``form`` must be ``recurrent``.
        recompute: store no intermediate results of chunks for the backward pass.

    Returns:
        Outputs ``[B, T, H, V]`` in the type of ``query``, and the last state in float32 (float64
        for float64 values).

    Raises:
        UserError: on shapes that do not fit, or an activation with ``form='chunk'``.
    """
    _check(query, key, value, log_decay, write_strength, initial_state, key_mask)
    if chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size} must be at least 1.")
    if state_activation is not None and form == "chunk":
        raise UserError(
            "a nonlinear state cannot be computed by chunks: use form='recurrent', which is slow."
        )
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, length, num_heads, key_dim = query.shape
    with torch.autocast(device_type=query.device.type, enabled=False):
        if initial_state is None:
            state = value.new_zeros(batch, num_heads, key_dim, value.shape[-1], dtype=dtype)
        else:
            state = initial_state.to(dtype)
        if not length:
            nothing = query.new_zeros(batch, 0, num_heads, value.shape[-1])
            return LinearAttentionResult(nothing, state)
        updates = _prepare(query, key, value, log_decay, write_strength, key_mask, dtype)
        if form == "recurrent":
            output, state = _recurrent(updates, state, key_mask, state_activation)
        else:
            output, state = _chunked(updates, state, chunk_size, recompute)
    return LinearAttentionResult(output.transpose(1, 2).to(query.dtype), state)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    write_strength: Tensor,
    initial_state: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    if query.ndim != 4 or key.ndim != 5 or value.ndim != 5:
        raise UserError(
            f"value_gated_delta_rule: query {list(query.shape)}, key {list(key.shape)}, value "
            f"{list(value.shape)}: expected [B, T, H, K], [B, T, n, H, K], [B, T, n, H, V]."
        )
    batch, length, num_heads, key_dim = query.shape
    num_updates, value_dim = value.shape[2], value.shape[4]
    gates = (*write_strength.shape[4:],) if log_decay is None else (*log_decay.shape[3:],)
    if gates not in ((1,), (value_dim,)):
        raise UserError(
            f"value_gated_delta_rule: gates of {list(gates)} per head, expected 1 or {value_dim}."
        )
    expected = {
        "key": (key, (batch, length, num_updates, num_heads, key_dim)),
        "value": (value, (batch, length, num_updates, num_heads, value_dim)),
        "log_decay": (log_decay, (batch, length, num_heads, *gates)),
        "write_strength": (write_strength, (batch, length, num_updates, num_heads, *gates)),
        "initial_state": (initial_state, (batch, num_heads, key_dim, value_dim)),
        "key_mask": (key_mask, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"value_gated_delta_rule: {name} has shape {list(tensor.shape)}, expected "
                f"{list(shape)}."
            )


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    write_strength: Tensor,
    key_mask: Tensor | None,
    dtype: torch.dtype,
) -> _Updates:
    """Bring everything to ``dtype`` and heads first; padding becomes steps without effect."""
    query = query.to(dtype).transpose(1, 2)
    key, value, write_strength = (
        # [B, T, n, H, X] to [B, H, T * n, X]
        tensor.to(dtype).flatten(1, 2).transpose(1, 2)
        for tensor in (key, value, write_strength)
    )
    if log_decay is not None:
        log_decay = log_decay.to(dtype).transpose(1, 2)
    if key_mask is not None:
        padding = ~key_mask[:, None, :, None]
        of_updates = padding.repeat_interleave(key.shape[2] // query.shape[2], dim=2)
        query = query.masked_fill(padding, 0.0)
        key, value, write_strength = (
            tensor.masked_fill(of_updates, 0.0) for tensor in (key, value, write_strength)
        )
        if log_decay is not None:
            log_decay = log_decay.masked_fill(padding, 0.0)
    return _Updates(query, key, value, log_decay, write_strength)


def _recurrent(
    updates: _Updates, state: Tensor, key_mask: Tensor | None, activation: StateActivation | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    num_updates = updates.key.shape[2] // updates.query.shape[2]
    outputs = []
    for token, query in enumerate(updates.query.unbind(2)):
        before = state
        if updates.log_decay is not None:
            state = state * updates.log_decay[:, :, token].exp().unsqueeze(-2)
        for update in range(token * num_updates, (token + 1) * num_updates):
            key = updates.key[:, :, update]
            predicted = (key.unsqueeze(-2) @ state).squeeze(-2)
            error = updates.value[:, :, update] - predicted
            written = updates.write_strength[:, :, update] * error
            state = state + key.unsqueeze(-1) * written.unsqueeze(-2)
        outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
        if activation is not None:
            state = activation(state)
            if key_mask is not None:
                state = torch.where(key_mask[:, token, None, None, None], state, before)
    return torch.stack(outputs, dim=2), state


def _chunked(
    updates: _Updates, state: Tensor, chunk_size: int, recompute: bool
) -> tuple[Tensor, Tensor]:
    length = updates.query.shape[2]
    num_updates = updates.key.shape[2] // length
    if updates.write_strength.shape[-1] > 1:
        chunk_size = min(chunk_size, PER_CHANNEL_CHUNK)
    chunk_size = 1 << (min(chunk_size, length).bit_length() - 1)
    factors = (1, num_updates, num_updates, 1, num_updates)
    missing = -length % chunk_size
    if missing:  # tokens of zeros change nothing
        updates = _Updates._make(
            None if tensor is None else F.pad(tensor, (0, 0, 0, missing * factor))
            for tensor, factor in zip(updates, factors, strict=True)
        )
    # One split for all chunks: the backward pass of a slice fills the whole sequence with zeros.
    pieces = [
        None if tensor is None else tensor.split(chunk_size * factor, dim=2)
        for tensor, factor in zip(updates, factors, strict=True)
    ]
    outputs = []
    for index in range((length + missing) // chunk_size):
        chunk = _Updates._make(None if piece is None else piece[index] for piece in pieces)
        if recompute and torch.is_grad_enabled():
            output, state = checkpoint(_chunk, chunk, state, use_reentrant=False)
        else:
            output, state = _chunk(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, dim=2)[:, :, :length], state


def _chunk(chunk: _Updates, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one chunk of tokens from the state ``[B, H, K, V]`` at its start.

    W ``[B, H, G, U, V / G]`` is what the updates write. Update i meets what was written before it
    in the chunk, so W solves (I + strictly lower(beta_i k_i . k_j decay_ij)) W = beta (v - S k).
    """
    query, key, value, log_decay, write_strength = chunk
    num_tokens, gates = query.shape[2], write_strength.shape[-1]
    num_updates = key.shape[2] // num_tokens
    strength = write_strength.movedim(-1, 2).unsqueeze(-1)  # [B, H, G, U, 1]
    between_keys = (key @ key.mT).unsqueeze(2)
    seen = (query @ key.mT).unsqueeze(2)
    predicted, read = _by_gate(key @ state, gates), _by_gate(query @ state, gates)
    factors = None
    if log_decay is None:
        tokens = torch.ones(num_tokens, num_tokens, dtype=query.dtype, device=query.device).tril()
        visible = tokens.repeat_interleave(num_updates, dim=1)
    else:
        steps = log_decay.movedim(-1, 2).flatten(0, 2).unsqueeze(-1)  # [B * H * G, C, 1]
        outer = (*query.shape[:2], gates)
        factors = tuple(part.unflatten(0, outer) for part in decay_factors(steps))
        between, since_start, until_end, total = factors  # since_start: [B, H, G, C, 1]
        visible = between.repeat_interleave(num_updates, dim=-1)
        predicted = predicted * since_start.repeat_interleave(num_updates, dim=-2)
        read = read * since_start
        between_keys = between_keys * visible.repeat_interleave(num_updates, dim=-2)
    written = torch.linalg.solve_triangular(
        strength * between_keys,
        strength * (_by_gate(value, gates) - predicted),
        upper=False,
        unitriangular=True,
    )
    output = read + (seen * visible) @ written
    if factors is None:
        kept, remaining = state, written
    else:
        kept = state * total.squeeze(-1).unsqueeze(-2)
        remaining = until_end.repeat_interleave(num_updates, dim=-2) * written
    return _merge(output), kept + key.mT @ _merge(remaining)


def _by_gate(tensor: Tensor, gates: int) -> Tensor:
    """``[B, H, X, V]`` to ``[B, H, G, X, V / G]``: the columns that share a gate."""
    return tensor.unflatten(-1, (gates, -1)).movedim(-2, 2)


def _merge(tensor: Tensor) -> Tensor:
    """Undo :func:`_by_gate`."""
    return tensor.movedim(2, -2).flatten(-2)
