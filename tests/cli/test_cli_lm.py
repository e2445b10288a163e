"""``rxlm train`` and ``rxlm eval lm`` of a language model, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rxlm.cli.main import main
from rxlm.evaluation import language_model as evaluation
from rxlm.nn.mixers import MIXERS
from rxlm.training.checkpoint import find_latest
from rxlm.training.run_folder import read_status

LM = Path(__file__).parents[2] / "stages" / "lm"
MICRO = (
    "train.steps=2",
    "train.loggers=[]",
    "train.warmup_steps=1",
    "train.validate_every=2",
    "model.dim=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.ff_dim=24",
    "model.max_seq_len=32",
    "objective.batch_size=2",
    "objective.validation_rows=4",
)
TEXT = "\n\n".join(f"Once upon a time number {number} went for a walk." for number in range(40))
FAST = ("rounds=1", "speed_batch=2", "speed_tokens=16", "decode_tokens=4", "state_lengths=[8,64]")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "walks.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A trained tokenizer and a trained model; not to be changed by tests."""
    root = tmp_path_factory.mktemp("lm")
    words = [f"data.text={text_file}", "tokenizer.vocab_size=300", "objective.dialogues=10"]
    tokenizer = ["train", str(LM / "tokenizer.yaml"), *words, "--out", str(root / "tokenizer")]
    assert main(tokenizer) == 0
    assert train(root / "tiny", text_file) == 0
    return root


def train(out: Path, text: Path, *overrides: str, recipe: str = "tiny.yaml") -> int:
    words = [*MICRO, f"data.text={text}", *overrides]
    return main(["train", str(LM / recipe), *words, "--out", str(out)])


@pytest.mark.parametrize("attention", [*MIXERS, "[gla, softmax]"])
def test_swappable_attention(attention: str, runs: Path, text_file: Path) -> None:
    """Catches a mixer that cannot be trained by changing one word of the recipe."""
    name = attention.strip("[]").replace(", ", "-")
    assert train(runs / name, text_file, f"model.attention={attention}") == 0
    status = read_status(runs / name)
    assert status is not None
    assert status.metrics["validation/perplexity"] is not None


def test_seed_cli_trains_with_device_precision_and_project(
    runs: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches options of the seed's two command lines that have no counterpart here."""
    options = ["train.device=cpu", "train.precision=bf16"]
    assert train(runs / "seed", text_file, *options, recipe="base.yaml") == 0
    stored = yaml.safe_load((runs / "seed" / "config.yaml").read_text())
    assert (stored["train"]["device"], stored["train"]["precision"]) == ("cpu", "bf16")
    capsys.readouterr()
    assert train(runs / "none", text_file, "train.devise=cpu") == 2
    assert "did you mean 'device'" in capsys.readouterr().err
    assert train(runs / "none", text_file, "model.atention=gla") == 2
    assert "did you mean 'attention'" in capsys.readouterr().err
    assert train(runs / "none", text_file, "model.decoder={}") == 2
    assert "decoder" in capsys.readouterr().err
    assert not (runs / "none").exists()


def test_finetune_begins_with_the_weights(
    runs: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches fine-tuning that begins with new weights, or with those of another architecture."""
    words = [f"init_from={runs / 'tiny'}", "train.lr=1e-9", "train.validate_every=1"]
    assert train(tmp_path / "tuned", text_file, *words) == 0
    before, after = (read_status(path) for path in (runs / "tiny", tmp_path / "tuned"))
    assert before is not None
    assert after is not None
    expected = before.metrics["validation/loss"]
    assert after.metrics["validation/loss"] == pytest.approx(expected, rel=1e-5)
    capsys.readouterr()
    assert train(tmp_path / "other", text_file, *words, "model.num_heads=4") == 2
    assert "num_heads: 2 -> 4" in capsys.readouterr().err


def test_eval_table_names_all_that_the_seed_promised(
    runs: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a table without one of the figures, or without what they were measured on."""
    file = tmp_path / "lm.json"
    words = ["eval", "lm", str(runs / "tiny"), "--data", str(text_file), "--json", str(file)]
    assert main([*words, *FAST]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for expected in (
        "perplexity",
        "bits per byte",
        "decode state",
        "training",
        "prefill",
        "decoding, 1 sequence",
        "tokens/s",
        "CPU threads",
        "sha256",
    ):
        assert expected in printed
    result = json.loads(file.read_text())
    assert result["data"]["documents"] == 40
    assert result["data"]["bytes"] == len(TEXT.encode()) - 2 * 39
    quality = result["quality"]
    bits = quality["loss"] * quality["tokens"] / result["data"]["bytes"] / 0.6931471805599453
    assert quality["bits_per_byte"] == pytest.approx(bits)
    state = result["memory"]["state"]
    assert state["8"] == state["64"], "the state of a recurrence does not grow"
    assert all(rate["median"] > 0 for rate in result["speed"]["tokens_per_second"].values())


def test_eval_table_is_refused_when_decoding_is_wrong(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches figures printed for a model whose decode state is not that of the sequence."""
    latest = find_latest(runs / "tiny")
    assert latest is not None
    forward = evaluation.LanguageModel.forward

    def forgetful(self, ids, key_mask=None, cache=None):
        return forward(self, ids, key_mask, None)

    monkeypatch.setattr(evaluation.LanguageModel, "forward", forgetful)
    tolerances = dict.fromkeys(evaluation.GATE_TOLERANCES, (1e-6, 0.0))
    monkeypatch.setattr(evaluation, "GATE_TOLERANCES", tolerances)
    assert main(["eval", "lm", str(latest), *FAST]) == 1
    message = capsys.readouterr()
    assert "differs from the full forward" in message.err
    assert "perplexity" not in message.out


def test_eval_perplexity_says_what_to_use(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback for a model without a memory."""
    assert main(["eval", "perplexity", str(runs / "tiny"), "max_dialogues=2"]) == 2
    assert "rxlm eval lm" in capsys.readouterr().err


def test_tokenizer_of_a_recipe_that_has_not_run(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a missing tokenizer that is reported without the command that makes it."""
    assert train(tmp_path / "tiny", text_file) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Train it first: rxlm train" in error
    assert "tokenizer.yaml" in error
