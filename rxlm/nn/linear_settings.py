"""What distinguishes one linear self-attention from another, as a value.

Not here: the layer (:mod:`rxlm.nn.linear_attention`) and the mechanisms
(:mod:`rxlm.ops.linear_attention`).

Shapes: D width, H query/key heads, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rxlm.errors import UserError
from rxlm.nn.memory_driven import MemoryFusionMode
from rxlm.ops.linear_attention import MECHANISMS

Mode = Literal["chunk", "fused"]
FORMS: dict[str, Literal["chunk", "recurrent"]] = {"chunk": "chunk", "fused": "recurrent"}
"""Mode -> the form of the operation that computes more than one token."""

_WITH_VALUE_HEADS = ("gated_deltanet", "kda")
"""Mechanisms that are published with more value heads than query heads."""


@dataclass(frozen=True)
class LinearAttentionSettings:
    """What distinguishes one linear attention from another.

    Attributes:
        mechanism: ``gla``, ``deltanet``, ``gated_deltanet`` or ``kda``.
        dim: D.
        num_heads: H.
        key_dim: K, of one head.
        value_dim: V, of one head.
        num_value_heads: HV, a multiple of H (Gated DeltaNet and KDA only); None = H.
        mode: ``chunk`` computes many tokens at once, ``fused`` one after the other in one kernel
            (in plain PyTorch: one after the other). One token is always a single step.
        conv_size: tokens of the short convolution; None = no convolution.
        gated: whether the output is gated.
        bidirectional: whether each token sees all others; such a layer has no cache.
        norm_eps: of the norm of the output heads.
        backend: see :func:`rxlm.ops.linear_attention.select_backend`.
        memory_fusion: how a memory enters the gates (MD-GDN: KDA only, in one direction); None =
            no memory is read.
        carried: whether the state goes on to the next turn, so that decays start slower; changes
            nothing but the start.
        write_stretch: of the write strengths of delta rules, see :class:`TokenGates`.
        decay_shrinkage: of the decays, see there.
    """

    mechanism: str
    dim: int
    num_heads: int
    key_dim: int
    value_dim: int
    num_value_heads: int | None = None
    mode: Mode = "chunk"
    conv_size: int | None = 4
    gated: bool = True
    bidirectional: bool = False
    norm_eps: float = 1e-5
    backend: Literal["auto", "torch", "fla"] = "auto"
    memory_fusion: MemoryFusionMode | None = None
    carried: bool = False
    write_stretch: float = 0.0
    decay_shrinkage: float = 0.0

    def __post_init__(self) -> None:
        for field, given, known in (
            ("mechanism", self.mechanism, tuple(MECHANISMS)),
            ("mode", self.mode, tuple(FORMS)),
        ):
            if given not in known:
                raise UserError(
                    f"linear attention {field}={given!r} does not exist: use one of "
                    f"{', '.join(known)}."
                )
        sizes = ("dim", "num_heads", "key_dim", "value_dim", "num_value_heads", "conv_size")
        for field in sizes:
            size = getattr(self, field)
            if size is not None and size < 1:
                raise UserError(f"linear attention {field}={size} must be positive.")
        if self.value_heads % self.num_heads:
            raise UserError(
                f"num_value_heads={self.value_heads} is not a multiple of "
                f"num_heads={self.num_heads}: each query head serves equally many value heads."
            )
        if self.value_heads != self.num_heads and self.mechanism not in _WITH_VALUE_HEADS:
            raise UserError(
                f"num_value_heads={self.value_heads} with num_heads={self.num_heads}: "
                f"{self.mechanism} has as many value heads as heads (more are possible with "
                f"{' and '.join(_WITH_VALUE_HEADS)})."
            )
        if self.memory_fusion not in (None, "add", "concat"):
            raise UserError(
                f"linear attention memory_fusion={self.memory_fusion!r} does not exist: use "
                "'add' or 'concat'."
            )
        if self.memory_fusion is not None and (self.mechanism != "kda" or self.bidirectional):
            raise UserError(
                f"memory_fusion={self.memory_fusion!r} with mechanism={self.mechanism!r}, "
                f"bidirectional={self.bidirectional}: a memory is read by 'kda' in one direction."
            )

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.num_heads if self.num_value_heads is None else self.num_value_heads
