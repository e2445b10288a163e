"""``rxlm train``: one stage, its inputs, its dry run, and input that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.model_folder import resolve_model_dir
from rxlm.training.objectives.joint_lm import JointLMObjective

OVERRIDES = (
    "train.steps=3",
    "train.tensorboard=false",
    "model.decoder.embed_dim=16",
    "model.decoder.ff_dim=16",
    "model.decoder.stm_size=4",
    "objective.validation_dialogues=2",
    "objective.dialogues=2",
)
GOOD = '{"id": "1", "interactions": [{"query": "Hi!", "answer": "Hello!"}]}'


@pytest.fixture
def runs(tmp_path: Path, micro_pipeline: Path) -> Path:
    """Run folders in which only the tokenizer is trained."""
    shutil.copytree(micro_pipeline / "10_tokenizer", tmp_path / "runs" / "10_tokenizer")
    return tmp_path / "runs"


def train(nano: Path, runs: Path, stage: str, *words: str) -> int:
    """Run ``rxlm train`` on a nano recipe; return the exit status."""
    return main(["train", str(nano / f"{stage}.yaml"), *words, "--out", str(runs / stage)])


def test_stage_after_stage(nano: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a stage that does not find what the stage before it made."""
    assert train(nano, runs, "20_joint_lm", *OVERRIDES) == 0
    assert "complete" in capsys.readouterr().out
    assert train(nano, runs, "30_sft", *OVERRIDES) == 0
    inputs = json.loads((runs / "30_sft" / "inputs.json").read_text(encoding="utf-8"))
    assert inputs["init_from"]["run"] == "20_joint_lm"
    assert inputs["init_from"]["checkpoint"] == "step-000003"


