"""Which experts a token visits, and how evenly they are used.

The router of a mixture of experts, the statistics of its choices, and what balances them: an
auxiliary loss (Fedus et al. 2021, arXiv 2101.03961, eq. 4) or offsets of the scores (Wang et al.
2024, arXiv 2408.15664). Statistics are a value: a caller that wants them opens
:func:`record_routing` around the forward pass; nothing is kept in a module.

Not here: the experts (:mod:`rxlm.nn.moe`).

Shapes: N tokens, D width, E experts, K experts that a token visits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Balance = Literal["loss", "bias", "both"]
"""What keeps the experts evenly used: an auxiliary loss, offsets of the scores, or both."""


class Routing(NamedTuple):
    """The choice of every token: ``experts`` int64 ``[N, K]``, their ``weights`` ``[N, K]``, and
    the ``probabilities`` ``[N, E]`` from which it was made."""

    experts: Tensor
    weights: Tensor
    probabilities: Tensor


class RoutingStatistics(NamedTuple):
    """Sums over the real tokens that passed one router.

    ``probability``: ``[E]``, with a graph; ``visits``: ``[E]``, tokens that visited each expert;
    ``tokens``: scalar; ``offset``: the router's offsets ``[E]`` or None; ``balance``: its setting.
    """

    probability: Tensor
    visits: Tensor
    tokens: Tensor
    offset: Tensor | None
    balance: Balance

    def plus(self, other: RoutingStatistics) -> RoutingStatistics:
        """Return the statistics of both sets of tokens."""
        return self._replace(
            probability=self.probability + other.probability,
            visits=self.visits + other.visits,
            tokens=self.tokens + other.tokens,
        )

    @property
    def usage(self) -> Tensor:
        """Share of each expert in all visits, ``[E]``; sums to one (zeros without a token)."""
        return self.visits / self.visits.sum().clamp(min=1)

    def balance_loss(self) -> Tensor:
        """Return E * sum_e usage_e * mean probability_e: 1 if both are even, more otherwise."""
        mean = self.probability / self.tokens.clamp(min=1)
        return len(mean) * (self.usage * mean).sum()

    def objective(self) -> Tensor:
        """Return what training minimises to balance this router.

        Offsets contribute zero, with the gradient usage_e - 1/E: whatever the optimizer is, an
        expert that is used too much gets a lower score, without a gradient to anything else.
        """
        total = self.balance_loss() if self.balance != "bias" else self.probability.sum() * 0.0
        if self.offset is not None:
            excess = (self.usage - 1 / len(self.usage)).detach()
            total = total + ((self.offset - self.offset.detach()) * excess).sum()
        return total


class RoutingRecord:
    """The statistics of every router that ran inside :func:`record_routing`."""

    def __init__(self) -> None:
        self.entries: list[tuple[nn.Module, RoutingStatistics]] = []

    def layers(self) -> list[RoutingStatistics]:
        """Return one total a router, in the order in which they first ran."""
        totals: dict[int, RoutingStatistics] = {}
        for router, statistics in self.entries:
            before = totals.get(id(router))
            totals[id(router)] = statistics if before is None else before.plus(statistics)
        return list(totals.values())

    def objective(self) -> Tensor:
        """Return the mean of :meth:`RoutingStatistics.objective` over routers; there is one."""
        return torch.stack([layer.objective() for layer in self.layers()]).mean()

    def metrics(self) -> dict[str, Tensor]:
        """Return how evenly experts are used, scalars without a graph; empty without a router.

        ``expert_balance``: mean balance loss, 1 = even. ``expert_usage``: mean exp(entropy of
        usage) / E, the share of experts that are in use, 1 = all evenly. ``expert_max_load``:
        visits of the busiest expert of any layer, relative to an even share.
        """
        layers = self.layers()
        if not layers:
            return {}
        usages = [layer.usage.detach() for layer in layers]
        entropies = [torch.special.entr(usage).sum() for usage in usages]
        shares = [
            entropy.exp() / len(usage) for entropy, usage in zip(entropies, usages, strict=True)
        ]
        loads = [usage.max() * len(usage) for usage in usages]
        return {
            "expert_balance": torch.stack(
                [layer.balance_loss().detach() for layer in layers]
            ).mean(),
            "expert_usage": torch.stack(shares).mean(),
            "expert_max_load": torch.stack(loads).max(),
        }


_RECORD: ContextVar[RoutingRecord | None] = ContextVar("routing_record", default=None)


@contextlib.contextmanager
def record_routing() -> Iterator[RoutingRecord]:
    """Collect the statistics of all routers that run in this block, in this thread.

    A block inside another collects for itself only; :func:`rxlm.nn.checkpointing.recompute` uses
    that to hand statistics out of blocks that are computed twice.
    """
    record = RoutingRecord()
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def active_record() -> RoutingRecord | None:
    """Return the record of the innermost :func:`record_routing` block, if there is one."""
    return _RECORD.get()


class Router(nn.Module):
    """Scores experts and chooses the best K of each token.

    The weights of the chosen are their probabilities, renormalised if K > 1. A single one keeps
    its probability (as in Switch): renormalised it would be the constant one, and the router would
    not learn what the choice is worth.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        dtype: torch.dtype = torch.float32,
        follows_autocast: bool = False,
        balance: Balance = "loss",
    ) -> None:
        """Build the router.

        Args:
            dim: D.
            num_experts: E.
            top_k: K.
            dtype: in which scores are computed; float32 is the least, float64 inputs stay so.
            follows_autocast: whether autocast may compute them in its type instead.
            balance: see :data:`Balance`.
        """
        super().__init__()
        self.top_k, self.dtype, self.follows_autocast = top_k, dtype, follows_autocast
        self.balance: Balance = balance
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.offset = None if balance == "loss" else nn.Parameter(torch.zeros(num_experts))
        for parameter in self.parameters():
            # Rounded scores change which expert is chosen.
            parameter._full_precision = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, token_mask: Tensor | None) -> Routing:
        """Choose experts for tokens ``x`` ``[N, D]``.

        Args:
            x: tokens; the choice of one depends on no other.
            token_mask: bool ``[N]``, True at real tokens; None = all. Statistics leave the others
                out.
        """
        routing = self.choose(x)
        record = active_record()
        if record is not None:
            statistics = self._statistics(routing.probabilities, routing.experts, token_mask)
            record.entries.append((self, statistics))
        return routing

    def choose(self, x: Tensor) -> Routing:
        """Do what :meth:`forward` does, unseen by :func:`record_routing`: compilers cannot read
        context variables."""
        probabilities = self._scores(x).softmax(dim=-1)
        ranked = probabilities.detach()
        if self.offset is not None:
            ranked = ranked + self.offset.detach()
        experts = ranked.topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, experts)
        if self.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(experts, weights.to(x.dtype), probabilities)

    def _scores(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else self.dtype
        x, weight = x.to(dtype), self.weight.to(dtype)
        # The meta device has no autocast to switch off; to switch it off takes longer than to ask.
        if (
            self.follows_autocast
            or x.device.type == "meta"
            or not torch.is_autocast_enabled(x.device.type)
        ):
            scores = nn.functional.linear(x, weight)
        else:
            with torch.autocast(x.device.type, enabled=False):
                scores = nn.functional.linear(x, weight)
        return scores if scores.dtype == torch.float64 else scores.float()

    def _statistics(
        self, probabilities: Tensor, experts: Tensor, token_mask: Tensor | None
    ) -> RoutingStatistics:
        real = torch.ones_like(probabilities[:, 0])
        if token_mask is not None:
            real = token_mask.to(real.dtype)
        visits = torch.zeros_like(probabilities[0]).index_add(
            0, experts.flatten(), real.detach().repeat_interleave(self.top_k)
        )
        # Selected, not multiplied: a padded token may hold anything.
        chosen = torch.where(real[:, None] > 0, probabilities, 0.0)
        return RoutingStatistics(chosen.sum(0), visits, real.sum(), self.offset, self.balance)
