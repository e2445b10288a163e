"""Normalised attention with a kernel that factorises: time linear, state constant.

    o_t = sum_s k(q_t, k_s) v_s / (sum_s k(q_t, k_s) + eps),   k(q, k) = phi(q) . phi(k)

The sums run over s <= t (causal) or over all tokens. Because the kernel factorises
(:mod:`rxlm.ops.feature_maps`), they are read from two sums over the past, which are the state:

    S_t = S_(t-1) + phi(k_t) v_t^T        z_t = z_(t-1) + phi(k_t)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t + eps)

Every form computes this: ``recurrent`` is the definition, ``step`` one token of it, ``quadratic``
the weights of all pairs, ``chunk`` pairs inside a chunk and the state across chunks. Nothing
decays and nothing is erased; for that see :mod:`rxlm.ops.linear_attention`.

Shapes: B batch, T tokens, H heads, K/V head dimensions, F features, C tokens of a chunk, N chunks,
M = N * B * H.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.feature_maps import FeatureMap, get_feature_map
from rxlm.ops.linear_attention.chunk import CPU_SEGMENT_ELEMENTS, to_chunks

Form = Literal["chunk", "recurrent", "quadratic", "step"]
FORMS: tuple[Form, ...] = ("chunk", "recurrent", "quadratic", "step")
DEFAULT_CHUNK_SIZE = 64
DEFAULT_EPS = 1e-12


class FeatureMapState(NamedTuple):
    """The past of B sequences, as large after one token as after a million.

    Attributes:
        key_value: S ``[B, H, F, V]`` float32 (float64 for float64 values).
        key_sum: z ``[B, H, F]``, of the same type.
    """

    key_value: Tensor
    key_sum: Tensor


class FeatureMapResult(NamedTuple):
    """Output ``[B, T, H, V]`` in the type of the values, and the state after the last token."""

    output: Tensor
    final_state: FeatureMapState


class _Tokens(NamedTuple):
    """Tokens in the precision of the computation; ``real`` ``[B, T]`` or None for all."""

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None

    def split(self, size: int) -> list[_Tokens]:
        """Cut into pieces of ``size`` tokens, in one operation (the backward pass of T slices
        would take quadratic time)."""
        query, key, value = (part.split(size, dim=1) for part in self[:3])
        real = [None] * len(query) if self.real is None else self.real.split(size, dim=1)
        return [_Tokens(*piece) for piece in zip(query, key, value, real, strict=True)]


class _Reading(NamedTuple):
    """What queries read: the weighted values ``[..., V]`` and the sum of the weights ``[...]``."""

    weighted: Tensor
    total: Tensor


def feature_map_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str = "elu",
    *,
    causal: bool = True,
    initial_state: FeatureMapState | None = None,
    key_mask: Tensor | None = None,
    form: Form = "chunk",
    normalize: bool = True,
    eps: float = DEFAULT_EPS,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> FeatureMapResult:
    """Attend with a kernel ``phi(q) . phi(k)`` (arXiv:2006.16236, equations 8-20).

    Computed in float32 (float64 for float64 values) whatever the inputs.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``.
        value: ``[B, T, H, V]``.
        feature_map: a key of :data:`rxlm.ops.feature_maps.FEATURE_MAPS`: ``elu`` (F = K) or
            ``taylor`` (F = 1 + K + K (K + 1) / 2; keep K near 16).
        causal: whether a token sees only itself and earlier ones; otherwise all of them.
        initial_state: from an earlier call; its tokens are visible to all. None for nothing.
        key_mask: ``[B, T]`` bool, True where the token is real; the others change nothing and
            yield zeros, wherever they stand.
        form: ``chunk`` for sequences, ``step`` for one token, ``recurrent`` for the definition,
            ``quadratic`` for all pairs. All give the same result, up to rounding.
        normalize: whether to divide by the sum of the weights.
        eps: added to the sum of the weights; positive, so that what sees nothing yields zeros.
        chunk_size: C; changes time and memory, not the result.

    Returns:
        Output and final state.

    Raises:
        UserError: on an unknown feature map or form, tensors that do not fit together, ``step``
            with more than one token, or an eps or chunk size that is not positive.
    """
    kernel = get_feature_map(feature_map)
    _check_settings(form, query.shape[1] if query.ndim > 1 else 0, eps, chunk_size)
    _check(kernel, query, key, value, initial_state, key_mask)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=query.device.type, enabled=False):
        tokens = _prepare(query, key, value, key_mask, dtype)
        state = _first_state(kernel, tokens, initial_state)
        if query.shape[1] == 0:
            return FeatureMapResult(value.new_zeros(value.shape), state)
        if form == "chunk":
            reading, state = _chunked(kernel, tokens, state, causal, chunk_size)
        elif form == "quadratic":
            reading, state = _quadratic(kernel, tokens, state, causal)
        else:
            reading, state = _recurrent(kernel, tokens, state, causal)
        output = reading.weighted
        if normalize:
            output = output / (reading.total + eps).unsqueeze(-1)
        if key_mask is not None:
            output = output.masked_fill(~key_mask[:, :, None, None], 0.0)
    return FeatureMapResult(output.to(value.dtype), state)


# --- the forms ------------------------------------------------------------------------------------


def _recurrent(
    kernel: FeatureMap, tokens: _Tokens, state: FeatureMapState, causal: bool
) -> tuple[_Reading, FeatureMapState]:
    """Token by token: the definition, and the decoding step."""
    queries = kernel.features(tokens.query).transpose(1, 2).split(1, dim=2)
    readings = []
    for query, token in zip(queries, tokens.split(1), strict=True):
        key, value = _key_features(kernel, token)[:, 0], token.value[:, 0]
        state = FeatureMapState(
            state.key_value + key.unsqueeze(-1) * value.unsqueeze(-2), state.key_sum + key
        )
        if causal:
            readings.append(_read(query, state))
    if not causal:
        readings = [_read(query, state) for query in queries]
    weighted, total = (torch.cat(parts, dim=2) for parts in zip(*readings, strict=True))
    return _Reading(weighted.transpose(1, 2), total.transpose(1, 2)), state


def _quadratic(
    kernel: FeatureMap, tokens: _Tokens, state: FeatureMapState, causal: bool
) -> tuple[_Reading, FeatureMapState]:
    """The weights of all pairs at once, in memory that grows with T * T."""
    query, key, value = (part.transpose(1, 2) for part in tokens[:3])
    key_features = _key_features(kernel, tokens).transpose(1, 2)
    query_features = kernel.features(query)
    real = None if tokens.real is None else tokens.real[:, None, :, None]
    weights = _weights(kernel, query, key, query_features, key_features, real, causal)
    past = _read(query_features, state)
    final = FeatureMapState(
        state.key_value + key_features.mT @ value, state.key_sum + key_features.sum(dim=-2)
    )
    weighted, total = past.weighted + weights @ value, past.total + weights.sum(dim=-1)
    return _Reading(weighted.transpose(1, 2), total.transpose(1, 2)), final


def _chunked(
    kernel: FeatureMap, tokens: _Tokens, state: FeatureMapState, causal: bool, chunk_size: int
) -> tuple[_Reading, FeatureMapState]:
    """Chunks: quadratic inside, the state across. Exact, whatever the chunk size."""
    batch, length, num_heads, width = tokens.query.shape
    chunk_size = min(chunk_size, length)
    segment = length
    if tokens.query.device.type == "cpu":
        elements = batch * num_heads * chunk_size * kernel.size(width)
        segment = chunk_size * max(1, CPU_SEGMENT_ELEMENTS // elements)
    pieces = tokens.split(segment)
    readings = []
    if causal:
        for piece in pieces:
            reading, state = _segment(kernel, piece, state, chunk_size)
            readings.append(reading)
    else:
        for piece in pieces:
            key = _key_features(kernel, piece).transpose(1, 2)
            state = FeatureMapState(
                state.key_value + key.mT @ piece.value.transpose(1, 2),
                state.key_sum + key.sum(dim=-2),
            )
        for piece in pieces:
            found = _read(kernel.features(piece.query).transpose(1, 2), state)
            readings.append(_Reading(found.weighted.transpose(1, 2), found.total.transpose(1, 2)))
    if len(readings) == 1:
        return readings[0], state
    return _Reading(*(torch.cat(parts, dim=1) for parts in zip(*readings, strict=True))), state


def _segment(
    kernel: FeatureMap, tokens: _Tokens, state: FeatureMapState, chunk_size: int
) -> tuple[_Reading, FeatureMapState]:
    """Run over consecutive chunks whose intermediate results are held together."""
    batch, length, num_heads, _ = tokens.query.shape
    real = tokens.real
    if real is None and length % chunk_size:
        # The tokens that fill the last chunk have features that are not zero.
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.query.device)
    if real is not None:
        real = to_chunks(real[:, :, None, None].expand(-1, -1, num_heads, -1), chunk_size)
    query, key, value = (to_chunks(part, chunk_size) for part in tokens[:3])
    query_features, key_features = kernel.features(query), kernel.features(key)
    if real is not None:
        key_features = key_features.masked_fill(~real, 0.0)
    weights = _weights(kernel, query, key, query_features, key_features, real, True)
    rows = batch * num_heads
    key_values = _sums_before(state.key_value.flatten(0, 1), key_features.mT @ value, rows)
    key_sums = _sums_before(state.key_sum.flatten(0, 1), key_features.sum(dim=1), rows)
    entry = FeatureMapState(key_values[:-1].flatten(0, 1), key_sums[:-1].flatten(0, 1))
    past = _read(query_features, entry)
    weighted = torch.baddbmm(past.weighted, weights, value)
    total = past.total + weights.sum(dim=-1)
    final = FeatureMapState(
        *(sums[-1].unflatten(0, (batch, num_heads)) for sums in (key_values, key_sums))
    )
    merged = (
        part.unflatten(0, (-1, batch, num_heads)).movedim(3, 2).movedim(1, 0).flatten(1, 2)
        for part in (weighted, total)
    )
    return _Reading(*(part[:, :length] for part in merged)), final


def _sums_before(start: Tensor, added: Tensor, num_rows: int) -> Tensor:
    """Return the N + 1 states before, between and after N chunks, from what each of them adds."""
    per_chunk = added.unflatten(0, (-1, num_rows))
    return torch.cat((start.unsqueeze(0), per_chunk)).cumsum(dim=0)


def _weights(
    kernel: FeatureMap,
    query: Tensor,
    key: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    real: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return ``k(q_t, k_s)`` ``[..., C, C]``, zero where s is padding or (causal) after t."""
    if kernel.kernel is None:
        weights = query_features @ key_features.mT  # features of padding are zeros
    else:
        weights = kernel.kernel(query, key)
        if real is not None:
            weights = weights.masked_fill(~real.mT, 0.0)
    return weights.tril() if causal else weights


