"""Linear and local self-attention inside encoder, decoder and model: caches, padding, files.

Not here: the layer itself (tests/nn), the mechanisms (tests/ops), rules between the configuration's
fields (test_rxt_config), training (test_training_objective_linear).

Shapes: B batch, T tokens, L layers, S slots, D = 16, V = 30.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rxlm.nn.attention import KeyValue
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import LinearAttentionSettings
from rxlm.nn.recurrent_cache import RecurrentCache
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.models import RxTAlpha

KINDS = ("gla", "deltanet", "gated_deltanet", "kda")
LAYOUTS: dict[str, dict[str, Any]] = {
    **{kind: {"use_linear_self_attn": True, "linear_attn_type": kind} for kind in KINDS},
    "hybrid": {"self_att_type": "hybrid", "attn_layer_types": ["kda", "mha"]},
    "hybrid of two": {"self_att_type": "hybrid", "attn_layer_types": ["gla", "gated_deltanet"]},
}
COMPONENT: dict[str, Any] = {
    "num_layers": 2, "embed_dim": 16, "att_heads": 4, "stm_size": 3, "vocab_size": 30,
    "ff_dim": 20, "seq_len": 64, "cross_att_type": "mha", "linear_attn_use_short_conv": True,
}  # fmt: skip

MEMORY_DRIVEN = {
    "md_gdn": {"use_linear_self_attn": True, "linear_attn_type": "md_gdn"},
    "md_gdn concat": {
        "use_linear_self_attn": True, "linear_attn_type": "md_gdn", "memory_fusion_mode": "concat",
    },
    "hybrid md_gdn": {"self_att_type": "hybrid", "attn_layer_types": ["mha", "md_gdn"]},
}  # fmt: skip

LOCAL = {
    "local": {"self_att_type": "local", "att_groups": 2, "local_window_size": 6},
    "hybrid local": {
        "self_att_type": "hybrid", "attn_layer_types": ["local", "mha"], "local_window_size": 6,
    },
    "hybrid local gla": {
        "self_att_type": "hybrid", "attn_layer_types": ["local", "gla"], "local_window_size": 6,
    },
}  # fmt: skip
"""Local attention keeps the same promises; what its window shows is in test_rxt_local."""

ALL_LAYOUTS = {**LAYOUTS, **MEMORY_DRIVEN, **LOCAL}
layouts = pytest.mark.parametrize("layout", ALL_LAYOUTS.values(), ids=ALL_LAYOUTS)
ModelBuilder = Callable[..., RxTAlpha]


def decoder_of(**fields: Any) -> RxTDecoder:
    torch.manual_seed(0)
    return RxTDecoder({**COMPONENT, **fields}).eval()


def encoder_of(**fields: Any) -> RxTEncoder:
    torch.manual_seed(0)
    return RxTEncoder({**COMPONENT, **fields}).eval()


def attentions(component: RxTDecoder | RxTEncoder) -> list[LinearAttentionSettings]:
    """Return the settings of every linear self-attention, in order."""
    return [
        module.settings for module in component.modules() if isinstance(module, LinearSelfAttention)
    ]


def padded(rows: list[Tensor], left: list[bool], extra: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask of rows padded to a common length, each on the side it names."""
    length = max(len(row) for row in rows) + extra
    ids = torch.full((len(rows), length), 29)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(rows):
        span = slice(length - len(row), length) if left[r] else slice(0, len(row))
        ids[r, span] = row
        mask[r, span] = True
    return ids, mask


