"""Int8 models: what changes, folders, equality of prefill, steps and batches, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rxlm.errors import UserError
from rxlm.nn.int8_linear import Int8Linear, is_int8
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.int8 import quantize_int8, quantized_share
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.session import Session
from rxlm.training.build import StageInputs, build_model
from rxlm.training.recipes import SFTRecipe

ModelBuilder = Callable[..., RxTAlpha]
GREEDY = SamplingSettings(temperature=0.0)
LINEAR = {"use_linear_self_attn": True, "linear_attn_type": "md_gdn", "linear_attn_key_dim": 8}
EXPERTS = {"use_moe": True, "num_experts": 3}


@pytest.fixture(scope="module", params=[{}, LINEAR, EXPERTS], ids=["softmax", "md_gdn", "experts"])
def pair(request: pytest.FixtureRequest, make_model: ModelBuilder) -> tuple[RxTAlpha, RxTAlpha]:
    model = make_model(eos_bias=-2.0, **request.param)
    return model, quantize_int8(model)


@pytest.fixture(scope="module")
def small(make_model: ModelBuilder) -> RxTAlpha:
    return quantize_int8(make_model())


def test_only_the_matrices_of_tokens_change(pair: tuple[RxTAlpha, RxTAlpha]) -> None:
    """Catches a given model that is changed, and gates, routers or memory that become int8."""
    model, made = pair
    assert not is_int8(model) and 0.1 < quantized_share(made) < 0.9
    before = model.state_dict()
    for name, value in made.state_dict().items():
        if value.dtype == torch.int8:
            assert name.split(".")[-2] in {
                "query", "key", "value", "output", "query_key_value", "up", "down"
            }  # fmt: skip
            kept = ("gate", "memory_fusion", "router", "experts", "memory_attention", "embedding")
            assert not any(part in name for part in kept), name
        elif not name.endswith(".scale") or name in before:
            assert torch.equal(value, before[name]), name
    assert not any(item.requires_grad for item in made.parameters()) and not made.training


def test_the_memory_and_the_answers_are_near(pair: tuple[RxTAlpha, RxTAlpha]) -> None:
    """Catches weights that land in another layer: everything would run, and mean nothing."""
    model, _ = pair
    ids = torch.randint(5, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slots = model.initial_memory(3)
        a, b = (one.write_memory(slots, ids) for one in pair)
        assert (a - b).norm() < 0.05 * (a - slots).norm()
        logits = []
        for one in pair:
            hidden, _ = one.decoder(ids, memory=one.decoder.read_memory(a))
            logits.append(one.decoder.logits(hidden))
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()
    assert not torch.equal(*logits)


def test_steps_are_prefill_and_a_batch_is_its_rows(pair: tuple[RxTAlpha, RxTAlpha]) -> None:
    """Catches input scales over all tokens or rows, which leak the future and the neighbours."""
    decoder = pair[1].decoder
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        memory = decoder.read_memory(pair[1].initial_memory(1).expand(-1, 3, -1, -1))
        whole, _ = decoder(ids, memory=memory)
        cache, parts = None, []
        for t in range(ids.shape[1]):
            part, cache = decoder(ids[:, t : t + 1], memory=memory, cache=cache)
            parts.append(part)
        alone = decoder.read_memory(pair[1].initial_memory(1))
        rows = torch.cat([decoder(row[None], memory=alone)[0] for row in ids])
    # Attention sums in another order, and a value next to a rounding edge moves one int8 step.
    for other in (torch.cat(parts, dim=1), rows):
        assert (whole - other).norm() < 0.01 * whole.norm()
    state = pair[1].new_conversation(3)
    queries = ["Hello, how are you?", "My name is Ann.", "I live in Oslo."]
    together = pair[1].generate(state, queries, GREEDY, max_new_tokens=8).answers
    single = [
        pair[1].generate(state.select([n]), [query], GREEDY, max_new_tokens=8).answers[0].ids
        for n, query in enumerate(queries)
    ]
    assert [answer.ids for answer in together] == single


def test_a_folder_gives_the_same_bits(pair: tuple[RxTAlpha, RxTAlpha], tmp_path: Path) -> None:
    """Catches weights that are quantised again when loaded, or read in another type."""
    model, made = pair
    made.save_pretrained(tmp_path / "int8")
    model.save_pretrained(tmp_path / "float")
    loaded = RxTAlpha.from_pretrained(tmp_path / "int8")
    assert loaded.fingerprint() == made.fingerprint()
    assert loaded.fingerprint().differences(model.fingerprint()) == ["weights"]
    sizes = [(tmp_path / form / "model.safetensors").stat().st_size for form in ("int8", "float")]
    assert sizes[0] < sizes[1]
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slots = made.initial_memory(2)
        assert torch.equal(made.write_memory(slots, ids), loaded.write_memory(slots, ids))
    assert "int8 weights" in (tmp_path / "int8" / "README.md").read_text(encoding="utf-8")


def test_a_session_of_the_float_model_is_refused(make_model: ModelBuilder, tmp_path: Path) -> None:
    """Catches a memory that is read by weights that did not write it."""
    model = make_model(eos_bias=4.0)
    session = Session(model)
    session.ask("Hi.")
    session.save(tmp_path / "s")
    with pytest.raises(UserError, match="saved with another model: weights differs"):
        Session.load(tmp_path / "s", quantize_int8(model))


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_folders_that_do_not_fit_are_refused(small: RxTAlpha, tmp_path: Path) -> None:
    """Catches int8 numbers taken for weights, by this version or by one that knows no int8."""
    small.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("architecture", "rxlm_version"):
        values.pop(name)
    with pytest.raises(UserError, match="no field 'quantization'"):
        RxTConfig.parse(values)  # What a version without int8 does with the file.
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith(".scale") and "feed_forward" in name)
    save_file({**weights, name: -weights[name]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="positive float32: the file is damaged"):
        RxTAlpha.from_pretrained(tmp_path)
    weight = name.replace(".scale", ".weight")
    save_file({**weights, weight: weights[weight].float()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"feed_forward.* has torch.float32 weights"):
        RxTAlpha.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    edited(tmp_path, lambda values: values["quantization"].update(version=2))
    with pytest.raises(UserError, match="use the version of rxlm that wrote it"):
        RxTAlpha.from_pretrained(tmp_path)
    edited(tmp_path, lambda values: values.pop("quantization"))
    with pytest.raises(UserError, match=r"scale: unknown to this model"):
        RxTAlpha.from_pretrained(tmp_path)


def test_models_that_cannot_be_quantised(small: RxTAlpha, make_model: ModelBuilder) -> None:
    """Catches quantising twice, and a type that is rounded twice without a word."""
    with pytest.raises(UserError, match="int8 weights already"):
        quantize_int8(small)
    with pytest.raises(UserError, match=r"weights in torch.bfloat16.*model.float\(\) first"):
        quantize_int8(make_model().to(torch.bfloat16))
    with pytest.raises(UserError, match="is on meta"):
        quantize_int8(make_model().to("meta"))


def test_a_gpu_is_refused(small: RxTAlpha, tmp_path: Path) -> None:
    """Catches a model that is moved first and fails in the middle of an answer."""
    small.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="runs on a CPU, not on cuda"):
        RxTAlpha.from_pretrained(tmp_path, device="cuda")


def test_training_is_refused(small: RxTAlpha, tmp_path: Path) -> None:
    """Catches a run that trains what is left in float32, beside frozen int8."""
    for call in (
        small.unfreeze_all,
        small.unfreeze_memory,
        small.requires_grad_,
        small.decoder.unfreeze_head,
        small.freeze_without_memory,
    ):
        with pytest.raises(UserError, match="cannot be trained"):
            call()
    small.freeze_all()
    small.save_pretrained(tmp_path)
    recipe = SFTRecipe.model_construct(stage="sft", model=None)
    with pytest.raises(UserError, match="cannot be trained"):
        build_model(recipe, StageInputs(tmp_path, tmp_path))


def test_parts_of_an_int8_model_are_refused(
    small: RxTAlpha, make_model: ModelBuilder, tmp_path: Path
) -> None:
    """Catches a decoder's folder that says float32 and holds int8."""
    with pytest.raises(UserError, match="component of an int8 model"):
        small.decoder.save_pretrained(tmp_path)
    small.memory_attention.save_pretrained(tmp_path / "memory")  # float32 in both
    with pytest.raises(UserError):
        make_model().load_pretrained_weights(decoder=small.decoder)


def test_layers_of_a_subclass_are_found(small: RxTAlpha) -> None:
    """Catches a dense layer that quietly stays float32."""
    left = [
        name
        for name, part in small.named_modules()
        if isinstance(part, nn.Linear) and "gate" not in name
    ]
    assert left == [] and any(isinstance(part, Int8Linear) for part in small.modules())