def _key_features(kernel: FeatureMap, tokens: _Tokens) -> Tensor:
    """Return ``[B, T, H, F]``, zeros at padding."""
    features = kernel.features(tokens.key)
    if tokens.real is None:
        return features
    return features.masked_fill(~tokens.real[:, :, None, None], 0.0)


def _read(query_features: Tensor, state: FeatureMapState) -> _Reading:
    """Read with query features ``[..., T, F]`` from a state ``[..., F, V]``, ``[..., F]``."""
    total = query_features @ state.key_sum.unsqueeze(-1)
    return _Reading(query_features @ state.key_value, total.squeeze(-1))


# --- what goes in ---------------------------------------------------------------------------------


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, dtype: torch.dtype
) -> _Tokens:
    """Convert, and blank what stands at padding, so that not even a NaN there matters."""
    query, key, value = (part.to(dtype) for part in (query, key, value))
    if key_mask is not None:
        padding = ~key_mask[:, :, None, None]
        query, key, value = (part.masked_fill(padding, 0.0) for part in (query, key, value))
    return _Tokens(query, key, value, key_mask)


def _first_state(
    kernel: FeatureMap, tokens: _Tokens, initial_state: FeatureMapState | None
) -> FeatureMapState:
    if initial_state is not None:
        return FeatureMapState(*(part.to(tokens.value.dtype) for part in initial_state))
    batch, _, num_heads, width = tokens.query.shape
    shape = (batch, num_heads, kernel.size(width))
    zeros = tokens.value.new_zeros
    return FeatureMapState(zeros(*shape, tokens.value.shape[-1]), zeros(shape))


