"""Local attention exactly as the package ``local-attention`` 1.11.2 computes it, quirks included.

For checkpoints that were trained with it. Written from a position-wise description, not from its
code. It differs from :func:`rxlm.ops.local_attention.local_attention` in ways that nobody wants
(docs/local_attention.md): without causality rotary positions of queries are shifted by the windows
ahead; keys that ``autopad`` adds are attended to; a query that sees nothing gets the mean of its
block, filler values of -1 included; hidden scores are the lowest number, not minus infinity.

Shapes: X packed batch and heads, N tokens (n windows of W), J = W (1 + backward + forward), D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import UserError

_SCORE_OF_SELF = -5e4
_FILLER = -1


@dataclass(frozen=True)
class CompatRule:
    """One call's settings: ``window`` is this call's, ``limit_window`` the constructor's (``exact``
    counts with it)."""

    window: int
    limit_window: int
    look_backward: int
    look_forward: int
    causal: bool
    exact: bool
    shared_qk: bool
    scale: float
    dropout: float = 0.0


def compat_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: CompatRule,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    frequencies: Tensor | None = None,
    xpos: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Attend.

    Args:
        query, key, value: ``[X, N, D]``, N divisible by the window.
        rule: the settings.
        key_mask: bool ``[Y, N]``, Y divides X.
        bias: ``[heads, W, J]``, heads divide X.
        frequencies: ``[D/2]`` of the rotary angles; None = no positions.
        xpos: decay of each frequency ``[D/2]`` and the base of its exponent.

    Returns:
        ``[X, N, D]``.

    Raises:
        UserError: if N is not divisible by the window.
    """
    packed, length, _ = query.shape
    size = rule.window
    if length % size:
        raise UserError(
            f"{length} tokens are not divisible by window_size={size}: pad them, or (compat pads "
            f"to multiples of {rule.limit_window}) use autopad=True."
        )
    if rule.shared_qk:
        key = F.normalize(key, dim=-1)
    query = query.unflatten(1, (-1, size)) * rule.scale
    key, value = (_neighbours(x, rule, _FILLER) for x in (key, value))
    if frequencies is not None:
        query, key = _rotate_in_block(query, key, frequencies, xpos)
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.repeat(packed // bias.shape[0], 1, 1)[:, None]
    lowest = -torch.finfo(scores.dtype).max

    positions = torch.arange(length, device=query.device)[None, :, None]
    keys_at = _neighbours(positions, rule, _FILLER)[..., 0][:, :, None]
    queries_at = positions.view(1, -1, size, 1)
    if rule.shared_qk:
        scores = scores.masked_fill(queries_at == keys_at, _SCORE_OF_SELF)
    hidden = keys_at == _FILLER
    back = rule.limit_window * rule.look_backward
    if rule.causal:
        hidden = hidden | (keys_at > queries_at)
    elif rule.exact:
        hidden = hidden | (keys_at - queries_at > rule.limit_window * rule.look_forward)
    if rule.exact:
        hidden = hidden | (queries_at - keys_at > back)
    scores = scores.masked_fill(hidden, lowest)
    if key_mask is not None:
        seen = _neighbours(key_mask[..., None], rule, False)[..., 0]
        seen = seen.repeat_interleave(packed // key_mask.shape[0], dim=0)
        scores = scores.masked_fill(~seen[:, :, None], lowest)
    weights = F.dropout(scores.softmax(dim=-1), rule.dropout, training=rule.dropout > 0)
    return (weights @ value).flatten(1, 2)


def _neighbours(x: Tensor, rule: CompatRule, filler: int | bool) -> Tensor:
    """Gather each window with the ones around it: ``[Y, N, C]`` to ``[Y, n, J, C]``."""
    size = rule.window
    around = (0, 0, rule.look_backward * size, rule.look_forward * size)
    padded = F.pad(x, around, value=filler)
    width = size * (1 + rule.look_backward + rule.look_forward)
    return padded.unfold(1, width, size).transpose(-1, -2)


def _rotate_in_block(
    query: Tensor, key: Tensor, frequencies: Tensor, xpos: tuple[Tensor, float] | None
) -> tuple[Tensor, Tensor]:
    """Rotate halves; keys stand at 0..J-1 of the block, queries at its last W places."""
    width, size = key.shape[-2], query.shape[-2]
    places = torch.arange(width, device=key.device).type_as(frequencies)
    angles = torch.outer(places, frequencies).repeat(1, 2)
    growth = torch.ones(width, 1, device=key.device)
    if xpos is not None:
        decay, base = xpos
        growth = (decay ** ((places - width // 2) / base)[:, None]).repeat(1, 2)

    def turn(x: Tensor, angle: Tensor, factor: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
        return x * angle.cos() * factor + across * angle.sin() * factor

    return turn(query, angles[-size:], growth[-size:]), turn(key, angles, growth**-1)
