"""The part of a loss that keeps experts evenly used, and what is measured of their use.

What balances a router, and how, is the model's business (``moe_balance``); here it joins the loss
of a stage. The statistics are those of one micro-batch: two halves have a little more balance loss
than the whole, so accumulation is not exact in this term (and only in it).
"""

from __future__ import annotations

from torch import Tensor

from rxlm.nn.expert_routing import RoutingRecord


def with_balance(
    loss: Tensor, routing: RoutingRecord, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss with its balance term, and metrics; unchanged for a model without experts.

    Args:
        loss: mean over the targets of a micro-batch.
        routing: of all routers that ran for it.
        scale: weight of the term.
    """
    if not routing.entries:
        return loss, {}
    return loss + scale * routing.objective(), routing.metrics()
