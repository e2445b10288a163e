"""Linear attention beside the softmax attention of a trained model, with its projections (LiZA).

``LiZAttention`` wraps an attention module, which stays as it is and is called as before. Queries,
keys and values of the linear branch come from the same projections, without rotary positions; its
heads go through the same output projection; a memory gate mixes the two outputs
(arXiv:2506.17671, section 3.2). Putting it into whole models: :mod:`.hugging_face`.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.drop_in.delta_rule import DeltaRuleCache, DeltaRuleMixer
from rxlm.nn.drop_in.masks import real_tokens
from rxlm.nn.drop_in.memory_gate import GateMode, MemoryAsGate, mix
from rxlm.nn.drop_in.operator_modes import recurrent_settings


@dataclass(frozen=True)
class LiZASettings:
    """What is put beside softmax attention.

    Attributes:
        operator_mode: as for :class:`~rxlm.nn.drop_in.layer.LinearAttention`.
        recurrent_config: likewise.
        mu: share of linear attention, from 0 to 1.
        gate_mode: ``constant``, ``learnable`` or ``dynamic``.
        cross_gate: whether the product of both shares is added.
        base_scale_attn: whether the linear output is scaled with the root mean square of the
            softmax output.
        max_chunk_size: most tokens computed at once.
        linear_precision: name of a torch type, such as ``float32``.
        use_linear_checkpoint: recompute the recurrence in the backward pass.
    """

    operator_mode: str = "delta_rule"
    recurrent_config: Mapping[str, Any] | None = None
    mu: float = 0.5
    gate_mode: GateMode = "constant"
    cross_gate: bool = False
    base_scale_attn: bool = False
    max_chunk_size: int = 64
    linear_precision: str = "float32"
    use_linear_checkpoint: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


@runtime_checkable
class KeepsLinearStates(Protocol):
    """A cache of a model that can also carry the states of linear branches, by layer."""

    linear_states: dict[int, DeltaRuleCache]


class LiZAttention(nn.Module):
    """Softmax attention of a trained model, mixed with linear attention over its projections."""

    def __init__(
        self,
        base_attn: nn.Module,
        settings: LiZASettings,
        *,
        num_heads: int,
        head_dim: int,
        num_key_value_heads: int,
        bidirectional: bool,
        hidden_dim: int | None = None,
        layer_idx: int = 0,
    ) -> None:
        """Wrap.

        Args:
            base_attn: with one of the layouts of projections that :func:`projections_of` knows.
            settings: what is added.
            num_heads: H of ``base_attn``.
            head_dim: D.
            num_key_value_heads: G.
            bidirectional: whether ``base_attn`` sees later tokens.
            hidden_dim: width of the tokens; None = H * D.
            layer_idx: where a cache of the model keeps the state of this layer.

        Raises:
            UserError: for a module without known projections, or settings that do not exist.
        """
        super().__init__()
        precision = getattr(torch, settings.linear_precision, None)
        if not isinstance(precision, torch.dtype):
            raise UserError(
                f"linear_precision={settings.linear_precision!r} is no type of torch: use float32."
            )
        if projections_of(base_attn) is None:
            raise UserError(
                f"{type(base_attn).__name__} has no projections that are known here: q_proj, "
                "k_proj, v_proj with o_proj or out_proj; qkv_proj; c_attn with c_proj; or query, "
                "key, value."
            )
        self.base_attn = base_attn
        self.settings = settings
        self.layer_idx = layer_idx
        self.linear_attn = DeltaRuleMixer(
            num_heads,
            head_dim,
            num_key_value_heads,
            recurrent_settings(settings.operator_mode, settings.recurrent_config),
            linear_precision=precision,
            max_chunk_size=settings.max_chunk_size,
            use_linear_checkpoint=settings.use_linear_checkpoint,
            bidirectional=bidirectional,
        )
        width = num_heads * head_dim if hidden_dim is None else hidden_dim
        self.memory_gate = MemoryAsGate(settings.mu, settings.gate_mode, width)
        self._signature = inspect.signature(base_attn.forward)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module and mix linear attention into its first output.

        Args:
            hidden_states: ``[B, T, width]``.
            args: of the wrapped module.
            kwargs: of the wrapped module; ``attention_mask`` and a cache are read here, too.

        Raises:
            UserError: when decoding with a cache that has no place for states of linear attention.
        """
        given = self._signature.bind_partial(hidden_states, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        past = given.get("cache", given.get("past_key_values"))
        state = self._past_state(past)
        base = self.base_attn(hidden_states, *args, **kwargs)
        softmax = base[0] if isinstance(base, tuple) else base
        linear = self._linear(hidden_states, given.get("attention_mask"), past, state)
        if self.settings.base_scale_attn:
            linear = linear * (softmax.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        mu = self.memory_gate(hidden_states)
        mixed = mix(softmax, linear.to(softmax.dtype), mu, cross_gate=self.settings.cross_gate)
        return (mixed, *base[1:]) if isinstance(base, tuple) else mixed

    def _linear(
        self, x: Tensor, mask: Tensor | None, past: Any, state: DeltaRuleCache | None
    ) -> Tensor:
        query, key, value = project(self.base_attn, x, self.linear_attn)
        key_mask = real_tokens(mask, x.shape[0], x.shape[1], has_past=past is not None)
        heads, new = self.linear_attn.mix(query, key, value, key_mask, state)
        if isinstance(past, KeepsLinearStates) and new is not None:
            past.linear_states[self.layer_idx] = new.detach()
        projections = projections_of(self.base_attn)
        if projections is None or projections.output is None:
            return heads
        projected: Tensor = getattr(self.base_attn, projections.output)(heads)
        return projected

    def _past_state(self, past: Any) -> DeltaRuleCache | None:
        """Return the state of the tokens in the cache; to be asked before they become more."""
        if past is None or self.linear_attn.bidirectional:
            return None
        if isinstance(past, KeepsLinearStates):
            return past.linear_states.get(self.layer_idx)
        if past.get_seq_length(self.layer_idx):
            raise UserError(
                f"{type(past).__name__} keeps keys and values, but not the state of linear "
                "attention: pass a cache of rxlm.nn.drop_in.hugging_face.linear_cache(model.config)"
                ", or use_cache=False."
            )
        return None


class Projections(NamedTuple):
    """Names of the projections of an attention module.

    Attributes:
        inputs: query, key and value, or one that makes all three.
        output: None where the module leaves it to its parent (BERT).
    """

    inputs: tuple[str, ...]
    output: str | None


def projections_of(module: nn.Module) -> Projections | None:
    """Return the projections of a self-attention; None if its layout is none of the known ones."""
    if hasattr(module, "q_attn"):  # GPT-2's attention to another sequence
        return None
    for inputs in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("c_attn",)):
        for output in ("o_proj", "out_proj", "c_proj"):
            if all(hasattr(module, name) for name in (*inputs, output)):
                return Projections(inputs, output)
    names = ("query", "key", "value")
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return Projections(names, None)
    return None


def project(module: nn.Module, x: Tensor, sizes: DeltaRuleMixer) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the projections of a module: ``[B, T, H * D]``, and ``[B, T, G * D]`` twice."""
    projections = projections_of(module)
    assert projections is not None
    projected = [getattr(module, name)(x) for name in projections.inputs]
    if len(projected) == 1:
        wide = sizes.num_heads * sizes.head_dim
        narrow = sizes.num_key_value_heads * sizes.head_dim
        projected = projected[0].split((wide, narrow, narrow), dim=-1)
    query, key, value = projected
    return query, key, value
