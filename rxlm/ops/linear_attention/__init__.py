"""Linear attention with a state of constant size, exact on any device.

Four mechanisms with one signature (:mod:`.mechanisms`), each in three forms: by chunks, token by
token, one step; in plain PyTorch or by the kernels of fla (:mod:`.backends`).
"""

from rxlm.ops.linear_attention.backends import (
    BackendChoice,
    select_backend,
    why_fla_cannot_run,
)
from rxlm.ops.linear_attention.inputs import MECHANISMS, Mechanism
from rxlm.ops.linear_attention.mechanisms import (
    LinearAttentionResult,
    deltanet,
    gated_deltanet,
    gla,
    kda,
    kda_with_starts,
    l2_normalize,
)

__all__ = [
    # mechanisms
    "gla",
    "deltanet",
    "gated_deltanet",
    "kda",
    "kda_with_starts",
    "LinearAttentionResult",
    "l2_normalize",
    # what there is, and what runs
    "MECHANISMS",
    "Mechanism",
    "BackendChoice",
    "select_backend",
    "why_fla_cannot_run",
]