def test_every_field_arrives() -> None:
    """Catches a field of the configuration that the layer never hears of, and head widths taken
    from softmax attention."""
    fields = {
        "use_linear_self_attn": True, "linear_attn_type": "gated_deltanet",
        "linear_attn_mode": "fused_recurrent", "linear_attn_expand_k": 0.75,
        "linear_attn_expand_v": 2.0, "linear_attn_heads": 2, "linear_attn_use_short_conv": True,
        "linear_attn_conv_size": 3, "linear_attn_use_gate": False, "linear_attn_norm_eps": 0.5,
        "linear_attn_write_stretch": 0.1, "linear_attn_decay_shrinkage": 0.2,
    }  # fmt: skip
    expected = LinearAttentionSettings(
        "gated_deltanet", dim=16, num_heads=2, key_dim=6, value_dim=16, mode="fused", conv_size=3,
        gated=False, norm_eps=0.5, write_stretch=0.1, decay_shrinkage=0.2,
    )  # fmt: skip
    assert attentions(decoder_of(**fields)) == [expected] * 2
    both = [settings.bidirectional for settings in attentions(encoder_of(**fields))]
    assert both == [True, True]
    mixed = decoder_of(self_att_type="hybrid", attn_layer_types=["kda", "gla"])
    wide, narrow = attentions(mixed)
    assert (wide.mechanism, wide.key_dim, wide.value_dim) == ("kda", 4, 4)
    assert (narrow.mechanism, narrow.key_dim, narrow.value_dim) == ("gla", 2, 4)
    keys = attentions(decoder_of(**LAYOUTS["kda"], linear_attn_key_dim=6))[0]
    assert (keys.key_dim, keys.value_dim) == (6, 4)
    without = decoder_of(**LAYOUTS["gla"], linear_attn_use_short_conv=False)
    assert attentions(without)[0].conv_size is None


@pytest.mark.parametrize(
    ("field", "kind", "other"),
    [
        ("linear_attn_write_stretch", "gla", "deltanet"),
        ("linear_attn_decay_shrinkage", "deltanet", "gla"),
    ],
)
def test_cuts_that_a_mechanism_does_not_have_are_reported(
    field: str, kind: str, other: str
) -> None:
    """Catches a setting that seems to work: GLA has no write strength, DeltaNet no decay."""
    assert decoder_of(**LAYOUTS[kind], **{field: 0.1}).config.ignored_fields() == [field]
    assert decoder_of(**LAYOUTS[other], **{field: 0.1}).config.ignored_fields() == []


@layouts
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_decoding_in_pieces_in_a_padded_batch_equals_each_row_alone(
    layout: dict[str, Any], data: st.DataObject
) -> None:
    """Catches a state or a convolution that padding on either side changes, that is lost between
    calls, or that goes on after a row has ended."""
    decoder = decoder_of(**layout)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    rows = [torch.randint(0, 29, (length,)) for length in lengths]
    slots = torch.randn(2, len(rows), 3, 16)
    memory = decoder.read_memory(slots)
    seen: list[list[Tensor]] = [[] for _ in rows]
    cache, taken = None, [0] * len(rows)
    while any(count < length for count, length in zip(taken, lengths, strict=True)):
        size = data.draw(st.sampled_from([1, 1, 2, 5]))
        pieces = [row[at : at + size] for row, at in zip(rows, taken, strict=True)]
        left = [data.draw(st.booleans()) for _ in rows]
        ids, mask = padded(pieces, left, extra=data.draw(st.integers(0, 2)))
        with torch.no_grad():
            hidden, cache = decoder(ids, mask, memory=memory, cache=cache)
        for r, piece in enumerate(pieces):
            seen[r].append(hidden[r, mask[r]])
            taken[r] += len(piece)
    for r, row in enumerate(rows):
        with torch.no_grad():
            alone, _ = decoder(row[None], memory=decoder.read_memory(slots[:, r : r + 1]))
        torch.testing.assert_close(torch.cat(seen[r]), alone[0], atol=1e-5, rtol=1e-5)
    assert cache is not None and cache.lengths.tolist() == lengths


@layouts
def test_prefill_and_steps_equal_one_forward(layout: dict[str, Any]) -> None:
    """Catches a decode step that computes something else than the form by chunks."""
    decoder = decoder_of(**layout)
    ids = torch.randint(0, 29, (2, 90))
    with torch.no_grad():
        full, _ = decoder(ids)
        hidden, cache = decoder(ids[:, :70])
        pieces = [hidden]
        for t in range(70, 90):
            hidden, cache = decoder(ids[:, t : t + 1], cache=cache)
            pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=1e-5)