def _check_settings(form: str, length: int, eps: float, chunk_size: int) -> None:
    if form not in FORMS:
        raise UserError(f"form {form!r} does not exist: use one of {', '.join(FORMS)}.")
    if form == "step" and length != 1:
        raise UserError(
            f"feature map attention: form 'step' takes one token, not {length}; use 'chunk'."
        )
    for name, number in (("eps", eps), ("chunk_size", chunk_size)):
        if not number > 0:
            raise UserError(f"feature map attention: {name}={number} must be positive.")


def _check(
    kernel: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: FeatureMapState | None,
    key_mask: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or 0 in tensor.shape[2:]:
            raise UserError(
                f"feature map attention: {name} has shape {list(tensor.shape)}, expected four "
                "dimensions [batch, tokens, heads, head dimension], the last two not 0."
            )
    batch, length, num_heads, width = query.shape
    size = (batch, num_heads, kernel.size(width))
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("key", key, (batch, length, num_heads, width)),
        ("value", value, (batch, length, num_heads, value.shape[-1])),
    ]
    if state is not None:
        expected += [
            ("initial_state.key_value", state[0], (*size, value.shape[-1])),
            ("initial_state.key_sum", state[1], size),
        ]
    if key_mask is not None:
        expected.append(("key_mask", key_mask, (batch, length)))
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"feature map attention ({kernel.name}): {name} has shape {list(tensor.shape)}, "
                f"expected {list(shape)} to go with query {list(query.shape)}."
            )
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise UserError(
            f"feature map attention: key_mask has type {key_mask.dtype}, expected torch.bool "
            "(True where the token is real): pass key_mask.bool()."
        )
