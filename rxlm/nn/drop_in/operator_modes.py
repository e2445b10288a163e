"""The recurrences of the drop-in layer by name, and the virtual tokens of their products.

A product of order n updates the state n times per token, with n virtual keys and values made from
the token and its predecessors (arXiv:2506.17671, section 3.3; arXiv:2502.10297 learns them):

* ``derivative``: d_0 = x_t and d_m = (d_{m-1, t} - d_{m-1, t-1}) / 2, so the m-th order difference
  sum_i (-1)^i binom(m, i) x_{t-i} over 2^m. What stands before the sequence is zero.
* ``rotation``: each pair of neighbouring features turned by 2 pi m / n; an odd last one stays.
* ``combined``: the mean of both.
* ``copy``: x_t, n times.

None of them makes a vector longer than the longest of those it is made of, so that the delta rule
stays a contraction.

Shapes: B batch, T tokens, n order, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import UserError

GATES = ("c", "k", "v", "kv")
"""Constant, from keys, from values, from both (their product)."""
TRICKS = ("derivative", "rotation", "combined", "copy")
_TPTT_TRICKS = {"dt": "derivative", "rot": "rotation", "rdt": "combined", "cte": "copy"}


@dataclass(frozen=True)
class RecurrentSettings:
    """What makes up a recurrence.

    Attributes:
        order: n, updates of the state per token.
        alpha_gate: what the state is multiplied with, once a token; ``c`` = 1.
        beta_gate: how strongly is written; ``c`` = 1/2.
        linear: False: the state goes through :func:`gelu_of_state` after each token.
        trick: how virtual tokens are made; without effect at order 1. The names ``dt``, ``rot``,
            ``rdt`` and ``cte`` of TPTT are understood.
    """

    order: int = 1
    alpha_gate: str = "c"
    beta_gate: str = "k"
    linear: bool = True
    trick: str = "derivative"

    def __post_init__(self) -> None:
        object.__setattr__(self, "trick", _TPTT_TRICKS.get(self.trick, self.trick))
        if self.order < 1:
            raise UserError(f"order={self.order}: a token updates the state at least once.")
        for field, given, known in (
            ("alpha_gate", self.alpha_gate, GATES),
            ("beta_gate", self.beta_gate, GATES),
            ("trick", self.trick, TRICKS),
        ):
            if given not in known:
                raise UserError(f"{field}={given!r} does not exist: use one of {', '.join(known)}.")


OPERATOR_MODES: Mapping[str, RecurrentSettings] = MappingProxyType(
    {
        "delta_rule": RecurrentSettings(),
        "delta_rule_v": RecurrentSettings(beta_gate="v"),
        "delta_rule_kv": RecurrentSettings(beta_gate="kv"),
        "delta_rule_gelu": RecurrentSettings(linear=False),
        "gated_delta_rule": RecurrentSettings(alpha_gate="k"),
        "delta_product": RecurrentSettings(order=2),
        "gated_delta_product": RecurrentSettings(order=2, alpha_gate="k"),
        "delta_product_r": RecurrentSettings(order=2, trick="rotation"),
        "delta_product_c": RecurrentSettings(order=2, trick="combined"),
    }
)
"""The modes of TPTT, with the parts they have there."""


def recurrent_settings(
    operator_mode: str, changes: Mapping[str, Any] | RecurrentSettings | None = None
) -> RecurrentSettings:
    """Return the recurrence of a mode, with some parts changed.

    Args:
        operator_mode: a key of :data:`OPERATOR_MODES`.
        changes: fields that replace those of the mode (None = unchanged).

    Raises:
        UserError: for a mode, field or value that does not exist.
    """
    if operator_mode not in OPERATOR_MODES:
        raise UserError(
            f"operator_mode={operator_mode!r} does not exist: use one of "
            f"{', '.join(OPERATOR_MODES)}."
        )
    if isinstance(changes, RecurrentSettings):
        changes = asdict(changes)
    known = [field.name for field in fields(RecurrentSettings)]
    unknown = sorted(set(changes or ()) - set(known))
    if unknown:
        raise UserError(
            f"recurrent_config has no {', '.join(unknown)}: it knows {', '.join(known)}."
        )
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    return replace(OPERATOR_MODES[operator_mode], **given)


def virtual_tokens(x: Tensor, order: int, trick: str) -> Tensor:
    """Make n vectors of each.

    Args:
        x: ``[B, n - 1 + T, H, D]``, the n - 1 before the first token in front (zeros where there
            was none).
        order: n.
        trick: one of :data:`TRICKS`.

    Returns:
        ``[B, T, n, H, D]``.
    """
    if trick == "derivative":
        return _differences(x, order)
    tokens = x[:, order - 1 :]
    if trick == "copy":
        return tokens.unsqueeze(2).expand(-1, -1, order, -1, -1)
    rotated = _rotations(tokens, order)
    return rotated if trick == "rotation" else (rotated + _differences(x, order)) / 2


def gelu_of_state(state: Tensor) -> Tensor:
    """TPTT's nonlinearity: ``s / 2 * gelu(2 s / |s|)`` element by element, |s| that of a row.

    It keeps little of a state: an element at a quarter of its row's length shrinks to a sixth.

    Args:
        state: ``[..., V]``.
    """
    length = (state.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return state / 2 * F.gelu(2 * state / length, approximate="tanh")


def _differences(x: Tensor, order: int) -> Tensor:
    length = x.shape[1] - order + 1
    levels = []
    for level in range(order):
        if level:
            x = (x[:, 1:] - x[:, :-1]) / 2
        levels.append(x[:, x.shape[1] - length :])
    return torch.stack(levels, dim=2)


def _rotations(x: Tensor, order: int) -> Tensor:
    angles = torch.arange(order, dtype=x.dtype, device=x.device) * (2 * math.pi / order)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]  # [n, H, D / 2]
    x = x.unsqueeze(2)
    paired = x.shape[-1] // 2 * 2
    even, odd = x[..., :paired:2], x[..., 1:paired:2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    rest = x[..., paired:].expand(-1, -1, order, -1, -1)
    return torch.cat((turned, rest), dim=-1)
