"""Linear attention by chunks: the parallel form, for training and for reading a prompt.

Inside a chunk the delta rule is a unit lower triangular system (the WY / UT transform of
arXiv:2406.06484, section 3, with decays as in arXiv:2412.06464 and arXiv:2510.26692); all chunks
are solved at once, by substitution: inverting the system by a power series loses every digit in
float32 when keys repeat. Only the states between chunks are computed one after the other. Exact
for every gate <= 0; see :mod:`rxlm.ops.linear_attention.decay`.

Shapes: B batch, T tokens, H heads (those of the values), K/V head dimensions, N chunks, C tokens
of a chunk, M = N * B * H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.ops.linear_attention.decay import DecayedPairs, decayed_pairs
from rxlm.ops.linear_attention.inputs import Tokens

# Elements of one [M, C, K] tensor that are worked on together on a CPU: about ten such tensors are
# alive at a time and should stay in its caches.
CPU_SEGMENT_ELEMENTS = 2**18


def chunked(tokens: Tokens, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Run over all tokens, a chunk at a time.

    Args:
        tokens: as :func:`~rxlm.ops.linear_attention.inputs.for_torch` returns them; T >= 1.
        state: ``[B, H, K, V]``.
        chunk_size: C, a power of two.

    Returns:
        Outputs ``[B, T, H, V]`` and the state after the last token.
    """
    batch, length, num_heads, key_dim = tokens.query.shape
    while chunk_size >= 2 * length:
        chunk_size //= 2
    if tokens.query.device.type == "cpu":
        elements = batch * num_heads * chunk_size * key_dim
        segment = chunk_size * max(1, CPU_SEGMENT_ELEMENTS // elements)
    else:
        segment = length
    outputs = []
    for piece in tokens.split(segment):
        output, state = _segment(piece, state, chunk_size)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _segment(tokens: Tokens, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Run over consecutive chunks whose intermediate results are held together."""
    batch, length, num_heads, value_dim = tokens.value.shape
    query = to_chunks(tokens.query, chunk_size)
    key = to_chunks(tokens.key, chunk_size)
    value = to_chunks(tokens.value, chunk_size)
    log_decay = None if tokens.log_decay is None else to_chunks(tokens.log_decay, chunk_size)
    state = state.flatten(0, 1)
    if tokens.write_strength is None:
        pairs = decayed_pairs(query.unsqueeze(1), key, log_decay)
        entry_states, state = _scan_additive(pairs, value, state)
        written, reads, seen = value, pairs.rows[:, 0], pairs.matrix[:, 0]
    else:
        strength = to_chunks(tokens.write_strength.unsqueeze(-1), chunk_size)
        pairs = decayed_pairs(torch.stack([query, key * strength], dim=1), key, log_decay)
        reads, erases = pairs.rows.unbind(1)
        seen, system = pairs.matrix.unbind(1)
        # The system relates what the tokens of a chunk write. It is linear in the entry state, so
        # the part without it and the part per channel of it are solved for at once.
        solved = torch.linalg.solve_triangular(
            system.contiguous(),  # the solver is slower on strided batches
            torch.cat([value * strength, erases], dim=-1),
            upper=False,
            unitriangular=True,
        )
        entry_states, written, state = _scan_delta_rule(pairs, solved, state)
    output = torch.baddbmm(reads @ entry_states, seen, written)
    output = output.view(-1, batch, num_heads, chunk_size, value_dim).permute(1, 0, 3, 2, 4)
    return output.flatten(1, 2)[:, :length], state.unflatten(0, (batch, num_heads))


def to_chunks(tensor: Tensor, chunk_size: int) -> Tensor:
    """Reorder ``[B, T, H, X]`` to ``[M, C, X]``; missing tokens are zeros, which change nothing."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, missing))
    chunks = tensor.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4)
    return chunks.reshape(-1, chunk_size, tensor.shape[-1])


def _scan_additive(pairs: DecayedPairs, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[M, K, V]`` at the start of each chunk, and the last one, without the delta rule."""
    num_rows = state.shape[0]
    assert pairs.total is not None  # every additive mechanism here decays
    totals = _per_chunk(pairs.total.unsqueeze(-1), num_rows)
    added = _per_chunk(pairs.keys.mT @ value, num_rows)
    entry_states = []
    for total, contribution in zip(totals, added, strict=True):
        entry_states.append(state)
        state = torch.addcmul(contribution, total, state)
    return torch.cat(entry_states), state


def _scan_delta_rule(
    pairs: DecayedPairs, solved: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk starts from and writes: the only part that runs in sequence.

    Args:
        pairs: of all chunks.
        solved: ``[M, C, V + K]``: what would be written into an empty state, and what the entry
            state takes away from that, per channel.
        state: ``[B * H, K, V]``.

    Returns:
        The states ``[M, K, V]`` at the start of each chunk, what is written ``[M, C, V]``, and the
        state after the last chunk.
    """
    num_rows, _, value_dim = state.shape
    into_empty, taken_away = (
        _per_chunk(part, num_rows)
        for part in solved.split([value_dim, solved.shape[-1] - value_dim], dim=-1)
    )
    keys = _per_chunk(pairs.keys.mT, num_rows)
    totals: Sequence[Tensor | None] = [None] * len(keys)
    if pairs.total is not None:
        totals = _per_chunk(pairs.total.unsqueeze(-1), num_rows)
    entry_states, all_written = [], []
    for empty, taken, key, total in zip(into_empty, taken_away, keys, totals, strict=True):
        entry_states.append(state)
        written = torch.baddbmm(empty, taken, state, alpha=-1)
        state = torch.baddbmm(state if total is None else total * state, key, written)
        all_written.append(written)
    return torch.cat(entry_states), torch.cat(all_written), state


def _per_chunk(tensor: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Split ``[M, X, Y]`` into N tensors ``[B * H, X, Y]``."""
    return tensor.unflatten(0, (-1, num_rows)).unbind(0)
