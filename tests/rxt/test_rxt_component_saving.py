"""Single components on disk, and models assembled from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rxlm
from rxlm.errors import UserError
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.memory_building import RxTMemoryAttention
from rxlm.rxt.models import RxTAlpha

ModelBuilder = Callable[..., RxTAlpha]
CLASSES: dict[str, Any] = {
    "decoder": RxTDecoder,
    "encoder": RxTEncoder,
    "memory_attention": RxTMemoryAttention,
}


@pytest.fixture(scope="module")
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(seed=2, memory_variant="self-interlayer")


@pytest.fixture
def folders(model: RxTAlpha, tmp_path: Path) -> dict[str, Path]:
    """The three components of ``model``, each in a folder."""
    for name in CLASSES:
        getattr(model, name).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in CLASSES}


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_component_is_the_saved_one(
    make_model: ModelBuilder, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Catches weights that are rounded or left out, the embedding above all, which is the other
    component's in a model, and a configuration that is not kept."""
    part = getattr(make_model(seed=2, memory_variant="self-interlayer").to(dtype), name)
    part.save_pretrained(tmp_path / name)
    before = torch.get_rng_state()
    loaded = CLASSES[name].from_pretrained(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == part.config and not loaded.training
    ours, theirs = part.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    values = json.loads((tmp_path / name / "config.json").read_text())
    assert values["architecture"] == CLASSES[name].__name__
    assert values["format_version"] == 1 and values["rxlm_version"] == rxlm.__version__
    total = sum(tensor.numel() for tensor in part.parameters())
    assert f"| total | {total:,} |" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("name", CLASSES)
def test_another_kind_is_refused(
    model: RxTAlpha, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Catches an encoder that is loaded as a decoder with partly random weights, and a component
    that is taken for a whole model."""
    kind = CLASSES[name].__name__
    for other, cls in CLASSES.items():
        if other != name:
            with pytest.raises(UserError, match=f"holds an {kind}, not an {cls.__name__}"):
                cls.from_pretrained(folders[name])
    with pytest.raises(UserError, match=f"holds an {kind}, one component.*from_components"):
        rxlm.load(folders[name])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=rf"a whole model .*rxlm\.load\(.*\)\.{name}"):
        CLASSES[name].from_pretrained(tmp_path / "whole")
    edit_config(folders[name], architecture="bert")
    with pytest.raises(UserError, match="holds bert, not"):
        CLASSES[name].from_pretrained(folders[name])


@pytest.mark.parametrize("name", CLASSES)
def test_a_damaged_component_is_refused(
    folders: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches missing and unknown weights, other formats and unknown settings being accepted."""
    folder, cls = folders[name], CLASSES[name]
    with pytest.raises(UserError, match="overwrite=True"):
        cls.from_pretrained(folder).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(iter(weights))
    tensor = weights.pop(lost)
    save_file({**weights, "extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        cls.from_pretrained(folder)
    assert f"{lost}: missing" in str(error.value) and "extra: unknown" in str(error.value)
    cls.from_pretrained(folder, strict=False)
    assert f"{lost}: missing" in caplog.text
    save_file({**weights, lost: tensor}, folder / "model.safetensors")
    cls.from_pretrained(folder)
    edit_config(folder, format_version=9)
    with pytest.raises(UserError, match="format_version=9"):
        cls.from_pretrained(folder)
    edit_config(folder, format_version=1, embed_din=3)
    with pytest.raises(UserError, match="did you mean 'embed_dim'"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_model_of_three_components_is_the_model(
    model: RxTAlpha, folders: dict[str, Path], as_folder: bool
) -> None:
    """Catches a part that keeps fresh weights, an embedding that is not shared, and weights that
    are shared with the components although copies are promised."""
    parts = folders if as_folder else {name: getattr(model, name) for name in CLASSES}
    built = RxTAlpha.from_components(**parts, tokenizer=model.tokenizer)
    assert built.config == model.config
    assert built.fingerprint() == model.fingerprint() and not built.training
    assert built.decoder.embedding is built.encoder.embedding
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in built.parameters()}
    query = model.tokenize_query("Hello")
    model.reset_stm_state()
    assert list(built.interact(**query, seed=1)) == list(model.interact(**query, seed=1))


def test_components_that_do_not_fit_are_refused(
    model: RxTAlpha, make_model: ModelBuilder, folders: dict[str, Path]
) -> None:
    """Catches parts of other sizes, kinds and types put together, and places mixed up."""
    small = make_model(stm_size=5).memory_attention
    with pytest.raises(UserError, match=r"do not fit together.*stm_size=5"):
        RxTAlpha.from_components(model.decoder, model.encoder, small)
    with pytest.raises(UserError, match="decoder was given an RxTEncoder"):
        RxTAlpha.from_components(model.encoder, model.encoder, model.memory_attention)
    with pytest.raises(UserError, match="holds an RxTDecoder, not an RxTEncoder"):
        RxTAlpha.from_components(
            folders["decoder"], folders["decoder"], folders["memory_attention"]
        )
    with pytest.raises(UserError, match="know their configuration"):
        RxTAlpha.from_components(torch.nn.Linear(2, 2), model.encoder, model.memory_attention)
    half = RxTMemoryAttention.from_pretrained(folders["memory_attention"]).bfloat16()
    with pytest.raises(UserError, match=r"memory_attention torch\.bfloat16"):
        RxTAlpha.from_components(model.decoder, model.encoder, half)
    halves = {name: CLASSES[name].from_pretrained(folders[name]).bfloat16() for name in CLASSES}
    assert RxTAlpha.from_components(**halves).encoder.embedding.weight.dtype == torch.bfloat16


def test_two_embeddings_need_a_choice(model: RxTAlpha, make_model: ModelBuilder) -> None:
    """Catches a component that silently loses the embedding that it was trained with."""
    other = make_model(seed=5, memory_variant="self-interlayer")
    parts = {
        "decoder": other.decoder,
        "encoder": model.encoder,
        "memory_attention": model.memory_attention,
    }
    with pytest.raises(UserError, match=r"share one token embedding.*embedding='encoder'"):
        RxTAlpha.from_components(**parts)
    for name, owner in (("encoder", model), ("decoder", other)):
        built = RxTAlpha.from_components(**parts, embedding=name)  # type: ignore[arg-type]
        assert torch.equal(built.encoder.embedding.weight, owner.encoder.embedding.weight)
        assert torch.equal(built.decoder.head_weight, other.decoder.head_weight)
    with pytest.raises(UserError, match="use equal, encoder, decoder"):
        RxTAlpha.from_components(**parts, embedding="both")  # type: ignore[arg-type]
    tied = RxTDecoder(other.decoder.config.model_copy(update={"tie_embeddings": True}))
    with pytest.raises(UserError, match="would replace the decoder's output layer"):
        RxTAlpha.from_components(**{**parts, "decoder": tied}, embedding="encoder")


def test_equal_shapes_are_not_enough(
    model: RxTAlpha, make_model: ModelBuilder, tmp_path: Path
) -> None:
    """Catches weights of attention with other heads, which have the same shapes and compute
    something else; settings that only training reads do not matter."""
    fields = {"self_att_type": "mha", "memory_variant": "self-interlayer"}
    target = make_model(seed=1, **fields)
    other = make_model(seed=3, att_heads=4, **fields)
    before = target.fingerprint()
    with pytest.raises(UserError, match=r"decoder\.att_heads=4, this model's is 2"):
        target.load_pretrained_weights(decoder=other.decoder)
    with pytest.raises(UserError, match=r"memory_attention\.att_heads=4"):
        target.load_pretrained_weights(memory_attention=other.memory_attention)
    assert target.fingerprint() == before
    trained = make_model(seed=3, ff_dropout=0.1, **fields)
    trained.decoder.save_pretrained(tmp_path / "decoder")
    target.load_pretrained_weights(decoder=tmp_path / "decoder")
    assert torch.equal(target.decoder.head_weight, trained.decoder.head_weight)
    assert torch.equal(target.encoder.embedding.weight, trained.encoder.embedding.weight)
    bigger = make_model(seed=4, stm_size=9, **fields)
    target.load_pretrained_weights(encoder=bigger.encoder)  # Encoders know no slots.
    with pytest.raises(UserError, match=r"slot_identity: shape"):
        target.load_pretrained_weights(memory_attention=bigger.memory_attention.state_dict())
    with pytest.raises(UserError, match="memory_attention was given an RxTEncoder"):
        target.load_pretrained_weights(memory_attention=bigger.encoder)
