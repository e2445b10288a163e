"""Groups of parameters: complete, disjoint, and what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxlm.errors import UserError
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.parameter_groups import GROUPS, parameter_groups, train_only

SIZES: dict[str, Any] = {"num_layers": 2, "embed_dim": 16, "att_heads": 4, "stm_size": 3}
COMPONENT: dict[str, Any] = {
    **SIZES, "vocab_size": 30, "ff_dim": 20, "use_head_norm": True, "cross_att_type": "mha",
    "use_linear_self_attn": True, "linear_attn_type": "md_gdn", "use_moe": True, "num_experts": 2,
    "stateless_layers_config": ["dense"], "dense_layer_dim": 8,
}  # fmt: skip


def network_of(**fields: Any) -> RxTNetwork:
    component = {**COMPONENT, **fields}
    parts = {"decoder": component, "encoder": component, "memory_attention": SIZES}
    return RxTNetwork(parts)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(tied: bool) -> None:
    """Catches a parameter that no group has, or that two have (an optimizer refuses those)."""
    network = network_of(tie_embeddings=tied)
    for module in (network, network.decoder, network.encoder, network.memory_attention):
        groups = parameter_groups(module)
        grouped = [id(item) for parameters in groups.values() for item in parameters.values()]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(item) for item in module.parameters()}
    assert len(parameter_groups(network)["embedding"]) == 1
    assert ("decoder.head_weight" in parameter_groups(network)["head"]) != tied


def test_groups_hold_what_they_say() -> None:
    """Catches memory parameters among the rest: without memory, those and only those have no
    gradient."""
    network = network_of()
    ids = torch.tensor([[3, 4]])
    (network.decoder.logits(network.decoder(ids)[0]).sum() + network.encoder(ids).sum()).backward()
    groups = parameter_groups(network)
    untouched = {name for name, item in network.named_parameters() if item.grad is None}
    assert untouched == {*groups["memory"], *groups["memory_norms"]}
    assert set(parameter_groups(network.memory_attention)["memory"]) == {
        name for name, _ in network.memory_attention.named_parameters()
    }
    assert all("norm" in name for name in groups["memory_norms"])
    assert all(name.startswith("decoder.head_") for name in groups["head"])


def test_train_only() -> None:
    """Catches a group that stays frozen, one that thaws with it, and a wrong count."""
    network = network_of()
    for chosen in ((), ("memory",), ("memory", "memory_norms"), GROUPS):
        count = train_only(network, chosen)
        for group, parameters in parameter_groups(network).items():
            assert all(item.requires_grad == (group in chosen) for item in parameters.values())
        assert count == sum(item.numel() for item in network.parameters() if item.requires_grad)
    with pytest.raises(UserError, match="Did you mean 'memory_norms'"):
        train_only(network, ["memory_norm"])  # type: ignore[list-item]
    assert all(item.requires_grad for item in network.parameters())
