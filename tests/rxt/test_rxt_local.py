"""Local self-attention in the components of RxT: what the window shows, and a cache that does not
grow. Padding, pieces, batches, generation and files: test_rxt_linear, which runs over these
layouts, too.

Shapes: B batch, T tokens, L = 2 layers, D = 16, H = 4, G = 2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.nn.local_cache import LocalCache
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.config import RxTComponentConfig

COMPONENT: dict[str, Any] = {
    "num_layers": 2, "embed_dim": 16, "att_heads": 4, "stm_size": 3, "vocab_size": 30,
    "ff_dim": 20, "seq_len": 64, "cross_att_type": "mha", "self_att_type": "local",
    "att_groups": 2, "local_window_size": 4,
}  # fmt: skip


def component(kind: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    return kind({**COMPONENT, **fields}).eval()


def twin(kind: Any, **fields: Any) -> Any:
    """Return the same weights with attention to everything."""
    return component(kind, **fields, self_att_type="gqa", local_window_size=256)


def reach(states: Tensor, embedded: Tensor, at: int) -> list[int]:
    """Return the tokens that the state at ``at`` depends on."""
    (gradient,) = torch.autograd.grad(states[0, at].sum(), embedded, retain_graph=True)
    return gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()


def embeddings_of(parts: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    parts.embedding.register_forward_hook(keep)
    return found


def test_decoder_sees_the_window_once_per_layer() -> None:
    """Catches a window of one token too many, one that sees ahead, and the wrong size."""
    for layers in (1, 2):
        decoder = component(RxTDecoder, num_layers=layers)
        embedded = embeddings_of(decoder)
        hidden, _ = decoder(torch.randint(0, 30, (1, 20)))
        # Each layer reaches three tokens further back.
        assert reach(hidden, embedded[0], 15) == list(range(15 - 3 * layers, 16))


def test_encoder_sees_both_sides() -> None:
    """Catches an encoder that reads causally, or further to one side."""
    encoder = component(RxTEncoder, num_layers=1)
    embedded = embeddings_of(encoder)
    states = encoder(torch.randint(0, 30, (1, 20)))
    assert reach(states[-1], embedded[0], 10) == list(range(7, 14))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_nope": True, "use_qk_norm": True},
        {"use_gated_attention": True, "att_groups": 1, "rope_base": 100.0},
    ],
)
@pytest.mark.parametrize("kind", [RxTDecoder, RxTEncoder])
def test_window_over_everything_is_gqa(kind: Any, fields: dict[str, Any]) -> None:
    """Catches a field (RoPE, norms, gates, groups) that local attention does not read: with a
    window that holds the sequence, it is gqa with the same weights."""
    local, full = component(kind, **fields, local_window_size=12), twin(kind, **fields)
    assert local.state_dict().keys() == full.state_dict().keys()
    ids = torch.randint(0, 30, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = mask[1, 9:] = False
    found, expected = local(ids, mask), full(ids, mask)
    if kind is RxTDecoder:
        found, expected = found[0], expected[0]
    else:
        found, expected = found.movedim(0, 2), expected.movedim(0, 2)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_the_cache_is_constant() -> None:
    """Catches memory that grows with a turn, and keys that are kept without being visible."""
    decoder = component(RxTDecoder)
    cache, sizes = None, set()
    with torch.no_grad():
        for _ in range(200):
            _, cache = decoder(torch.randint(0, 30, (2, 1)), cache=cache)
            parts = [*(part for layer in cache.layers for part in layer), cache.key_mask]
            sizes.add(sum(part.untyped_storage().nbytes() for part in parts))
    assert len(sizes) == 1
    assert all(isinstance(layer, LocalCache) for layer in cache.layers)
    assert cache.layers[0].key.shape == (2, 3, 2, 4)
    assert cache.key_mask.shape == (2, 0) and cache.lengths.tolist() == [200, 200]


def test_fields() -> None:
    """Catches a window that is ignored silently, and one reported although it is read."""
    assert RxTComponentConfig.parse({"local_window_size": 8}).ignored_fields() == [
        "local_window_size"
    ]
    local = RxTComponentConfig.parse(COMPONENT)
    assert local.ignored_fields() == [] and local.unsupported_features() == []
    hybrid = {**COMPONENT, "self_att_type": "hybrid", "attn_layer_types": ["mha", "local"]}
    assert RxTComponentConfig.parse(hybrid).ignored_fields() == []
