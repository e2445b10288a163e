"""Model cards: their YAML against the Hub's own reader, and whose README.md may be replaced."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rxlm.errors import UserError
from rxlm.lm import LanguageModel
from rxlm.lm.config import LMConfig
from rxlm.rxt.model_card import model_card, write_model_card
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.model_card import is_untouched, sealed, write_card

METRICS = {'recall: told 8 turns ago | "exact"': 0.97, "perplexity #1": 3}


def test_the_hub_reads_the_card(model: RxTAlpha) -> None:
    """Catches YAML that is not valid, for example an unquoted colon in the name of a metric, and
    results where the Hub does not find them."""
    card = ModelCard(model_card(model, METRICS, measured_on="dialogues: test"))
    assert card.data.library_name == "rxlm"
    assert card.data.pipeline_tag == "text-generation"
    assert "memory" in card.data.tags
    results = {item.metric_name: item.metric_value for item in card.data.eval_results}
    assert results == METRICS
    assert {item.dataset_name for item in card.data.eval_results} == {"dialogues: test"}
    assert ModelCard(model_card(model)).data.eval_results is None


def test_the_card_says_what_the_model_is(model: RxTAlpha) -> None:
    """Catches a card with the sizes of another model, or without what was measured."""
    text = model_card(model, {"recall": 0.971234567}, sections={"Recall": "| a |\n|---|\n| b |"})
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| total | {total:,} |" in text
    assert "memory 3 slots a layer (`simple`)" in text and "turns of up to 32 tokens" in text
    assert "| recall | 0.971235 |" in text
    assert "## Recall\n\n| a |\n|---|\n| b |" in text
    for part in (model.decoder, model.encoder, model.memory_attention):
        size = sum(parameter.numel() for parameter in part.parameters())
        assert size  # Shared parameters count once, so only the total can be compared.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many", None])
def test_a_metric_is_a_finite_number(model: RxTAlpha, value: float) -> None:
    """Catches NaN, which is no JSON and which the Hub refuses after the upload."""
    with pytest.raises(UserError, match="metric 'loss'"):
        model_card(model, {"loss": value})


def test_a_readme_of_somebody_is_kept(
    model: RxTAlpha, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a README that a person wrote or edited being lost, with overwrite=True, too."""
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n")
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert readme.read_text() == "# Mine\n" and "kept" in caplog.text
    model.save_pretrained(tmp_path, overwrite=True, metrics={"recall": 1.0})
    assert readme.read_text() == "# Mine\n"
    assert not write_model_card(model, tmp_path)
    assert write_model_card(model, tmp_path, overwrite=True)
    assert is_untouched(readme.read_text())
    readme.write_text(readme.read_text().replace("vocabulary", "Vocabulary"))
    assert not write_model_card(model, tmp_path, {"recall": 1.0})
    assert "recall" not in readme.read_text()


def test_our_own_card_is_renewed(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches a card that goes on describing the model that was there before."""
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True, metrics={"recall": 0.25})
    assert "| recall | 0.25 |" in (tmp_path / "README.md").read_text()
    before = (tmp_path / "README.md").stat()
    assert write_model_card(model, tmp_path, {"recall": 0.25})
    after = (tmp_path / "README.md").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_seals() -> None:
    """Catches a seal that any text, or a changed one, passes."""
    card = sealed("# A model\n\ntext\n\n\n")
    assert is_untouched(card)
    for other in ("# A model\n", card.replace("text", "test"), card + "more\n", ""):
        assert not is_untouched(other)
    assert is_untouched(sealed(""))


def test_language_models_have_one_too(tmp_path: Path) -> None:
    """Catches the other architecture left with a head that is not YAML."""
    config = LMConfig(vocab_size=8, dim=8, depth=1, num_heads=2, max_seq_len=8)
    LanguageModel(config).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "rxlm" and "language-model" in card.data.tags
    assert write_card(tmp_path, "another")
    assert (tmp_path / "README.md").read_text().startswith("another")
