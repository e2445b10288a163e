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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.ops.linear_attention.decay import DecayedPairs, DeltaPairs, decayed_pairs, delta_pairs
from rxlm.ops.linear_attention.inputs import Tokens, scaled
from rxlm.ops.linear_attention.triangular import solve_unit_lower

# Elements of one [M, C, K] tensor that are worked on together on a CPU: about ten such tensors are
# alive at a time and should stay in its caches.
CPU_SEGMENT_ELEMENTS = 2**18


def chunked(tokens: Tokens, state: Tensor, chunk_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Run over all tokens, a chunk at a time.

    Args:
        tokens: as :func:`~rxlm.ops.linear_attention.inputs.for_torch` returns them; T >= 1.
        state: ``[B, H, K, V]``.
        chunk_size: C, a power of two.
        scale: factor on the queries, applied piece by piece: a scaled copy of a long sequence is
            memory that has to be found first.

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
    room = None
    if segment < length and not torch.is_grad_enabled():
        # Written once where it stays. (Differentiated, every piece would copy all gradients.)
        chunks = -(-length // chunk_size)
        room = tokens.value.new_empty(batch, chunks, chunk_size, num_heads, tokens.value.shape[3])
    for number, piece in enumerate(tokens.split(segment)):
        output, state = _segment(scaled(piece, scale), state, chunk_size)
        if room is None:
            outputs.append(output)
        else:
            first = number * segment // chunk_size
            room[:, first : first + output.shape[1]] = output
    if room is None:
        room = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return room.flatten(1, 2)[:, :length], state


class ChunkStarts(NamedTuple):
    """What happens to the state before each chunk: ``state <- keep * state + added``.

    Attributes:
        keep: ``[B, N, H]``.
        added: ``[B, N, H, K, V]``.
        cut: bool ``[B, N]``, where the gradient of the state is cut; None = nowhere.
    """

    keep: Tensor
    added: Tensor
    cut: Tensor | None = None


def chunked_with_starts(
    tokens: Tokens, state: Tensor, starts: ChunkStarts
) -> tuple[Tensor, Tensor]:
    """Run over all tokens by the delta rule, with the state changed between chunks.

    Args:
        tokens: as for :func:`chunked`, T = N * C tokens, C a power of two.
        state: ``[B, H, K, V]``.
        starts: of the N chunks.

    Returns:
        Outputs ``[B, T, H, V]``; the states ``[N + 1, B, H, K, V]`` before each chunk (before its
        start changes it) and after the last.
    """
    batch, num_chunks, num_heads = starts.keep.shape
    value_dim = tokens.value.shape[3]
    chunk_size = tokens.value.shape[1] // num_chunks
    assert tokens.log_decay is not None and tokens.write_strength is not None
    pairs, solved = _solve(
        to_chunks(tokens.query, chunk_size),
        to_chunks(tokens.key, chunk_size),
        to_chunks(tokens.value, chunk_size),
        to_chunks(tokens.log_decay, chunk_size),
        to_chunks(tokens.write_strength.unsqueeze(-1), chunk_size),
    )
    keep = starts.keep.transpose(0, 1).flatten(1)[..., None, None].unbind(0)
    added = starts.added.transpose(0, 1).flatten(1, 2).unbind(0)
    cuts = None
    if starts.cut is not None:
        cuts = starts.cut.T.repeat_interleave(num_heads, dim=1)[..., None, None].unbind(0)
    before: list[Tensor] = []

    def begin_chunk(number: int, state: Tensor) -> Tensor:
        before.append(state)
        if cuts is not None:
            state = torch.where(cuts[number], state.detach(), state)
        return torch.addcmul(added[number], keep[number], state)

    entry_states, written, state = _scan_delta_rule(pairs, solved, state.flatten(0, 1), begin_chunk)
    output = torch.baddbmm(pairs.reads @ entry_states, pairs.seen, written)
    output = output.view(num_chunks, batch, num_heads, chunk_size, value_dim)
    output = output.permute(1, 0, 3, 2, 4).flatten(1, 2)
    return output, torch.stack([*before, state]).unflatten(1, (batch, num_heads))


def _segment(tokens: Tokens, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Run over consecutive chunks whose intermediate results are held together.

    Returns:
        Outputs ``[B, N, C, H, V]``, those of missing tokens too, and the state after the last.
    """
    batch, _, num_heads, value_dim = tokens.value.shape
    query = to_chunks(tokens.query, chunk_size)
    key = to_chunks(tokens.key, chunk_size)
    value = to_chunks(tokens.value, chunk_size)
    log_decay = None if tokens.log_decay is None else to_chunks(tokens.log_decay, chunk_size)
    state = state.flatten(0, 1)
    if tokens.write_strength is None:
        pairs = decayed_pairs(query.unsqueeze(1), key, log_decay)
        entry_states, state = _scan_additive(pairs, value, state)
        reads, seen, written = pairs.rows[:, 0], pairs.matrix[:, 0], value
    else:
        strength = to_chunks(tokens.write_strength.unsqueeze(-1), chunk_size)
        delta, solved = _solve(query, key, value, log_decay, strength)
        entry_states, written, state = _scan_delta_rule(delta, solved, state)
        reads, seen = delta.reads, delta.seen
    output = torch.baddbmm(reads @ entry_states, seen, written)
    output = output.view(-1, batch, num_heads, chunk_size, value_dim).permute(1, 0, 3, 2, 4)
    return output, state.unflatten(0, (batch, num_heads))


def _solve(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, strength: Tensor
) -> tuple[DeltaPairs, Tensor]:
    """Return the pairs of ``[M, C, X]`` chunks and what their tokens write.

    The system relates what the tokens of a chunk write. It is linear in the entry state, so the
    part without it and the part per channel of it are solved for at once: ``[M, C, V + K]``.
    """
    pairs = delta_pairs(query, key * strength, key, log_decay)
    solved = solve_unit_lower(pairs.system, torch.cat([value * strength, pairs.erases], dim=-1))
    return pairs, solved


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
    pairs: DeltaPairs,
    solved: Tensor,
    state: Tensor,
    begin_chunk: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each chunk starts from and writes: the only part that runs in sequence.

    Args:
        pairs: of all chunks.
        solved: ``[M, C, V + K]``: what would be written into an empty state, and what the entry
            state takes away from that, per channel.
        state: ``[B * H, K, V]``.
        begin_chunk: what becomes of the state before the chunk of that number; None = nothing.

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
    chunks = zip(into_empty, taken_away, keys, totals, strict=True)
    for number, (empty, taken, key, total) in enumerate(chunks):
        if begin_chunk is not None:
            state = begin_chunk(number, state)
        entry_states.append(state)
        written = torch.baddbmm(empty, taken, state, alpha=-1)
        state = torch.baddbmm(state if total is None else total * state, key, written)
        all_written.append(written)
    return torch.cat(entry_states), torch.cat(all_written), state


def _per_chunk(tensor: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    """Split ``[M, X, Y]`` into N tensors ``[B * H, X, Y]``."""
    return tensor.unflatten(0, (-1, num_rows)).unbind(0)
