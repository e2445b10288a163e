"""Models of equal size: the width of the feed-forward networks makes up for the mixers.

Width, depth, heads, vocabulary, norms and positions are the same for all mechanisms; what a mixer
spends more on parameters, the feed-forward network of its layer spends less. Parameters are linear
in that inner width, so the solution is closed; the network is then counted on the meta device, and
a model outside of the tolerance is an error, not a footnote.

Operations a token, forward, of a row of T tokens: by formula, twice the weights of all products,
plus for softmax attention 4 T D a layer (all pairs, as the kernels that skip nothing compute) and
for mechanisms with a state four a number of the state (one outer product in, one product out); and
counted (``OperationCounter``). The chunk form of a recurrence does more than the formula: it
computes pairs within a chunk.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from rxlm.errors import UserError
from rxlm.evaluation.tables import Table
from rxlm.lm.config import LMConfig
from rxlm.nn.mixers import MIXERS
from rxlm.study.mechanisms import Backend, backend_of, title
from rxlm.study.network import StudyNetwork
from rxlm.study.settings import StudySettings
from rxlm.training.watching.utilization import OperationCounter

FEED_FORWARD_RATIO = 8 / 3
"""Of SwiGLU networks that cost what plain ones of four times the width do; the others move about
it."""
_PER_LAYER = 4 + 3 * FEED_FORWARD_RATIO
_SMALLEST_RATIO = 0.25


class ModelPlan(NamedTuple):
    """A model of a study, and what it costs."""

    attention: str
    config: LMConfig
    total: int
    non_embedding: int
    mixers: int
    """Parameters of the mixers of all layers, convolutions included."""
    target: int

    @property
    def deviation(self) -> float:
        """By which share it misses the target."""
        return self.non_embedding / self.target - 1.0


def width_of(settings: StudySettings, params: int, depth: int) -> int:
    """Return D: a multiple of the head width, near the width of a usual model of that size."""
    if settings.dim is not None:
        return settings.dim
    exact = float((params / (_PER_LAYER * depth)) ** 0.5)
    return max(1, round(exact / settings.head_dim)) * settings.head_dim


def depth_of(params: int) -> int:
    """Return the layers of a model on the scaling curve: 2 at a quarter million, 10 at 30 M."""
    return max(2, round(params ** (1 / 3) / 31))


def plan_model(
    settings: StudySettings,
    attention: str,
    vocab_size: int,
    *,
    params: int | None = None,
    depth: int | None = None,
    tolerance: float | None = None,
    max_seq_len: int = 1024,
) -> ModelPlan:
    """Return the model of a mechanism with as many parameters as all others.

    Args:
        settings: of the study.
        attention: the mechanism.
        vocab_size: V.
        params: without embeddings; default that of the settings.
        depth: layers; default that of the settings.
        tolerance: default that of the settings.
        max_seq_len: of the configuration.

    Raises:
        UserError: if no inner width gives that size, saying which size would do.
    """
    params = settings.params if params is None else params
    tolerance = settings.tolerance if tolerance is None else tolerance
    depth = settings.depth if depth is None else depth
    dim = width_of(settings, params, depth)
    if dim % settings.head_dim:
        raise UserError(f"dim={dim} is not divisible by head_dim={settings.head_dim}.")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": depth,
        "attention": attention,
        "num_heads": dim // settings.head_dim,
        "window": settings.window,
        "conv_size": settings.conv_size,
        "max_seq_len": max(3, max_seq_len),
    }
    # Parameters are linear in the inner width.
    one, two = (_count(settings, LMConfig(**common, ff_dim=ff)).non_embedding for ff in (1, 2))
    per_unit, fixed = two - one, 2 * one - two
    inner = round((params - fixed) / per_unit)
    least = max(1, round(_SMALLEST_RATIO * dim))
    if inner < least:
        raise UserError(
            f"{attention}: its mixers take {fixed:,} of {params:,} parameters at dim={dim}, "
            f"depth={depth}, so the feed-forward network would be {inner} wide. Use --params "
            f"{fixed + per_unit * least} or more, or a smaller --dim."
        )
    for step in (16, 8, 4, 1):  # round widths are faster
        rounded = round(inner / step) * step
        size = fixed + rounded * per_unit
        if rounded >= least and abs(size / params - 1) <= tolerance / 2:
            inner = rounded
            break
    config = LMConfig(**common, ff_dim=inner)
    counted = _count(settings, config)
    plan = ModelPlan(
        attention, config, counted.total, counted.non_embedding, counted.mixers, params
    )
    assert counted.non_embedding == fixed + inner * per_unit, "parameters are linear in the width"
    if abs(plan.deviation) > tolerance:
        raise UserError(
            f"{attention}: {plan.non_embedding:,} parameters at best, {plan.deviation:+.2%} of "
            f"{params:,}, outside of the tolerance of {tolerance:.2%}. One unit of the "
            f"feed-forward network is {per_unit:,}: use a larger --params, a smaller --dim, or a "
            "larger --tolerance."
        )
    return plan


def build(settings: StudySettings, plan: ModelPlan, seed: int = 0) -> StudyNetwork:
    """Return the network of a plan on the CPU; its weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _network(settings, plan.config)


