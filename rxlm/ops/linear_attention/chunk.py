"""Linear attention by chunks: the parallel form, for training and for reading a prompt.

Inside a chunk the delta rule is a unit lower triangular system (the WY / UT transform of
arXiv:2406.06484, section 3, with decays as in arXiv:2412.06464 and arXiv:2510.26692); all chunks
are solved at once, by substitution: inverting the system by a power series loses every digit in
float32 when keys repeat. Only the state at the start of each chunk is computed one after the
other. Exact for every gate <= 0; see :mod:`rxlm.ops.linear_attention.decay`.

Shapes: B batch, T tokens, H heads (those of the values), K/V head dimensions, N chunks, C tokens
of a chunk, M = N * B * H.
"""

from __future__ import annotations

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
    for start in range(0, length, segment):
        piece = tokens.between(start, min(start + segment, length))
        output, state = _segment(piece, state, chunk_size)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _segment(tokens: Tokens, state: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Run over consecutive chunks whose intermediate results are held together."""
    batch, length, num_heads, value_dim = tokens.value.shape
    query = _to_chunks(tokens.query, chunk_size)
    key = _to_chunks(tokens.key, chunk_size)
    value = _to_chunks(tokens.value, chunk_size)
    log_decay = None if tokens.log_decay is None else _to_chunks(tokens.log_decay, chunk_size)
    state = state.flatten(0, 1)
    if tokens.write_strength is None:
        pairs = decayed_pairs(query.unsqueeze(1), key, log_decay)
        entry_states, state = _scan_additive(pairs, value, state)
        written = value
    else:
        strength = _to_chunks(tokens.write_strength.unsqueeze(-1), chunk_size)
        pairs = decayed_pairs(torch.stack([query, key * strength], dim=1), key, log_decay)
        # written = T (strength * value) - T (strength * key, decayed) @ entry state, where T is
        # the inverse of the triangular system: both right-hand sides are solved for at once.
        right_hand_side = torch.cat([value * strength, pairs.rows[:, 1]], dim=-1)
        system = pairs.matrix[:, 1].contiguous()  # the solver is slower on strided batches
        solved = torch.linalg.solve_triangular(
            system, right_hand_side, upper=False, unitriangular=True
        )
        entry_states, state = _scan_delta_rule(pairs, solved, state)
        written = torch.baddbmm(
            solved[..., :value_dim], solved[..., value_dim:], entry_states, alpha=-1
        )
    output = torch.baddbmm(pairs.rows[:, 0] @ entry_states, pairs.matrix[:, 0], written)
    output = output.view(-1, batch, num_heads, chunk_size, value_dim).permute(1, 0, 3, 2, 4)
    return output.flatten(1, 2)[:, :length], state.unflatten(0, (batch, num_heads))


def _to_chunks(tensor: Tensor, chunk_size: int) -> Tensor:
    """Reorder ``[B, T, H, X]`` to ``[M, C, X]``; missing tokens are zeros, which change nothing."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, missing))
    chunks = tensor.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4)
    return chunks.reshape(-1, chunk_size, tensor.shape[-1])


def _scan_additive(pairs: DecayedPairs, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[M, K, V]`` at the start of each chunk, and the last one, without the delta rule."""
    num_rows = state.shape[0]
    added = (pairs.keys.mT @ value).unflatten(0, (-1, num_rows)).unbind(0)
    assert pairs.total is not None  # every additive mechanism here decays
    totals = pairs.total.unsqueeze(-1).unflatten(0, (-1, num_rows)).unbind(0)
    states = []
    for total, contribution in zip(totals, added, strict=True):
        states.append(state)
        state = torch.addcmul(contribution, total, state)
    return torch.cat(states), state


def _scan_delta_rule(pairs: DecayedPairs, solved: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[M, K, V]`` at the start of each chunk, and the last one, with the delta rule.

    A chunk maps the state to ``transition @ state + added``; both come from one product for all
    chunks, which leaves one small product per chunk to do in sequence.
    """
    num_rows, key_dim, value_dim = state.shape
    products = pairs.keys.mT @ solved
    if pairs.total is None:
        kept = torch.eye(key_dim, dtype=state.dtype, device=state.device)
    else:
        kept = pairs.total.expand(-1, key_dim).diag_embed()
    transitions = (kept - products[..., value_dim:]).unflatten(0, (-1, num_rows)).unbind(0)
    added = products[..., :value_dim].unflatten(0, (-1, num_rows)).unbind(0)
    states = []
    for transition, contribution in zip(transitions, added, strict=True):
        states.append(state)
        state = torch.baddbmm(contribution, transition, state)
    return torch.cat(states), state
