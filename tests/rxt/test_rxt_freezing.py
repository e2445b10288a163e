"""Freezing by the names of the reference: what trains afterwards, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from rxlm.rxt.freezing import FreezingMethods
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.parameter_groups import GROUPS, parameter_groups

ModelBuilder = Callable[..., RxTAlpha]


@pytest.fixture
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(use_head_norm=True)


def trained(module: nn.Module) -> dict[str, bool | None]:
    """Return by group whether it trains; None: in part."""
    found: dict[str, bool | None] = {}
    for group, parameters in parameter_groups(module).items():
        states = {parameter.requires_grad for parameter in parameters.values()}
        if states:
            found[group] = states.pop() if len(states) == 1 else None
    return found


def expected(*frozen: str) -> dict[str, bool]:
    return {group: group not in frozen for group in GROUPS}


CALLS: dict[str, tuple[Callable[[FreezingMethods], None], dict[str, bool]]] = {
    "memory": (lambda part: part.freeze_memory(), expected("memory", "memory_norms")),
    "memory alone": (lambda part: part.freeze_memory(with_norms=False), expected("memory")),
    "all but memory": (
        lambda part: part.freeze_without_memory(),
        expected("embedding", "head", "body"),
    ),
    "all but memory alone": (
        lambda part: part.freeze_without_memory(unfreeze_norms=False),
        expected("memory_norms", "embedding", "head", "body"),
    ),
    "embedding": (lambda part: part.freeze_embedding(), expected("embedding")),
    "head": (lambda part: part.freeze_head(), expected("head")),
    "all": (lambda part: part.freeze_all(), expected(*GROUPS)),
    "none": (lambda part: part.unfreeze_all(), expected()),
    "none but memory": (
        lambda part: part.unfreeze_all(freeze_memory=True),
        expected("memory", "memory_norms"),
    ),
    "none but memory alone": (
        lambda part: part.unfreeze_all(freeze_memory=True, freeze_memory_norms=False),
        expected("memory"),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_trains_afterwards(model: RxTAlpha, call: str) -> None:
    """Catches a group that is frozen with another, thawed with another, or frozen in part; in the
    whole model and in each component, which may lack some of them."""
    freeze, wanted = CALLS[call]
    for part in (model, model.decoder, model.encoder, model.memory_attention):
        model.requires_grad_(True)
        freeze(part)
        found = trained(part)
        assert found == {group: wanted[group] for group in found}
    assert set(trained(model)) == set(GROUPS)


def test_others_are_left_as_they_are(model: RxTAlpha) -> None:
    """Catches freezing one thing that thaws what was frozen before."""
    model.freeze_head()
    model.freeze_memory()
    model.unfreeze_memory(with_norms=False)
    model.freeze_embedding()
    assert trained(model) == expected("head", "memory_norms", "embedding")
    model.unfreeze_embedding()
    model.unfreeze_head()
    assert trained(model) == expected("memory_norms")


def test_memory_attention_freezes_by_itself(model: RxTAlpha) -> None:
    """Catches freeze() reaching the decoder's reading of the memory, or nothing at all."""
    model.memory_attention.freeze()
    assert trained(model.memory_attention) == {"memory": False}
    assert trained(model)["memory"] is None and trained(model.decoder)["memory"] is True
    model.memory_attention.unfreeze()
    assert trained(model) == expected()


def test_lists_of_parameters(model: RxTAlpha) -> None:
    """Catches lists that overlap or miss a parameter: an optimizer takes them as its groups."""
    for part in (model, model.decoder, model.encoder, model.memory_attention):
        everything = {id(item) for item in part.parameters()}
        memory, rest = part.memory_parameters(), part.not_memory_parameters()
        assert len(memory) + len(rest) == len(everything)
        assert {id(item) for item in (*memory, *rest)} == everything
        groups = parameter_groups(part)
        assert len(part.head_parameters()) == len(groups["head"])
        named = (*part.embedding_parameters(), *part.head_parameters(), *part.body_parameters())
        norms = {id(item) for item in groups["memory_norms"].values()}
        assert {id(item) for item in named} == {id(item) for item in rest} - norms
