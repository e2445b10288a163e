"""How attention types become head counts, and what to say when the numbers do not fit.

MHA, GQA, MQA and SQA are one computation with different numbers of query and key/value heads;
the component and the memory-attention configuration share these rules. Not here: the attention
itself (``rxlm.nn.attention``). No torch.

SQA: Sparse Query Attention, Filipek 2025 (arXiv 2510.01817).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rxlm.errors import UserError

SOFTMAX_KINDS = ("mha", "gqa", "mqa", "sqa")
"""Softmax attention types whose head counts :func:`resolve_heads` knows and that are built."""

LOCAL_KIND = "local"
"""Softmax self-attention to a window; head counts as of gqa. Not for reading memory."""

LINEAR_KINDS = ("gla", "deltanet", "gated_deltanet", "kda", "md_gdn")
"""Linear (recurrent) self-attention types."""

MEMORY_DRIVEN_KIND = "md_gdn"
"""The linear type that reads the memory and carries its state from turn to turn."""

KINDS_OF_FULL_KEY_WIDTH = ("kda", "md_gdn")
"""Linear types whose keys are as wide as the model."""

KINDS_WITH_GROUPS = ("gqa", "sqa", "gma", "dma", "local")
"""Types that read the number of key/value heads from a ``*_groups`` field."""

KINDS_WITH_QUERY_GROUPS = ("sqa", "gma", "dma")
"""Types that read the number of query heads from a ``*_query_groups`` field."""


class HeadCounts(NamedTuple):
    """Heads of one attention; every head is ``head_dim`` wide."""

    query: int
    key_value: int


@dataclass(frozen=True)
class HeadFields:
    """One attention as a configuration describes it, with the field names for messages.

    ``query_groups`` None means half of the heads, for SQA.
    """

    kind: str
    heads: int
    groups: int
    query_groups: int | None
    label: str = "self-attention"
    groups_field: str = "att_groups"
    query_groups_field: str = "att_query_groups"


def resolve_heads(fields: HeadFields) -> HeadCounts:
    """Return the head counts that ``fields`` means.

    mha: H and H. gqa and local: H and ``groups``. mqa: H and 1. sqa: ``query_groups`` (H // 2,
    at least 1, when unset) and ``groups``. Linear types: H and H.

    Raises:
        UserError: for a type without a rule (gma, dma: not built).
    """
    if fields.kind == "mha" or fields.kind in LINEAR_KINDS:
        return HeadCounts(fields.heads, fields.heads)
    if fields.kind in ("gqa", "local"):
        return HeadCounts(fields.heads, fields.groups)
    if fields.kind == "mqa":
        return HeadCounts(fields.heads, 1)
    if fields.kind == "sqa":
        query = max(1, fields.heads // 2) if fields.query_groups is None else fields.query_groups
        return HeadCounts(query, fields.groups)
    raise UserError(
        f"attention type '{fields.kind}' has no head counts; use {one_of(SOFTMAX_KINDS)}."
    )


def head_problems(fields: HeadFields) -> list[str]:
    """Return one sentence per head count of ``fields`` that cannot be built, with the remedy.

    Settings that the type does not read are not looked at.
    """
    return [f"{fields.label} '{fields.kind}': {text}" for text in _head_problems(fields)]


def _head_problems(fields: HeadFields) -> list[str]:
    if fields.kind not in ("gqa", "local", "sqa"):
        return []
    heads, groups = fields.heads, fields.groups
    if fields.kind != "sqa":
        if heads % groups:
            return [
                f"att_heads={heads} is not divisible by {fields.groups_field}={groups}: use "
                f"{fields.groups_field}={alternatives(nearest_divisors(heads, groups))}"
            ]
        return []
    query = resolve_heads(fields).query
    if groups > heads:
        return [f"{fields.groups_field}={groups} exceeds att_heads={heads}: use at most {heads}"]
    if query > heads:
        return [f"{fields.query_groups_field}={query} exceeds att_heads={heads}: use at most "
                f"{heads} (SQA has fewer query heads than att_heads)"]  # fmt: skip
    if query % groups and groups % query:
        given = f"{fields.query_groups_field}={query}"
        if fields.query_groups is None:
            given = f"{fields.query_groups_field} (unset, so att_heads // 2 = {query})"
        options = [count for count in nearest_multiples(query, groups) if count <= heads]
        return [
            f"{given} and {fields.groups_field}={groups} do not fit together, one must be a "
            f"multiple of the other: use {fields.query_groups_field}={alternatives(options)}, or "
            f"{fields.groups_field}={alternatives(nearest_divisors(query, groups))}"
        ]
    return []


def width_problems(
    embed_dim: int, heads: int, *, rotary: bool, nope_field: str | None, heads_field: str
) -> list[str]:
    """Return what prevents ``heads`` equal heads of width ``embed_dim / heads``.

    Args:
        embed_dim: model width.
        heads: number of heads that share it.
        rotary: whether positions are rotary, which needs an even head width.
        nope_field: the field that switches RoPE off, or None if it cannot be.
        heads_field: the name of the field that gave ``heads``.
    """
    step = heads if nope_field or not rotary else 2 * heads
    if embed_dim % heads:
        options = nearest_multiples(embed_dim, step)
        odd = [width for width in options if rotary and (width // heads) % 2]
        only_without_rope = (
            f" ({alternatives(odd)} only with {nope_field}=True: RoPE rotates pairs, so the head "
            "width must be even)"
            if odd
            else ""
        )
        return [
            f"embed_dim={embed_dim} is not divisible by {heads_field}={heads}: use "
            f"{alternatives(options)}{only_without_rope}"
        ]
    if rotary and (embed_dim // heads) % 2:
        switch_off = f", or {nope_field}=True" if nope_field else ""
        return [
            f"embed_dim={embed_dim} with {heads_field}={heads} makes heads {embed_dim // heads} "
            "wide, but RoPE rotates pairs and needs an even width: use embed_dim="
            f"{alternatives(nearest_multiples(embed_dim, 2 * heads))}{switch_off}"
        ]
    return []


def nearest_multiples(value: int, step: int) -> list[int]:
    """Return the positive multiples of ``step`` just below and above ``value`` (or it itself)."""
    if value % step == 0:
        return [value]
    lower = value // step * step
    return [lower, lower + step] if lower else [step]


def nearest_divisors(value: int, near: int) -> list[int]:
    """Return the divisors of ``value`` just below and above ``near``."""
    divisors = [count for count in range(1, value + 1) if value % count == 0]
    below = [count for count in divisors if count <= near]
    above = [count for count in divisors if count > near]
    return below[-1:] + above[:1]


def alternatives(options: list[int]) -> str:
    """Return ``options`` as 'a or b'."""
    return " or ".join(str(option) for option in options)


def one_of(names: tuple[str, ...]) -> str:
    """Return the quoted names separated by bars."""
    return "|".join(f"'{name}'" for name in names)
