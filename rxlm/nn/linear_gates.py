"""How a token's hidden state becomes its decay and its write strength.

The parametrisations of the papers: GLA, arXiv:2312.06635, 4.4; Gated DeltaNet, arXiv:2412.06464
(after Mamba 2); KDA, arXiv:2510.26692, 4.1.

Shapes: B batch, T tokens, D width, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.ops.linear_attention import MECHANISMS
from rxlm.ops.stretch import stretched

GLA_GATE_RANK = 16
GLA_GATE_TEMPERATURE = 16.0
"""GLA's decays are sigmoids to the power of 1/16: close to one unless learned otherwise."""

# Step sizes at the start, log-uniform: memories of ten to a thousand tokens at unit rate.
SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1
# A state that conversations carry on has to outlast many turns: a hundred times as long.
SMALLEST_CARRIED_STEP, LARGEST_CARRIED_STEP = 1e-5, 1e-3
LARGEST_RATE = 16.0
# Per head and per channel gates; the published initialisations differ in the lower end.
SMALLEST_RATES = {"gated_deltanet": 1e-4, "kda": 1.0}


class Gates(NamedTuple):
    """Gates of each token, float32 (float64 in a float64 model), None where there is none.

    ``log_decay``: ``[B, T, HV]`` or ``[B, T, HV, K]``, <= 0; ``write_strength``: ``[B, T, HV]`` in
    (0, 1), stretched in [0, 1].
    """

    log_decay: Tensor | None
    write_strength: Tensor | None


class TokenGates(nn.Module):
    """The gates that a mechanism reads; for DeltaNet only the write strength, for GLA only the
    decay.

    Gated DeltaNet and KDA: ``log_decay = -exp(A_log) * softplus(projection + dt_bias)``, a rate
    per head and a step size per head or channel. GLA: ``logsigmoid(projection) / 16``.
    """

    def __init__(
        self,
        mechanism: str,
        dim: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        carried: bool = False,
        write_stretch: float = 0.0,
        decay_shrinkage: float = 0.0,
    ) -> None:
        """Build the projections.

        Args:
            mechanism: one of ``MECHANISMS``.
            dim: D.
            num_value_heads: HV.
            key_dim: K.
            value_dim: V, also the rank of KDA's projection.
            carried: whether the state goes on to the next turn, so starts with slower decays.
            write_stretch: above 0, a token may leave the state exactly as it is
                (:func:`rxlm.ops.stretch.stretched`). A sigmoid never does, and what a thousand
                tokens erase a little is gone.
            decay_shrinkage: above 0, decays slower than that a token are none: ``log a`` becomes
                ``min(log a + d, 0)``, the soft threshold of the rate. ``exp`` never reaches 1.
        """
        super().__init__()
        kind = MECHANISMS[mechanism]
        self.num_value_heads = num_value_heads
        self.write_stretch, self.decay_shrinkage = write_stretch, decay_shrinkage
        self.decay_is_per_channel = kind.decay == "channel"
        self.has_rate = mechanism in SMALLEST_RATES
        num_decays = num_value_heads * (key_dim if self.decay_is_per_channel else 1)
        if mechanism == "gla":
            self.decay: nn.Module | None = nn.Sequential(
                nn.Linear(dim, GLA_GATE_RANK, bias=False), nn.Linear(GLA_GATE_RANK, num_decays)
            )
        elif mechanism == "kda":
            self.decay = nn.Sequential(
                nn.Linear(dim, value_dim, bias=False), nn.Linear(value_dim, num_decays, bias=False)
            )
        elif kind.decay == "head":
            self.decay = nn.Linear(dim, num_decays, bias=False)
        else:
            self.decay = None
        self.write = nn.Linear(dim, num_value_heads, bias=False) if kind.delta_rule else None
        if self.has_rate:
            rate = torch.empty(num_value_heads).uniform_(SMALLEST_RATES[mechanism], LARGEST_RATE)
            self.A_log = nn.Parameter(rate.log())
            smallest, largest = SMALLEST_STEP, LARGEST_STEP
            if carried:
                smallest, largest = SMALLEST_CARRIED_STEP, LARGEST_CARRIED_STEP
            logs = torch.empty(num_decays).uniform_(math.log(smallest), math.log(largest))
            self.dt_bias = nn.Parameter(_inverse_softplus(logs.exp()))
            for parameter in (self.A_log, self.dt_bias):
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
                # A decay of 0.999 does not exist in bfloat16.
                parameter._full_precision = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, offsets: tuple[Tensor, Tensor] | None = None) -> Gates:
        """Compute the gates.

        Args:
            x: ``[B, T, D]``.
            offsets: added to the logits of the decay ``[B, ., HV * K]`` and of the write strength
                ``[B, ., HV]``; None = nothing.
        """
        log_decay = None
        if self.decay is not None:
            logits = _at_least_float32(self.decay(x))
            log_decay = self._log_decay(logits if offsets is None else logits + offsets[0])
            if self.decay_shrinkage > 0:
                log_decay = (log_decay + self.decay_shrinkage).clamp(max=0.0)
            if self.decay_is_per_channel:
                log_decay = log_decay.unflatten(-1, (self.num_value_heads, -1))
        write_strength = None
        if self.write is not None:
            logits = _at_least_float32(self.write(x))
            strength = (logits if offsets is None else logits + offsets[1]).sigmoid()
            write_strength = stretched(strength, self.write_stretch)
        return Gates(log_decay, write_strength)

    def _log_decay(self, logits: Tensor) -> Tensor:
        if not self.has_rate:
            return F.logsigmoid(logits) / GLA_GATE_TEMPERATURE
        steps = F.softplus(logits + self.dt_bias.to(logits.dtype))
        rates = self.A_log.to(logits.dtype).exp()
        per_head = steps.unflatten(-1, (self.num_value_heads, -1))
        return (-rates.unsqueeze(-1) * per_head).flatten(-2)


def _inverse_softplus(steps: Tensor) -> Tensor:
    return steps + torch.log(-torch.expm1(-steps))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