def test_missing_stage_before_it_names_the_remedy(
    nano: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or new weights, where the previous stage was never trained."""
    assert train(nano, runs, "30_sft", *OVERRIDES) == 2
    error_text = capsys.readouterr().err
    assert f"rxlm train {nano / '20_joint_lm.yaml'} --out {runs / '20_joint_lm'}" in error_text
    assert not (runs / "30_sft").exists()


def test_interrupted_run_says_how_to_go_on(
    nano: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Ctrl-C that loses the run or exits as if it had succeeded."""
    with monkeypatch.context() as patch:
        patch.setattr(JointLMObjective, "after_step", lambda *_: signal.raise_signal(signal.SIGINT))
        assert train(nano, runs, "20_joint_lm", *OVERRIDES) == 130
    assert "To go on: rxlm train" in capsys.readouterr().err
    assert train(nano, runs, "20_joint_lm", *OVERRIDES) == 0
    lines = (runs / "20_joint_lm" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == 3


def test_dry_run_writes_nothing(nano: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a dry run that trains, and one that does not say what training takes."""
    assert train(nano, runs, "20_joint_lm", *OVERRIDES, "--dry-run") == 0
    out = capsys.readouterr().out
    assert not (runs / "20_joint_lm").exists()
    for word in ("parameters", "encoder", "tokens a step", "while training", "steps: 3"):
        assert word in out
    assert "vocab_size" not in out.split("model:")[1].split("init_from:")[0]


def test_dry_run_finds_what_is_not_there(
    nano: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that passes where training would end at once: a logger that is not
    installed, DeepSpeed that is not, and a file of DeepSpeed that is missing."""
    zero = ("train.strategy=deepspeed", "train.deepspeed=nowhere.json")
    missing = {"wandb", "deepspeed"}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    for words, message in (
        (("train.loggers=[wandb]",), "train.loggers asks for wandb, which is not installed"),
        (zero, "strategy=deepspeed: the package is not installed"),
    ):
        assert train(nano, runs, "20_joint_lm", *OVERRIDES, *words, "--dry-run") == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("rxlm.training.distributed.zero.require_deepspeed", lambda: None)
    assert train(nano, runs, "20_joint_lm", *OVERRIDES, *zero, "--dry-run") == 2
    assert "deepspeed=nowhere.json: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file holds no row"),
        (f"{GOOD}\nnot json\n", "bad.jsonl:2: not JSON"),
        (f'{GOOD}\n{{"interactions": []}}\n', "bad.jsonl:2: field 'interactions'"),
        (
            '{"interactions": [{"query": "Hi!", "anwser": "x"}]}\n',
            "bad.jsonl:1: field 'interactions[0].answer'",
        ),
        (f"{GOOD}\n", "holds one conversation"),
    ],
)
def test_bad_data_is_status_2_and_leaves_no_run(
    nano: Path,
    runs: Path,
    tmp_path: Path,
    content: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a run folder, or a traceback, from data that cannot be used."""
    file = tmp_path / "bad.jsonl"
    file.write_text(content, encoding="utf-8")
    for extra in ((), ("--dry-run",)):
        words = (*OVERRIDES, f"data.dialogues={file}", *extra)
        assert train(nano, runs, "20_joint_lm", *words) == 2
        assert message in capsys.readouterr().err
    assert not (runs / "20_joint_lm").exists()


def test_vocabulary_that_is_not_the_tokenizers(
    nano: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a model with ids that its tokenizer does not have, or lacks."""
    assert train(nano, runs, "20_joint_lm", *OVERRIDES, "model.decoder.vocab_size=500") == 2
    error_text = capsys.readouterr().err
    assert "model.decoder.vocab_size=500, but the tokenizer has 400 ids" in error_text


def test_model_that_is_not_that_of_the_weights(
    nano: Path, micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches weights of one architecture read into another."""
    words = (*OVERRIDES, f"init_from={micro_pipeline / '20_joint_lm'}", "model.decoder.stm_size=5")
    assert train(nano, tmp_path, "30_sft", *words) == 2
    error_text = capsys.readouterr().err
    assert "decoder.stm_size: 4 -> 5" in error_text
    assert "the recipe's model is not that of" in error_text


def test_a_stage_may_close_the_gates_of_the_one_before(
    nano: Path, micro_pipeline: Path, tmp_path: Path
) -> None:
    """Catches a stretch of the gates that is refused as another model, or not written with it."""
    sizes = [word for word in OVERRIDES if "objective.dialogues" not in word]
    words = (
        *sizes, f"init_from={micro_pipeline / '40_memory_pretraining'}",
        "objective.phases=[{turns: 2, dialogues: 2}]",
        "model.memory_attention.residual_gate_stretch=0.02",
    )  # fmt: skip
    assert train(nano, tmp_path, "50_memory_aware", *words) == 0
    model = RxTAlpha.from_pretrained(resolve_model_dir(tmp_path / "50_memory_aware"))
    assert model.memory_attention.settings.gate.stretch == 0.02


def test_a_run_is_not_resumed_with_another_model(
    nano: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a resumed run that begins anew, or fails without saying what has changed."""
    assert train(nano, runs, "20_joint_lm", *OVERRIDES) == 0
    config = (runs / "20_joint_lm" / "config.yaml").read_text(encoding="utf-8")
    words = (*OVERRIDES, "train.steps=5", "model.decoder.ff_dim=24")
    assert train(nano, runs, "20_joint_lm", *words) == 2
    error_text = capsys.readouterr().err
    assert "decoder.ff_dim: 16 -> 24" in error_text
    assert "train into another folder" in error_text
    assert (runs / "20_joint_lm" / "config.yaml").read_text(encoding="utf-8") == config
    assert train(nano, runs, "20_joint_lm", *OVERRIDES, "train.steps=5") == 0


def test_text_is_read_by_joint_lm(
    nano: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches data.text being accepted and then ignored."""
    file = tmp_path / "my.txt"
    file.write_text("\n\n".join(f"Document {n} about cats." for n in range(30)), encoding="utf-8")
    words = (*OVERRIDES, f"data.text={file}")
    assert train(nano, runs, "20_joint_lm", *words) == 0
    assert "2 of 30 documents are held out" in capsys.readouterr().err


def test_unknown_stage_and_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a recipe of no stage being reported in pydantic's words."""
    recipe = tmp_path / "my.yaml"
    recipe.write_text("train: {steps: 3}\nstage: joint_ml\n", encoding="utf-8")
    assert main(["train", str(recipe)]) == 2
    assert f"{recipe}:2: stage: 'joint_ml' is unknown" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no such recipe file" in capsys.readouterr().err


def test_previous_needs_a_number(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a copied recipe whose 'previous' silently means something else."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {nano / '30_sft.yaml'}\n", encoding="utf-8")
    shutil.copy(nano / "10_tokenizer.yaml", tmp_path)
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "only numbered recipes" in capsys.readouterr().err
