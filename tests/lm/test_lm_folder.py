"""Language models as folders: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rxlm
from rxlm.errors import UserError
from rxlm.lm import LanguageModel
from rxlm.tokenization import Tokenizer

CONFIG = {"dim": 16, "depth": 2, "num_heads": 2, "attention": ["gla", "softmax"], "ff_dim": 24}


@pytest.fixture
def model(lm_tokenizer: Tokenizer) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG | {"vocab_size": lm_tokenizer.vocab_size}, lm_tokenizer).eval()


def test_saved_model_is_loaded(model: LanguageModel, tmp_path: Path) -> None:
    """Catches a field, a weight or the tokenizer that does not survive the disk."""
    model.save_pretrained(tmp_path / "m")
    state = torch.random.get_rng_state()
    loaded = LanguageModel.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert loaded.head.weight is loaded.embedding.weight
    sampling = {"max_new_tokens": 5, "temperature": 0.8, "seed": 3}
    assert loaded.complete(["Hi", ""], **sampling) == model.complete(["Hi", ""], **sampling)
    assert loaded.complete("Hi", **sampling) == model.complete(["Hi", ""], **sampling)[0]
    with pytest.raises(UserError, match="already holds"):
        model.save_pretrained(tmp_path / "m")


def test_other_models_and_damage_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    """Catches a language model taken for a Reactive Transformer, and one that lacks weights."""
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"language model without a memory.*rxlm eval lm"):
        rxlm.load(folder)
    deeper = (folder / "config.json").read_text().replace('"depth": 2', '"depth": 3')
    (folder / "config.json").write_text(deeper)
    with pytest.raises(UserError, match=r"layers\.2\..*missing"):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text('{"architecture": "RxTAlpha", "decoder": {}}')
    with pytest.raises(UserError, match=r"describes RxTAlpha.*rxlm\.load"):
        LanguageModel.from_pretrained(folder)
    with pytest.raises(UserError, match="vocab_size"):
        LanguageModel(CONFIG | {"vocab_size": 7}, model.tokenizer)
