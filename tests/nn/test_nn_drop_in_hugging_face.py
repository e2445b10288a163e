"""Linear attention inside tiny random models of transformers: put in, decoded, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.drop_in.hugging_face import (
    inject_linear_attention,
    linear_cache,
    load_injected,
    save_injected,
)
from rxlm.nn.drop_in.memory_gate import set_mu
from rxlm.nn.drop_in.mixing import LiZASettings, LiZAttention

transformers = pytest.importorskip("transformers")

SHARED = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
TEXT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 49}


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            **SHARED, **TEXT, intermediate_size=48, num_key_value_heads=2
        )
        return transformers.LlamaForCausalLM(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(**TEXT, n_layer=2, n_head=4, n_embd=32, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()
    if name == "bert":
        config = transformers.BertConfig(**SHARED, vocab_size=50, intermediate_size=48)
        return transformers.BertForMaskedLM(config).eval()
    config = transformers.ViTConfig(**SHARED, intermediate_size=48, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config).eval()


def tokens() -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded on the left."""
    ids = torch.randint(2, 49, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


@torch.no_grad()
def logits(model: Any) -> Tensor:
    if "pixel_values" in model.main_input_name:
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return model(pixel_values=image).logits
    ids, mask = tokens()
    return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_inject_save_and_load(name: str, tmp_path: Path) -> None:
    """A model that changes by injection alone, or by saving and loading, would show."""
    model = make(name)
    before = logits(model)
    inject_linear_attention(model, mu=0.0, operator_mode="gated_delta_rule")
    wrapped = [module for module in model.modules() if isinstance(module, LiZAttention)]
    assert len(wrapped) == 2
    assert all(w.linear_attn.bidirectional == (name in ("bert", "vit")) for w in wrapped)
    assert torch.equal(logits(model), before)
    set_mu(model, 0.4)
    mixed = logits(model)
    assert not torch.allclose(mixed, before, atol=1e-3)
    save_injected(model, tmp_path)
    loaded = load_injected(tmp_path)
    assert torch.equal(logits(loaded), mixed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_inject_keeps_padding_neutral(name: str) -> None:
    """A mask that the linear branch reads wrongly, of any attention implementation, would show."""
    for implementation in ("sdpa", "eager"):
        model = inject_linear_attention(make(name), mu=1.0)
        model.set_attn_implementation(implementation)
        ids, mask = tokens()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        alone = model(input_ids=ids[1:, 3:]).logits
        torch.testing.assert_close(padded[1:, 3:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_inject_decodes_with_its_cache(name: str, beams: int) -> None:
    """A state that beam search does not reorder, or one that is lost, would show."""
    model = inject_linear_attention(make(name), mu=0.7, operator_mode="gated_delta_product")
    ids, mask = tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    without = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        cache = linear_cache(model.config)
        name_of_cache = "cache" if "cache" in _arguments(model) else "past_key_values"
        with_cache = model.generate(**inputs, **{name_of_cache: cache}, **options)
    assert torch.equal(with_cache, without)
    assert sorted(cache.linear_states) == [0, 1]
    cache.reset()
    assert not cache.linear_states


def test_inject_trains_through_both_branches() -> None:
    """A branch outside of the graph would show: mu near 1 leaves the model nothing else."""
    model = inject_linear_attention(make("llama"), mu=0.99, gate_mode="learnable").train()
    ids, _ = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    gate = model.model.layers[0].self_attn
    assert gate.memory_gate.mu_logit.grad is not None
    assert gate.base_attn.q_proj.weight.grad.abs().sum() > 0


def test_misuse_of_injection_is_one_clear_error(tmp_path: Path) -> None:
    """A second injection, or decoding without states that looks fine, would pass silently."""
    model = make("llama")
    with pytest.raises(UserError, match="no linear attention"):
        save_injected(model, tmp_path)
    with pytest.raises(UserError, match="see LiZASettings"):
        inject_linear_attention(model, mux=0.5)
    with pytest.raises(UserError, match="not both"):
        inject_linear_attention(model, LiZASettings(), mu=0.5)
    inject_linear_attention(model)
    with pytest.raises(UserError, match="already"):
        inject_linear_attention(model)
    with pytest.raises(UserError, match="no attention module"):
        inject_linear_attention(torch.nn.Linear(2, 2))
    ids, _ = tokens()
    with pytest.raises(UserError, match="linear_cache"):
        model.generate(ids, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(UserError, match="cannot be cropped"):
        linear_cache(model.config).crop(1)
    with pytest.raises(UserError, match="not written by save_injected"):
        load_injected(tmp_path)


def _arguments(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(type(model).forward).parameters)