@layouts
def test_modes_give_the_same(layout: dict[str, Any]) -> None:
    """Catches a mode that changes the model instead of how it is computed."""
    ids = torch.randint(0, 29, (2, 20))
    chunk, fused = (decoder_of(**layout, linear_attn_mode=mode) for mode in ("chunk", "fused"))
    torch.testing.assert_close(chunk(ids)[0], fused(ids)[0], atol=1e-5, rtol=1e-5)


def influence(component: RxTDecoder | RxTEncoder, run: Callable[[], Tensor]) -> Tensor:
    """Return bool ``[B, T out, B, T in]``: which output depends on which input token."""
    captured: list[Tensor] = []

    def capture(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    hook = component.embedding.register_forward_hook(capture)
    scores = run() @ torch.randn(16)
    hook.remove()
    gradients = [
        torch.autograd.grad(score, captured[0], retain_graph=True)[0].abs().sum(dim=-1)
        for score in scores.flatten()
    ]
    return torch.stack(gradients).unflatten(0, tuple(scores.shape)) > 0


@layouts
def test_what_decoder_and_encoder_see(layout: dict[str, Any]) -> None:
    """Catches a decoder that sees the future, an encoder that reads one way only, padding that is
    read, and rows that see each other."""
    ids = torch.randint(0, 29, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    mask[1, 4:] = False
    real = mask[:, :, None, None]
    decoder = decoder_of(**layout)
    memory = decoder.read_memory(torch.randn(2, 2, 3, 16))
    causal = influence(decoder, lambda: decoder(ids, mask, memory=memory)[0])
    encoder = encoder_of(**layout)
    both = influence(encoder, lambda: encoder(ids, mask)[-1])
    for reached, shape in (
        (causal, torch.ones(5, 5, dtype=torch.bool).tril()),
        (both, torch.ones(5, 5, dtype=torch.bool)),
    ):
        expected = torch.zeros(2, 5, 2, 5, dtype=torch.bool)
        for r in range(2):
            expected[r, :, r] = shape & mask[r]
        assert torch.equal(reached & real, expected & real)


@layouts
def test_encoding_a_padded_batch_equals_each_row_alone(layout: dict[str, Any]) -> None:
    """Catches padding that is read or counted by either direction."""
    encoder = encoder_of(**layout)
    rows = [torch.randint(0, 29, (length,)) for length in (7, 1, 4, 4)]
    ids, mask = padded(rows, left=[False, True, True, False], extra=2)
    states = encoder(ids, mask)
    assert torch.isfinite(states).all()
    for r, row in enumerate(rows):
        torch.testing.assert_close(
            states[:, r, mask[r]], encoder(row[None])[:, 0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_parameter_learns(layout: dict[str, Any]) -> None:
    """Catches parameters that nothing reads and gradients that are not finite, padding included."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False
    ids = torch.randint(0, 29, (2, 6))
    decoder, encoder = decoder_of(**layout), encoder_of(**layout)
    hidden, _ = decoder(ids, mask, memory=decoder.read_memory(torch.randn(2, 2, 3, 16)))
    ((decoder.logits(hidden) ** 2)[mask].mean() + (encoder(ids, mask) ** 2).mean()).backward()
    for component in (decoder, encoder):
        for name, parameter in component.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_does_not_grow(kind: str) -> None:
    """Catches memory that grows with the length of a turn: everything but the counts is of
    constant size, over 200 steps, and no step changes an older cache."""
    decoder = decoder_of(**LAYOUTS[kind], seq_len=512)

    def size(cache: Any) -> int:
        parts = [*(part for layer in cache.layers for part in layer), cache.key_mask, cache.lengths]
        return sum(part.untyped_storage().nbytes() for part in parts)

    with torch.no_grad():
        _, first = decoder(torch.randint(0, 29, (2, 30)), torch.ones(2, 30, dtype=torch.bool))
        copies = [part.clone() for layer in first.layers for part in layer]
        cache = first
        for _ in range(200):
            ids = torch.randint(0, 29, (2, 1))
            _, cache = decoder(ids, torch.ones(2, 1, dtype=torch.bool), cache=cache)
    assert size(cache) == size(first)
    assert cache.lengths.tolist() == [230, 230]
    kept = [part for layer in first.layers for part in layer]
    assert all(torch.equal(one, two) for one, two in zip(copies, kept, strict=True))


def test_rows_of_a_cache_can_be_chosen() -> None:
    """Catches a selection that forgets the mask, the position, or one of the kinds of layers."""
    decoder = decoder_of(**LAYOUTS["hybrid"])
    rows = [torch.randint(0, 29, (length,)) for length in (5, 2, 7)]
    ids, mask = padded(rows, left=[False, True, False], extra=0)
    _, cache = decoder(ids, mask)
    assert isinstance(cache.layers[0], RecurrentCache) and isinstance(cache.layers[1], KeyValue)
    new = torch.randint(0, 29, (3, 1))
    hidden, _ = decoder(new, cache=cache)
    chosen, grown = decoder(new[[2, 0, 2]], cache=cache.select([2, 0, 2]))
    torch.testing.assert_close(chosen, hidden[[2, 0, 2]], atol=1e-6, rtol=1e-6)
    assert grown.lengths.tolist() == [8, 6, 8]


def test_no_rotation_in_linear_layers() -> None:
    """Catches rotary positions that reach linear self-attention; memory is still read with them."""
    ids = torch.randint(0, 29, (1, 6))
    slots = torch.randn(2, 1, 3, 16)

    def hidden(base: float, **fields: Any) -> Tensor:
        decoder = decoder_of(**LAYOUTS["kda"], rope_base=base, **fields)
        return decoder(ids, memory=decoder.read_memory(slots))[0]

    alone = {"skip_memory_cross_attention": True}
    assert torch.equal(hidden(10.0, **alone), hidden(1e4, **alone))
    assert not torch.allclose(hidden(10.0), hidden(1e4))


@layouts
def test_generation_saving_and_conversations(
    make_model: ModelBuilder, tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Catches a batch that answers unlike its rows alone, an answer unlike that of repeated full
    forwards, and a saved model that answers differently."""
    # Untrained models rarely end an answer: with these weights each layout ends some early.
    seed = 4 if layout.get("linear_attn_type") == "md_gdn" else 0
    model = make_model(seed, eos_bias=6.0, linear_attn_use_short_conv=True, **layout)
    turns = [[2, 5, 30 + row, 6, 50 + 3 * row, 3] for row in range(4)]
    prompts = [[2, 5, 40, 41, 42], [2, 5, 90], [2, 5, 7, 100, 101, 102, 103, 104], [2, 5, 12, 13]]
    state = model.update_memory(model.new_conversation(4, seed=0), turns)
    together = model.generate(state, prompts, GREEDY, max_new_tokens=12)
    assert len({len(answer.ids) for answer in together.answers}) > 1, "some should end early"
    for row, prompt in enumerate(prompts):
        alone = model.generate(state.select([row]), [prompt], GREEDY, max_new_tokens=12)
        assert alone.answers[0] == together.answers[row]
    ids = [*prompts[0], 6]
    memory = model.decoder.read_memory(state.slots[:, :1])
    for expected in together.answers[0].ids:
        with torch.no_grad():
            carried = state.select([0]).carried
            hidden, _ = model.decoder(torch.tensor([ids]), memory=memory, carried=carried)
        assert int(model.decoder.logits(hidden[0, -1]).argmax()) == expected
        ids.append(expected)
    model.save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    again = loaded.generate(state, prompts, GREEDY, max_new_tokens=12)
    assert again.answers == together.answers
