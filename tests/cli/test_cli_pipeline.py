"""``rxlm pipeline run``: end to end, again, interrupted, and with input that cannot be used."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rxlm.cli.main import main
from rxlm.storage.model_card import is_untouched
from rxlm.training.objectives.sft import SFTObjective
from rxlm.training.run_folder import read_status

STAGES = ["10_tokenizer", "20_joint_lm", "30_sft", "40_memory_pretraining", "50_memory_aware"]


def run(nano: Path, out: Path, *words: str) -> int:
    """Run the pipeline; return the exit status."""
    return main(["pipeline", "run", str(nano), *words, "--out", str(out)])


def weights(out: Path) -> dict[str, bytes]:
    """Return the final weights of the last stage, bit by bit (a file's header has no order)."""
    (file,) = out.glob("50_memory_aware/checkpoints/step-000002/model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def test_all_stages_and_the_report_are_there(micro_pipeline: Path) -> None:
    """Catches a stage that does not hand over to the next, and a report that lacks a part."""
    for stage in STAGES:
        status = read_status(micro_pipeline / stage)
        assert status is not None
        assert status.status == "complete", stage
    report = json.loads((micro_pipeline / "report.json").read_text(encoding="utf-8"))
    assert report["recall"]["rows"]
    conditions = {row["condition"] for row in report["perplexity"][0]["rows"]}
    assert {"memory", "zeroed", "swapped"} <= conditions
    assert list(report["training"]) == STAGES[1:]
    assert (micro_pipeline / "report.md").is_file()
    assert "<html" in (micro_pipeline / "report.html").read_text(encoding="utf-8")
    assert list((micro_pipeline / "figures").glob("*.png"))


def test_the_card_of_the_model_has_the_results(micro_pipeline: Path) -> None:
    """Catches a final model whose card does not tell what was measured of it."""
    report = json.loads((micro_pipeline / "report.json").read_text(encoding="utf-8"))
    (readme,) = micro_pipeline.glob("50_memory_aware/checkpoints/step-000002/README.md")
    text = readme.read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    shown = {
        item["name"]: item["value"] for item in head["model-index"][0]["results"][0]["metrics"]
    }
    for figure in report["recall"]["summary"]:
        assert shown[figure["label"]] == figure["value"]
    assert any(name.startswith("answer perplexity") for name in shown)
    assert "## Memory test" in text and "## Recall by distance" in text
    assert is_untouched(text)


def test_second_run_skips_everything(
    nano: Path,
    micro_pipeline: Path,
    micro_overrides: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches training again, or measuring again, what is finished."""
    before = {path: path.stat().st_mtime_ns for path in micro_pipeline.rglob("*") if path.is_file()}
    assert run(nano, micro_pipeline, *micro_overrides) == 0
    after = {path: path.stat().st_mtime_ns for path in micro_pipeline.rglob("*") if path.is_file()}
    assert after == before
    captured = capsys.readouterr()
    assert captured.err.count("finished before") == len(STAGES)
    assert "Memory test" in captured.out


def test_stopped_by_sigterm_it_resumes_to_the_same_weights(
    nano: Path,
    tmp_path: Path,
    micro_pipeline: Path,
    micro_overrides: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a wrong exit status, a lost step, and a resumed pipeline that ends elsewhere."""
    out = tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(SFTObjective, "after_step", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert run(nano, out, *micro_overrides, "--no-eval") == 128 + signal.SIGTERM
    error_text = capsys.readouterr().err
    assert "stopped in 30_sft" in error_text
    assert f"To go on: rxlm pipeline run {nano}" in error_text
    assert not (out / "40_memory_pretraining").exists()
    status = read_status(out / "30_sft")
    assert status is not None
    assert (status.status, status.step) == ("interrupted", 1)

    assert run(nano, out, *micro_overrides, "--no-eval") == 0
    assert "30_sft: resuming" in capsys.readouterr().err
    assert weights(out) == weights(micro_pipeline)
    assert not (out / "report.json").exists()


def test_stop_after_leaves_out_the_rest(
    nano: Path, tmp_path: Path, micro_overrides: tuple[str, ...]
) -> None:
    """Catches a later stage that runs, and a stage name that is not understood without number."""
    assert run(nano, tmp_path / "runs", *micro_overrides, "--stop-after", "tokenizer") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["10_tokenizer"]


def test_changed_recipe_of_a_finished_stage_is_refused_then_redone(
    nano: Path,
    tmp_path: Path,
    micro_pipeline: Path,
    micro_overrides: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a pipeline that mixes the results of two recipes without saying so."""
    out = tmp_path / "runs"
    shutil.copytree(micro_pipeline, out)
    changed = (*micro_overrides, "memory_pretraining.train.lr=0.5")
    assert run(nano, out, *changed) == 2
    error_text = capsys.readouterr().err
    assert "40_memory_pretraining: train.lr: 0.001 -> 0.5" in error_text
    assert "--redo 40_memory_pretraining" in error_text
    assert weights(out) == weights(micro_pipeline)

    assert run(nano, out, *changed, "--redo", "memory_pretraining", "--no-eval") == 0
    error_text = capsys.readouterr().err
    assert "30_sft: finished before" in error_text
    assert "50_memory_aware: running" in error_text
    assert weights(out) != weights(micro_pipeline)


def test_what_does_not_change_the_result_may_change(
    nano: Path, micro_pipeline: Path, micro_overrides: tuple[str, ...]
) -> None:
    """Catches a finished pipeline that has to be trained again for another log interval."""
    words = (*micro_overrides, "train.log_every=7", "evaluation.perplexity.batch_size=3")
    assert run(nano, micro_pipeline, *words, "--no-eval") == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stepz=3", "TrainSettings has no field 'stepz': did you mean 'steps'?"),
        ("sfd.train.steps=3", "no section or stage is called 'sfd': did you mean 'sft'?"),
        ("joint_lm.train.steps=many", "train.steps: Input should be a valid integer"),
        ("joint_lm.init_from=previous", "the recipe before it trains no model"),
    ],
)
def test_bad_override_is_status_2_before_anything_is_written(
    nano: Path, tmp_path: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an error that is found only after the earlier stages were trained."""
    status = run(nano, tmp_path / "runs", word)
    error_text = capsys.readouterr().err
    assert status == 2
    assert message in error_text
    assert not (tmp_path / "runs").exists()


def test_folder_without_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an empty pipeline that reports success."""
    assert run(tmp_path, tmp_path / "runs") == 2
    assert "holds no numbered recipe" in capsys.readouterr().err


def test_real_dialogues_train_and_are_measured(
    nano: Path, tmp_path: Path, data_dir: Path, micro_overrides: tuple[str, ...]
) -> None:
    """Catches a stage that needs what only the built-in dialogues have (questions, facts)."""
    file = data_dir / "dialogues" / "camrest676.train.jsonl.gz"
    words = (*micro_overrides, f"data.dialogues={file}", "model.decoder.seq_len=256")
    assert run(nano, tmp_path / "runs", *words) == 0
    report = json.loads((tmp_path / "runs" / "report.json").read_text(encoding="utf-8"))
    assert report["recall"] is None
    assert {row["condition"] for row in report["perplexity"][0]["rows"]} >= {"memory", "swapped"}
