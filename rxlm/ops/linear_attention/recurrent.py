"""Linear attention token by token: the definition of every mechanism, and the decoding step.

Readable and exact; the yardstick of the other forms. Not for long sequences: one small step of
Python per token.

Shapes: B batch, T tokens, H heads (those of the values), K/V head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rxlm.ops.linear_attention.inputs import Tokens


def recurrent(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run over all tokens, one after the other.

    Args:
        tokens: as :func:`~rxlm.ops.linear_attention.inputs.for_torch` returns them; T >= 1.
        state: ``[B, H, K, V]``.

    Returns:
        Outputs ``[B, T, H, V]`` and the state after the last token.
    """
    outputs = []
    for token in tokens.split(1):
        output, state = step(token, state)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def step(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decay, erase, write, read: one token.

    Args:
        tokens: T = 1, otherwise as for :func:`recurrent`.
        state: ``[B, H, K, V]``; left as it is.

    Returns:
        Outputs ``[B, 1, H, V]`` and the new state.
    """
    query, key, value = tokens.query[:, 0], tokens.key[:, 0], tokens.value[:, 0]
    if tokens.log_decay is not None:
        state = state * tokens.log_decay[:, 0].exp().unsqueeze(-1)
    if tokens.write_strength is not None:
        predicted = (key.unsqueeze(-2) @ state).squeeze(-2)
        value = tokens.write_strength[:, 0].unsqueeze(-1) * (value - predicted)
    state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
    output = query.unsqueeze(-2) @ state
    return output.movedim(2, 1), state
