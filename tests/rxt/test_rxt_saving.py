"""Model folders: bit-exact round trips, strictness, and finding the model that a path means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rxlm
from rxlm.errors import RunError, UserError
from rxlm.rxt.models import RxTAlpha
from rxlm.rxt.saving import read_model_config
from rxlm.storage.model_folder import resolve_model_dir
from rxlm.storage.weights import weights_fingerprint
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

ModelBuilder = Callable[..., RxTAlpha]


@pytest.fixture(scope="module")
def model(make_model: ModelBuilder) -> RxTAlpha:
    return make_model(eos_bias=4.0)


@pytest.fixture
def folder(model: RxTAlpha, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


# Round trips.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_model_is_the_saved_one(
    make_model: ModelBuilder, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Catches weights that are rounded, left at their initial values, or of another type."""
    experts = {"use_moe": True, "num_experts": 3, "moe_balance": "bias"}
    around = {"stateless_layers_config": ["dense"], "final_stateless_layers_config": ["moe"]}
    model = make_model(eos_bias=4.0, **experts, **around).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
    assert loaded.config == model.config and not loaded.training
    assert loaded.fingerprint() == model.fingerprint()
    query = model.tokenize_query("Hello")
    assert list(loaded.interact(**query, seed=1)) == list(model.interact(**query, seed=1))


def test_shared_weights_are_stored_once_and_shared_again(folder: Path, model: RxTAlpha) -> None:
    """Catches an embedding that is written twice, or that two components own after loading."""
    names = load_file(folder / "model.safetensors").keys()
    assert [name for name in names if "embedding" in name] == ["encoder.embedding.weight"]
    loaded = RxTAlpha.from_pretrained(folder)
    assert loaded.decoder.embedding.weight is loaded.encoder.embedding.weight
    marked = {
        name for name, weight in model.named_parameters() if hasattr(weight, "_no_weight_decay")
    }
    assert marked and marked == {
        name for name, weight in loaded.named_parameters() if hasattr(weight, "_no_weight_decay")
    }, "what the optimizer must not decay was forgotten"


def test_loading_leaves_the_random_generators_alone(folder: Path) -> None:
    """Catches a resumed run that differs because a model was loaded meanwhile."""
    before = torch.get_rng_state()
    RxTAlpha.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_tells_what_it_is(folder: Path, model: RxTAlpha) -> None:
    """Catches a folder without a version, a card with wrong numbers, or a missing tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    assert (config["format_version"], config["rxlm_version"]) == (1, rxlm.__version__)
    assert config["architecture"] == "RxTAlpha"
    assert read_model_config(folder).config == model.config
    total = sum(weight.numel() for weight in model.parameters())
    assert f"| total | {total:,} |" in (folder / "README.md").read_text()
    assert Tokenizer.load(folder).fingerprint == model.require_tokenizer().fingerprint


def test_weights_can_be_loaded_in_place(folder: Path, make_model: ModelBuilder) -> None:
    """Catches parameters that are replaced: the optimizer would go on training the old ones."""
    other = make_model(seed=8)
    parameters = list(other.parameters())
    other.load_weights(folder)
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert weights_fingerprint(other) == weights_fingerprint(RxTAlpha.from_pretrained(folder))
    small = make_model(ff_dim=20)
    before = weights_fingerprint(small)
    with pytest.raises(UserError, match="does not hold this model's weights"):
        small.load_weights(folder)
    assert weights_fingerprint(small) == before


def test_a_model_without_tokenizer_can_be_saved(make_model: ModelBuilder, tmp_path: Path) -> None:
    """Catches a tokenizer that is required where none is needed."""
    model = make_model()
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert RxTAlpha.from_pretrained(tmp_path).tokenizer is None


# Strictness.


def test_nothing_is_overwritten_unasked(
    folder: Path, model: RxTAlpha, make_model: ModelBuilder
) -> None:
    """Catches a trained model lost to a second save."""
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    other = make_model(seed=8)
    with pytest.raises(UserError, match="overwrite=True"):
        other.save_pretrained(folder)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    with pytest.raises(UserError, match="is a file"):
        other.save_pretrained(folder / "config.json")
    (folder / "notes.txt").write_text("mine")
    other.save_pretrained(folder, overwrite=True)
    assert RxTAlpha.from_pretrained(folder).fingerprint() == other.fingerprint()
    assert (folder / "notes.txt").read_text() == "mine"


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weight": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("decoder.head_bias")),
        "decoder.head_bias: missing",
    ),
    "unknown weight": (
        lambda folder: edit_weights(folder, lambda weights: weights.update(extra=torch.ones(1))),
        "extra: unknown to this model",
    ),
    "other shape": (
        lambda folder: edit_weights(
            folder, lambda weights: weights.update({"decoder.head_bias": torch.ones(3)})
        ),
        r"decoder.head_bias: shape \[3\], this model's is \[300\]",
    ),
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-10]
        ),
        "cannot be read.*damaged",
    ),
    "other config": (
        lambda folder: edit_config(folder, lambda values: values["decoder"].update(ff_dim=20)),
        "feed_forward",
    ),
    "no model config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "does not describe a model of rxlm",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "newer format": (
        lambda folder: edit_config(folder, lambda values: values.update(format_version=9)),
        "format_version=9",
    ),
    "unknown field": (
        lambda folder: edit_config(folder, lambda values: values["decoder"].update(embed_din=1)),
        "did you mean 'embed_dim'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(folder: Path, damage: str) -> None:
    """Catches a model that talks with partly random weights."""
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        RxTAlpha.from_pretrained(folder)


def test_lenient_loading_says_what_it_left_out(
    folder: Path, model: RxTAlpha, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches strict=False hiding what is missing, or accepting another shape."""
    edit_weights(folder, lambda weights: weights.pop("decoder.head_bias"))
    loaded = RxTAlpha.from_pretrained(folder, strict=False)
    assert "decoder.head_bias: missing" in caplog.text
    assert torch.equal(loaded.decoder.head_weight, model.decoder.head_weight)
    edit_weights(folder, lambda weights: weights.update({"decoder.head_bias": torch.ones(3)}))
    with pytest.raises(UserError, match="shape"):
        RxTAlpha.from_pretrained(folder, strict=False)


