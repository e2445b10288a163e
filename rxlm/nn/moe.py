"""Mixture of experts: feed-forward networks of which every token visits a few (Shazeer et al. 2017,
arXiv 1701.06538; shared experts: DeepSeekMoE, arXiv 2401.06066).

    y = sum_k w_k Expert_{e_k}(x)  +  Shared(x)

No expert has a capacity and no token is dropped: what a token gets depends on no other token.
Not here: the choice of experts and its balance (:mod:`rxlm.nn.expert_routing`).

Shapes: N tokens, D width, E experts, K experts that a token visits, M = N * K visits, F inner width
of an expert, S shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rxlm.nn.expert_routing import Balance, Router, Routing
from rxlm.nn.feed_forward import ACTIVATIONS
from rxlm.ops.grouped_matmul import (
    GroupedBackend,
    grouped_backend,
    grouped_matmul,
    product_dtype,
)

FEW_VISITS = 64
"""Visits up to which a compiled step lets every one read its matrices for itself."""

BiasMode = Literal["global", "local", "off"]
"""Biases of experts: one for all, one each, or none."""


@dataclass(frozen=True)
class MoeSettings:
    """What distinguishes one mixture of experts from another.

    ``backend`` fixes how experts are computed (``loop``: one after the other, the plain form; else
    see :data:`rxlm.ops.grouped_matmul.GroupedBackend`); None: the fastest, where ``use_kernel``
    says whether PyTorch's grouped kernel may be that.
    """

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    num_shared: int = 0
    shared_hidden_dim: int = 0
    activation: str = "swish"
    gated: bool = True
    dropout: float = 0.0
    bias: BiasMode = "off"
    shared_bias: BiasMode = "off"
    weighted_shared: bool = False
    router_dtype: torch.dtype = torch.float32
    router_follows_autocast: bool = False
    balance: Balance = "loss"
    backend: GroupedBackend | Literal["loop"] | None = None
    use_kernel: bool = True


class ExpertWeights(nn.Module):
    """Weights of feed-forward networks of one shape, stacked: ``up`` ``[E, F or 2F, D]`` (gate
    first), ``down`` ``[E, D, F]``, and biases ``[E or 1, F or 2F]``, ``[E or 1, D]``."""

    def __init__(self, number: int, hidden_dim: int, bias: BiasMode, settings: MoeSettings) -> None:
        super().__init__()
        self.dropout, self.gated = nn.Dropout(settings.dropout), settings.gated
        self.activation = ACTIVATIONS[settings.activation]
        inner = hidden_dim * (2 if settings.gated else 1)
        self.up = nn.Parameter(torch.empty(number, inner, settings.dim))
        self.down = nn.Parameter(torch.empty(number, settings.dim, hidden_dim))
        self.up_bias = self.down_bias = None
        if bias != "off":
            rows = number if bias == "local" else 1
            self.up_bias = nn.Parameter(torch.zeros(rows, inner))
            self.down_bias = nn.Parameter(torch.zeros(rows, settings.dim))
            for parameter in (self.up_bias, self.down_bias):
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.initialize(1.0)

    @torch.no_grad()
    def initialize(self, scale: float) -> None:
        """Draw weights as those of a linear layer, the output times ``scale``; biases are zero."""
        nn.init.normal_(self.up, std=self.up.shape[-1] ** -0.5)
        nn.init.normal_(self.down, std=scale * self.down.shape[-1] ** -0.5)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def inner(self, hidden: Tensor) -> Tensor:
        """Apply activation, gate and dropout to up-projections ``[..., F or 2F]``."""
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.dropout(self.activation(gate) * hidden)
        return self.dropout(self.activation(hidden))


class MixtureOfExperts(nn.Module):
    """Routed experts, and shared ones that every token visits."""

    def __init__(self, settings: MoeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.router = Router(
            settings.dim,
            settings.num_experts,
            settings.top_k,
            dtype=settings.router_dtype,
            follows_autocast=settings.router_follows_autocast,
            balance=settings.balance,
        )
        self.experts = ExpertWeights(
            settings.num_experts, settings.hidden_dim, settings.bias, settings
        )
        if settings.num_shared:
            self.shared = ExpertWeights(
                settings.num_shared, settings.shared_hidden_dim, settings.shared_bias, settings
            )
            if settings.weighted_shared and settings.num_shared > 1:
                self.shared_mix = nn.Parameter(torch.zeros(settings.num_shared, settings.dim))

    def initialize(self, scale: float) -> None:
        """Draw fresh experts whose outputs are ``scale`` large (for residual branches)."""
        self.experts.initialize(scale)
        if self.settings.num_shared:
            self.shared.initialize(scale)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``.

        Args:
            x: tokens.
            token_mask: bool ``[...]``, True at real tokens; None = all. The others are computed
                like all, but do not count in what :func:`~rxlm.nn.expert_routing.record_routing`
                collects.
        """
        flat = x.reshape(-1, x.shape[-1])
        mask = None if token_mask is None else token_mask.reshape(-1)
        compiled = self._decodes_compiled(flat)
        routing = self.router.choose(flat) if compiled else self.router(flat, mask)
        if self.settings.backend == "loop":
            mixed = self._in_a_loop(flat, routing)
        elif compiled:
            mixed = self._of_few_tokens(flat, routing)
        elif self._decodes_on_cpu(flat):
            mixed = self._of_one_token(flat, routing)
        else:
            mixed = self._together(flat, routing)
        if self.settings.num_shared:
            mixed = mixed + self._shared(flat)
        return mixed.view(x.shape)

    def backend_for(self, x: Tensor) -> GroupedBackend | Literal["loop"]:
        """Return how the experts of tokens ``x`` ``[..., D]`` are computed."""
        settings = self.settings
        if settings.backend is not None:
            return settings.backend
        sizes = (
            x.numel() // x.shape[-1] * settings.top_k,
            settings.num_experts,
            settings.dim,
            settings.hidden_dim,
        )
        return grouped_backend(x.device, product_dtype(x), sizes, kernel=settings.use_kernel)

    def _together(self, x: Tensor, routing: Routing) -> Tensor:
        """Sort the visits by expert, compute each expert's at once, sort them back."""
        backend = self.backend_for(x)
        assert backend != "loop"
        top_k = self.settings.top_k
        expert, order = routing.experts.flatten().sort(stable=True)
        counts = _visits(expert, self.settings.num_experts)
        # Expanded before it is sorted: adding up K gradients a token then has one order.
        visits = x[:, None].expand(-1, top_k, -1).reshape(-1, x.shape[-1])
        rows = visits.index_select(0, order)
        weights = self.experts
        hidden = grouped_matmul(rows, weights.up, counts, backend)
        hidden = weights.inner(_biased(hidden, weights.up_bias, expert))
        output = grouped_matmul(hidden, weights.down, counts, backend)
        output = _biased(output, weights.down_bias, expert)
        unsorted = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=x.device)
        )
        by_token = output.index_select(0, unsorted).view(-1, top_k, x.shape[-1])
        return (by_token * routing.weights[..., None]).sum(dim=1).to(x.dtype)

    def _decodes_on_cpu(self, x: Tensor) -> bool:
        one = len(x) == 1 and self.settings.backend is None and x.device.type == "cpu"
        return one and not torch.is_grad_enabled()

    def _of_one_token(self, x: Tensor, routing: Routing) -> Tensor:
        """Multiply by the chosen matrices where they lie: nothing to sort, nothing to copy."""
        weights = self.experts
        chosen = routing.experts[0]
        experts = chosen.tolist()
        hidden = torch.cat([nn.functional.linear(x, weights.up[expert]) for expert in experts])
        hidden = weights.inner(_biased(hidden, weights.up_bias, chosen))
        output = torch.cat(
            [
                nn.functional.linear(row, weights.down[expert])
                for row, expert in zip(hidden.split(1), experts, strict=True)
            ]
        )
        output = _biased(output, weights.down_bias, chosen)
        return (output * routing.weights[0, :, None]).sum(dim=0, keepdim=True).to(x.dtype)

    def _decodes_compiled(self, x: Tensor) -> bool:
        few = len(x) * self.settings.top_k <= FEW_VISITS and self.settings.backend is None
        return torch.compiler.is_compiling() and few and not torch.is_grad_enabled()

    def _of_few_tokens(self, x: Tensor, routing: Routing) -> Tensor:
        """Products and sums of static shapes: a compiler reads the chosen matrices where they lie.

        Run as it stands it would copy them; so it is for compiled steps only.
        """
        weights, chosen = self.experts, routing.experts
        expert = chosen.flatten()
        hidden = (weights.up[chosen] * x[:, None, None]).sum(dim=-1).flatten(0, 1)
        hidden = weights.inner(_biased(hidden, weights.up_bias, expert))
        output = (weights.down[expert] * hidden[:, None]).sum(dim=-1)
        output = _biased(output, weights.down_bias, expert).view(*chosen.shape, -1)
        return (output * routing.weights[..., None]).sum(dim=1).to(x.dtype)

    def _in_a_loop(self, x: Tensor, routing: Routing) -> Tensor:
        weights = self.experts
        mixed = torch.zeros_like(x)
        for index, (up, down) in enumerate(zip(weights.up, weights.down, strict=True)):
            token, place = (routing.experts == index).nonzero(as_tuple=True)
            expert = torch.full_like(token, index)
            hidden = _biased(nn.functional.linear(x[token], up), weights.up_bias, expert)
            output = nn.functional.linear(weights.inner(hidden), down)
            output = _biased(output, weights.down_bias, expert)
            share = routing.weights[token, place, None]
            mixed = mixed.index_add(0, token, (output * share).to(x.dtype))
        return mixed

    def _shared(self, x: Tensor) -> Tensor:
        """Return the mean of the shared experts, or their learned mix, as one wide network."""
        weights, number = self.shared, self.settings.num_shared
        mix = x.new_full((1, number), 1 / number)
        if hasattr(self, "shared_mix"):
            scores = nn.functional.linear(x, self.shared_mix)
            precise = torch.promote_types(scores.dtype, torch.float32)
            mix = scores.softmax(dim=-1, dtype=precise).to(x.dtype)
        hidden = nn.functional.linear(x, weights.up.flatten(0, 1)).unflatten(-1, (number, -1))
        if weights.up_bias is not None:
            hidden = hidden + weights.up_bias
        hidden = weights.inner(hidden) * mix[..., None]
        output = nn.functional.linear(hidden.flatten(-2), weights.down.transpose(0, 1).flatten(1))
        if weights.down_bias is not None:
            # One bias for all is its own mean; the mix sums to one.
            bias = weights.down_bias.expand(number, -1)
            output = output + mix @ bias
        return output.to(x.dtype)


def _visits(expert: Tensor, num_experts: int) -> Tensor:
    """Return how many rows each expert has, int64 ``[E]``."""
    counts = torch.zeros(num_experts, dtype=torch.long, device=expert.device)
    return counts.index_add(0, expert, torch.ones_like(expert))


def _biased(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    if bias is None:
        return rows
    return rows + (bias if len(bias) == 1 else bias[expert])