def _network(settings: StudySettings, config: LMConfig) -> StudyNetwork:
    return StudyNetwork(
        config,
        equal_convolution=settings.equal_convolution,
        backend=settings.backend,
        strict_backend=settings.strict_backend,
    )


class _Counts(NamedTuple):
    total: int
    non_embedding: int
    mixers: int


def _count(settings: StudySettings, config: LMConfig) -> _Counts:
    with torch.device("meta"):
        network = _network(settings, config)
    embeddings = [network.embedding, getattr(network, "position_embedding", None)]
    if network.head.weight is not network.embedding.weight:
        embeddings.append(network.head)
    total = _size(network)
    return _Counts(
        total,
        total - sum(_size(part) for part in embeddings if part is not None),
        sum(_size(layer.get_submodule("mixer")) for layer in network.layers),
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class ModelCosts(NamedTuple):
    """What a plan costs at T tokens."""

    state_bytes: int
    """Of the cache of one sequence after T tokens, in fp32."""
    flops_formula: float
    """Operations a token of a forward pass, head included."""
    flops_counted: float
    backend: Backend


def costs_of(settings: StudySettings, plan: ModelPlan, num_tokens: int) -> ModelCosts:
    """Return state bytes and operations a token, found by running the network on one row."""
    network = build(settings, plan).eval()
    counter = OperationCounter()
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    with torch.no_grad():
        with counter:
            hidden, cache = network(ids)
            network.logits(hidden)
        _, after_half = network(ids[:, : max(1, num_tokens // 2)])
    products = sum(
        module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear)
    )
    # Tokens that a mixer can look back to; what does not grow any more is a state.
    quadratic = MIXERS[plan.attention].cost == "quadratic"
    dim, depth = plan.config.dim, plan.config.depth
    grown = cache.num_bytes - after_half.num_bytes
    state = 0 if quadratic else (cache.num_bytes if grown == 0 else after_half.num_bytes) // 4
    mixing = 4 * num_tokens * dim * depth if quadratic else 4 * state
    dtype = torch.float32
    return ModelCosts(
        cache.num_bytes,
        2.0 * products + mixing,
        counter.total / num_tokens,
        backend_of(network, settings.backend, torch.device("cpu"), dtype),
    )


def model_row(plan: ModelPlan, costs: ModelCosts, num_tokens: int) -> dict[str, Any]:
    """Return the row of ``model_configs.json`` and of the table."""
    config = plan.config
    return {
        "attention": plan.attention,
        "num_params": plan.total,
        "non_embedding": plan.non_embedding,
        "target": plan.target,
        "deviation": plan.deviation,
        "mixer_share": plan.mixers / plan.non_embedding,
        "hidden_size": config.dim,
        "num_layers": config.depth,
        "num_heads": config.num_heads,
        "ff_dim": config.inner_dim,
        "tokens": num_tokens,
        "state_bytes": costs.state_bytes,
        "flops_per_token_formula": costs.flops_formula,
        "flops_per_token_counted": costs.flops_counted,
        "positions": config.positions,
        "norm": config.norm,
        "dropout": config.dropout,
        "conv_size": config.conv_size,
        "config": config.model_dump(mode="json"),
    }


def calibration_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of equal models."""
    header = (
        "mechanism", "parameters", "without embeddings", "of target", "in mixers", "D", "layers",
        "heads", "FF width", "state bytes", "FLOP/token, formula", "counted",
    )  # fmt: skip
    body = [
        (
            title(row["attention"]), f"{row['num_params']:,}", f"{row['non_embedding']:,}",
            f"{row['deviation']:+.2%}", f"{row['mixer_share']:.1%}", f"{row['hidden_size']}",
            f"{row['num_layers']}", f"{row['num_heads']}", f"{row['ff_dim']}",
            f"{row['state_bytes']:,}", f"{row['flops_per_token_formula']:,.0f}",
            f"{row['flops_per_token_counted']:,.0f}",
        )
        for row in rows
    ]  # fmt: skip
    tokens = rows[0]["tokens"] if rows else 0
    note = (
        f"State and operations of one row of {tokens:,} tokens, forward, fp32. The formula counts "
        "the recurrent form of linear mechanisms; what is counted is the form that runs."
    )
    return Table("Models of equal size", header, body, note)