def test_a_tokenizer_of_another_size_is_refused(folder: Path) -> None:
    """Catches a folder whose tokenizer was replaced by another model's."""
    tokenizer = train_tokenizer(["a few other words"] * 4, TokenizerTraining(vocab_size=270))
    tokenizer.save(folder, overwrite=True)
    with pytest.raises(UserError) as error:
        RxTAlpha.from_pretrained(folder)
    assert f"vocab_size={tokenizer.vocab_size}" in str(error.value)
    assert "vocab_size=300" in str(error.value)


def test_a_full_disk_is_a_failed_run(
    folder: Path, model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, a leftover file, or a model lost to a save that did not fit."""
    before = {item.name: item.read_bytes() for item in folder.iterdir()}

    def full(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rxlm.storage.files.save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        model.save_pretrained(folder, overwrite=True)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before


# Which model a path means.


def make_checkpoint(
    run: Path, step: int, score: float | None = None, *, mode: str = "min", metric: str = "loss"
) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    (folder / "train").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    scored = None if score is None else {"metric": metric, "mode": mode, "value": score}
    (folder / "COMPLETE").write_text(json.dumps({"step": step, "score": scored}))
    return folder


def test_a_model_and_a_checkpoint_are_themselves(folder: Path, tmp_path: Path) -> None:
    """Catches a plain folder that is searched for runs."""
    assert resolve_model_dir(folder) == folder
    checkpoint = make_checkpoint(tmp_path / "run", 5)
    assert resolve_model_dir(checkpoint) == checkpoint
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(UserError, match="unfinished checkpoint"):
        resolve_model_dir(checkpoint)


def test_a_run_means_its_best_checkpoint(tmp_path: Path) -> None:
    """Catches the newest being taken for the best, 'max' read as 'min', or mixed-up metrics."""
    make_checkpoint(tmp_path / "a", 10, 2.0)
    best = make_checkpoint(tmp_path / "a", 20, 1.0)
    make_checkpoint(tmp_path / "a", 30, 1.0)
    make_checkpoint(tmp_path / "a", 40)
    assert resolve_model_dir(tmp_path / "a") == resolve_model_dir(tmp_path / "a/checkpoints")
    assert resolve_model_dir(tmp_path / "a") == best
    highest = make_checkpoint(tmp_path / "b", 10, 0.9, mode="max")
    make_checkpoint(tmp_path / "b", 20, 0.5, mode="max")
    assert resolve_model_dir(tmp_path / "b") == highest
    make_checkpoint(tmp_path / "c", 10, 0.1, metric="other")
    newer = make_checkpoint(tmp_path / "c", 20, 5.0)
    assert resolve_model_dir(tmp_path / "c") == newer


def test_a_run_without_scores_means_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    """Catches an interrupted save being loaded, and step 900 sorting after step 1000."""
    make_checkpoint(tmp_path, 900)
    newest = make_checkpoint(tmp_path, 1_000_000)
    (make_checkpoint(tmp_path, 2_000_000) / "COMPLETE").unlink()
    assert resolve_model_dir(tmp_path) == newest


def test_a_pipeline_means_its_last_stage_with_a_model(tmp_path: Path) -> None:
    """Catches stage 10 sorting before stage 9, and a stage that has not saved anything yet."""
    make_checkpoint(tmp_path / "9-sft", 5)
    last = make_checkpoint(tmp_path / "10-memory", 5)
    (tmp_path / "11-later" / "checkpoints").mkdir(parents=True)
    (tmp_path / "report").mkdir()
    assert resolve_model_dir(tmp_path) == last


def test_a_path_without_model_says_what_is_there(tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError for a mistyped or empty path."""
    with pytest.raises(UserError, match="does not exist"):
        resolve_model_dir(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"not a model folder.*notes\.txt"):
        resolve_model_dir(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        rxlm.load(tmp_path / "notes.txt")
    (make_checkpoint(tmp_path / "run", 3) / "COMPLETE").write_text("{")
    with pytest.raises(UserError, match="COMPLETE is damaged"):
        resolve_model_dir(tmp_path / "run")


def test_load_is_the_short_way(folder: Path, model: RxTAlpha) -> None:
    """Catches rxlm.load() not finding what resolve_model_dir() finds."""
    assert rxlm.load(folder).fingerprint() == model.fingerprint()


# Fingerprints.


def test_the_fingerprint_follows_the_weights(make_model: ModelBuilder, folder: Path) -> None:
    """Catches a remembered hash that is returned after the weights have changed."""
    model = make_model()
    seen = [weights_fingerprint(model)]
    assert weights_fingerprint(model) == seen[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.decoder.logits(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    seen.append(weights_fingerprint(model))
    model.load_state_dict(make_model(seed=9).state_dict())
    seen.append(weights_fingerprint(model))
    model.load_weights(folder)
    seen.append(weights_fingerprint(model))
    model.to(torch.bfloat16)
    seen.append(weights_fingerprint(model))
    assert len(set(seen)) == len(seen)
    assert weights_fingerprint(make_model()) == seen[0]
