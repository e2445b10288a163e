"""Linear attention: GLA, DeltaNet, Gated DeltaNet and KDA as pure functions with a carried state.

A state ``S [K, V]`` per value head takes the place of all past keys and values. Each token, in
this order: ``S <- exp(log_decay) * S`` (rows of S), then ``S <- S + key u^T`` where u is the value
(GLA) or ``write_strength * (value - S^T key)`` (the delta rule: what is already stored under the
key is taken away first), then ``output = scale * S^T query``. MD-GDN is :func:`kda` with gates and
an initial state that depend on the memory.

Not here: projections, convolutions, normalisation of queries and keys (the delta rule needs keys
of length 1, see :func:`l2_normalize`), gates from hidden states.

Shapes: B batch, T tokens, H query/key heads, HV value heads (a multiple of H), K/V head
dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention.backends import (
    Backend,
    BackendChoice,
    Form,
    log_choice,
    run_fla,
    select_backend,
)
from rxlm.ops.linear_attention.chunk import ChunkStarts, chunked, chunked_with_starts
from rxlm.ops.linear_attention.inputs import (
    MECHANISMS,
    Tokens,
    check,
    check_gates,
    for_torch,
    ignore_padding,
    scaled,
)
from rxlm.ops.linear_attention.recurrent import recurrent, step

DEFAULT_CHUNK_SIZE = 64


class LinearAttentionResult(NamedTuple):
    """What every mechanism returns.

    Attributes:
        output: ``[B, T, HV, V]`` in the type of the query; zeros at padding.
        final_state: ``[B, HV, K, V]`` after the last token, float32 (float64 for float64 values).
    """

    output: Tensor
    final_state: Tensor


def gla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    form: Form = "chunk",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    backend: Backend = "auto",
) -> LinearAttentionResult:
    """Gated linear attention (arXiv:2312.06635): decay per channel, writes are added.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``.
        value: ``[B, T, HV, V]``; query/key head i serves value heads ``i*HV/H`` and following.
        log_decay: ``[B, T, HV, K]``, natural logarithms <= 0.
        initial_state: ``[B, HV, K, V]`` from an earlier call; None for an empty one.
        key_mask: ``[B, T]`` bool, True where the token is real; the others change nothing and
            yield zeros, wherever they stand.
        scale: factor on the queries; default ``K**-0.5``.
        form: ``chunk`` for sequences, ``step`` for one token, ``recurrent`` for the definition,
            token by token. All give the same result.
        chunk_size: tokens solved together by the torch chunk form (a power of two); changes time
            and memory, not the result. fla's kernels choose their own.
        backend: ``auto`` takes fla where it can run (:func:`select_backend` tells) and torch
            otherwise.

    Returns:
        Output and final state.

    Raises:
        UserError: on tensors that do not fit together, positive gates (looked for on the CPU), or
            a form or backend that cannot run.
    """
    tokens = Tokens(query, key, value, log_decay, None)
    return _attend("gla", tokens, initial_state, key_mask, scale, form, chunk_size, backend)


def deltanet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write_strength: Tensor,
    *,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    form: Form = "chunk",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    backend: Backend = "auto",
) -> LinearAttentionResult:
    """DeltaNet (arXiv:2406.06484): the delta rule without decay.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``, of length 1.
        value: ``[B, T, HV, V]``.
        write_strength: ``[B, T, HV]`` in [0, 1] (up to 2 with negative eigenvalues); often beta.
        initial_state: see :func:`gla`, as for all arguments below.
        key_mask: ``[B, T]`` bool.
        scale: factor on the queries.
        form: ``chunk``, ``recurrent`` or ``step``.
        chunk_size: a power of two.
        backend: ``auto``, ``torch`` or ``fla``.

    Returns:
        Output and final state.

    Raises:
        UserError: as :func:`gla`.
    """
    tokens = Tokens(query, key, value, None, write_strength)
    return _attend("deltanet", tokens, initial_state, key_mask, scale, form, chunk_size, backend)


def gated_deltanet(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    *,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    form: Form = "chunk",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    backend: Backend = "auto",
) -> LinearAttentionResult:
    """Gated DeltaNet (arXiv:2412.06464): the delta rule with one decay per value head.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``, of length 1.
        value: ``[B, T, HV, V]``.
        log_decay: ``[B, T, HV]``, natural logarithms <= 0.
        write_strength: ``[B, T, HV]`` in [0, 1] (up to 2 with negative eigenvalues); often beta.
        initial_state: see :func:`gla`, as for all arguments below.
        key_mask: ``[B, T]`` bool.
        scale: factor on the queries.
        form: ``chunk``, ``recurrent`` or ``step``.
        chunk_size: a power of two.
        backend: ``auto``, ``torch`` or ``fla``.

    Returns:
        Output and final state.

    Raises:
        UserError: as :func:`gla`.
    """
    tokens = Tokens(query, key, value, log_decay, write_strength)
    return _attend(
        "gated_deltanet", tokens, initial_state, key_mask, scale, form, chunk_size, backend
    )


def kda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    *,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    form: Form = "chunk",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    backend: Backend = "auto",
) -> LinearAttentionResult:
    """Kimi delta attention (arXiv:2510.26692): the delta rule with a decay per channel.

    Args:
        query: ``[B, T, H, K]``.
        key: ``[B, T, H, K]``, of length 1.
        value: ``[B, T, HV, V]``.
        log_decay: ``[B, T, HV, K]``, natural logarithms <= 0.
        write_strength: ``[B, T, HV]`` in [0, 1] (up to 2 with negative eigenvalues); often beta.
        initial_state: see :func:`gla`, as for all arguments below.
        key_mask: ``[B, T]`` bool.
        scale: factor on the queries.
        form: ``chunk``, ``recurrent`` or ``step``.
        chunk_size: a power of two.
        backend: ``auto``, ``torch`` or ``fla``.

    Returns:
        Output and final state.

    Raises:
        UserError: as :func:`gla`.
    """
    tokens = Tokens(query, key, value, log_decay, write_strength)
    return _attend("kda", tokens, initial_state, key_mask, scale, form, chunk_size, backend)


def kda_with_starts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    *,
    keep: Tensor,
    added: Tensor,
    cut: Tensor | None = None,
    initial_state: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> LinearAttentionResult:
    """KDA whose state is changed at given places: where a turn of a conversation begins.

    The same as :func:`kda` for one chunk of tokens after the other, each with ``initial_state =
    keep * (state after the chunk before) + added``, but what does not depend on the state is
    computed for all chunks at once. In PyTorch on every device: fla has no such kernel.

    Args:
        query: ``[B, T, H, K]``, T a multiple of the N chunks; a chunk has a power of two tokens.
        key: ``[B, T, H, K]``, of length 1.
        value: ``[B, T, HV, V]``.
        log_decay: ``[B, T, HV, K]``, natural logarithms <= 0.
        write_strength: ``[B, T, HV]``.
        keep: ``[B, N, HV]``, factor on the state before each chunk; 1 where nothing happens.
        added: ``[B, N, HV, K, V]``, what is added to it there; 0 where nothing happens.
        cut: bool ``[B, N]``, where the gradient of the state is cut; None = nowhere.
        initial_state: ``[B, HV, K, V]`` before the first chunk; None for an empty one.
        key_mask: ``[B, T]`` bool, True at real tokens.
        scale: factor on the queries; default ``K**-0.5``.

    Returns:
        Output ``[B, T, HV, V]``, and as ``final_state`` all states ``[N + 1, B, HV, K, V]``:
        before each chunk, before its start changes it, and after the last.

    Raises:
        UserError: as :func:`gla`, and if ``keep``, ``added`` or ``cut`` do not fit.
    """
    mechanism = MECHANISMS["kda"]
    tokens = Tokens(query, key, value, log_decay, write_strength)
    check(mechanism, tokens, initial_state, key_mask)
    _check_starts(tokens, keep, added, cut)
    log_choice("kda", "with starts", BackendChoice("torch", "fla has no kernel for it"))
    tokens = ignore_padding(tokens, key_mask)
    check_gates(mechanism, tokens.log_decay)
    with torch.autocast(device_type=query.device.type, enabled=False):
        prepared, state = for_torch(tokens, initial_state)
        prepared = scaled(prepared, query.shape[3] ** -0.5 if scale is None else scale)
        starts = ChunkStarts(keep.to(state.dtype), added.to(state.dtype), cut)
        output, states = chunked_with_starts(prepared, state, starts)
    return LinearAttentionResult(output.to(query.dtype), states)


def _check_starts(tokens: Tokens, keep: Tensor, added: Tensor, cut: Tensor | None) -> None:
    batch, length, heads, value_dim = tokens.value.shape
    num_chunks = keep.shape[1] if keep.ndim == 3 else 0
    wanted = {
        "keep": (keep, [batch, num_chunks, heads]),
        "added": (added, [batch, num_chunks, heads, tokens.query.shape[3], value_dim]),
        "cut": (cut, [batch, num_chunks]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (not num_chunks or list(tensor.shape) != shape):
            shape[1] = num_chunks or -1
            raise UserError(
                f"kda: {name} has shape {list(tensor.shape)}, expected {shape} ([batch, chunks, "
                "...])."
            )
    if length % num_chunks:
        raise UserError(f"kda: {length} tokens are not a multiple of the {num_chunks} chunks.")
    _check_chunk_size("kda", length // num_chunks)


def l2_normalize(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale vectors along the last dimension to length 1, with eps inside the root.

    The same as fla's; ``torch.nn.functional.normalize`` differs for short vectors.

    Args:
        vectors: ``[..., K]``.
        eps: added to the squared length, so that zeros stay zeros with a finite gradient.

    Returns:
        Same shape and type; the length is computed in at least float32.
    """
    exact = vectors if vectors.dtype == torch.float64 else vectors.float()
    return (exact * (exact.square().sum(-1, keepdim=True) + eps).rsqrt()).to(vectors.dtype)


