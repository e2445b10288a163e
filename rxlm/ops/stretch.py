"""Gates that close and open altogether."""

from __future__ import annotations

from torch import Tensor


def stretched(gate: Tensor, stretch: float) -> Tensor:
    """Return ``clamp((1 + 2 s) g - s, 0, 1)``, which is 0 and 1 where a sigmoid only comes near.

    A share of 1 % a turn leaves half of a slot after 64 turns, one of 0 all of it after any number.
    The deterministic hard concrete gate (Louizos, Welling, Kingma, "Learning sparse neural networks
    through L0 regularization", 2018, eq. 10-11 and 13).

    Args:
        gate: in [0, 1], of any shape.
        stretch: s >= 0; 0 returns the gate as it is.
    """
    if stretch == 0.0:
        return gate
    return ((1.0 + 2.0 * stretch) * gate - stretch).clamp(0.0, 1.0)