def _attend(
    name: str,
    tokens: Tokens,
    initial_state: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    form: Form,
    chunk_size: int,
    backend: Backend,
) -> LinearAttentionResult:
    mechanism = MECHANISMS[name]
    check(mechanism, tokens, initial_state, key_mask)
    length, key_dim = tokens.query.shape[1], tokens.query.shape[3]
    if form == "step" and length != 1:
        raise UserError(f"{name}: form 'step' takes one token, not {length}; use 'chunk'.")
    _check_chunk_size(name, chunk_size)
    choice = select_backend(
        name,
        backend=backend,
        form=form,
        device=tokens.query.device,
        dtype=tokens.query.dtype,
        key_dim=key_dim,
        needs_gradient=_needs_gradient(tokens, initial_state),
    )
    log_choice(name, form, choice)
    tokens = ignore_padding(tokens, key_mask)
    check_gates(mechanism, tokens.log_decay)
    if choice.name == "fla" and length:
        return LinearAttentionResult(*run_fla(name, form, tokens, initial_state, scale))
    with torch.autocast(device_type=tokens.query.device.type, enabled=False):
        prepared, state = for_torch(tokens, initial_state)
        factor = key_dim**-0.5 if scale is None else scale
        if length == 0:
            output = prepared.value
        elif form == "chunk":
            output, state = chunked(prepared, state, chunk_size, factor)
        elif form == "recurrent":
            output, state = recurrent(scaled(prepared, factor), state)
        else:
            output, state = step(scaled(prepared, factor), state)
    return LinearAttentionResult(output.to(tokens.query.dtype), state)


def _check_chunk_size(name: str, chunk_size: int) -> None:
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise UserError(f"{name}: chunk_size {chunk_size} is not a power of two, such as 64.")


def _needs_gradient(tokens: Tokens, initial_state: Tensor | None) -> bool:
    given = (*vars(tokens).values(), initial_state)
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in given
    )
