"""The command line of the study: one command, every file, resuming, comparing, exit statuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rxlm.cli.main import main
from rxlm.cli.study_options import parse_lengths, parse_number, parse_share
from rxlm.errors import UserError
from rxlm.study.checking import check_speedscope, check_study
from rxlm.study.profiling import speedscope_of
from rxlm.study.report import StudyReport
from rxlm.study.results import FIRST_COLUMNS, ResultStore

ROOT = Path(__file__).resolve().parents[2]


def test_one_command_writes_every_file(
    smoke: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Catches a promised file that is missing, empty or broken, and a check that misses that."""
    assert main(["study", "check", str(smoke)]) == 0, capsys.readouterr()
    names = {item.file for item in check_study(smoke)}
    assert {f"results/{name}.csv" for name in FIRST_COLUMNS} <= names
    assert {"report.html", "tb", "profiler_results/profile_summary.csv"} <= names
    assert {f"profiler_results/elu{end}" for end in
            ("_trace.json", "_stacks.txt", ".speedscope.json", "_table.txt")} <= names  # fmt: skip
    broken = tmp_path / "broken"
    shutil.copytree(smoke, broken)
    (broken / "profiler_results" / "elu_stacks.txt").write_text("")
    (broken / "results" / "assoc.csv").unlink()
    (broken / "report.html").write_text('<table><img src="https://example.org/x.png">')
    assert main(["study", "check", str(broken)]) == 1
    message = capsys.readouterr().err
    assert "elu_stacks.txt is empty" in message
    assert "assoc.csv is missing" in message
    assert "from outside" in message


def test_outputs_have_the_playbooks_columns(smoke: Path) -> None:
    """Catches a table that the playbook's readers cannot read."""
    for name, columns in FIRST_COLUMNS.items():
        with (smoke / "results" / f"{name}.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert reader.fieldnames is not None
        assert tuple(reader.fieldnames[: len(columns)]) == columns
        assert {row["attention"] for row in rows} == {"softmax", "elu", "gated_deltanet"}
    efficiency = StudyReport(smoke).store.rows("efficiency")
    for row in efficiency:
        assert row["ci_low_ms"] <= row["step_time_ms"] <= row["ci_high_ms"]
        assert len(row["samples"]) == row["n"] >= 3
        assert {"backend_requested", "backend", "backend_version", "backend_reason"} <= set(row)


def test_a_second_run_measures_nothing(smoke: Path, tmp_path: Path) -> None:
    """Catches a resumed study that begins again, and half a line that breaks it."""
    folder = tmp_path / "again"
    shutil.copytree(smoke, folder)
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])
    (folder / "results.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert main(["study", "run", "--preset", "smoke", "--out", str(folder)]) == 0
    again = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert again[: len(lines) - 1] == lines[:-1]
    assert len(again) == len(lines)
    # It was trained to its end in the folder of the run: what is measured anew is the same.
    found = json.loads(again[-1])
    assert (found["key"], found.get("final_loss")) == (last["key"], last.get("final_loss"))


def test_perplexity_summary_equals_a_fresh_evaluation(
    smoke: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a summary of other weights than those that are on disk."""
    from rxlm.study.calibration import build
    from rxlm.study.corpus import open_corpus
    from rxlm.study.manifest import open_settings
    from rxlm.study.objectives import row_losses, text_metrics
    from rxlm.study.runner import Study
    from rxlm.training.checkpoint import find_latest

    assert main(["study", "report", str(smoke), "--section", "ppl"]) == 0
    # Headers of narrow terminals are cut: the title and the rows are there.
    assert "Perplexity" in capsys.readouterr().out
    settings = open_settings(smoke)
    corpus = open_corpus(settings.text)
    study = Study(settings, smoke)
    for job in study.jobs():
        if job.kind != "ppl":
            continue
        network = build(settings, study.plan(job.attention, corpus.vocab_size), seed=99)
        latest = find_latest(Path(job.folder))
        assert latest is not None
        from rxlm.storage.weights import copy_weights

        copy_weights(network, latest / "model.safetensors")
        text = settings.text
        losses, num_bytes = row_losses(network.eval(), corpus, text.seq_len,
                                       text.validation_tokens)  # fmt: skip
        fresh = text_metrics(losses, num_bytes, text.seq_len)
        (row,) = study.store.rows("ppl", attention=job.attention)
        assert fresh["perplexity"] == pytest.approx(row["final_ppl"], rel=1e-6)
        assert fresh["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-6)


def test_pretraining_record_and_gradient_clip_stability(smoke: Path) -> None:
    """Catches a history without validation, gradient norms, clipping or skipped steps."""
    history = json.loads((smoke / "results" / "history.json").read_text())
    pretrained = {name: part for name, part in history.items() if part["what"] == "pretrain"}
    assert {part["attention"] for part in pretrained.values()} == {
        "softmax", "elu", "gated_deltanet",
    }  # fmt: skip
    for part in pretrained.values():
        assert part["val_step"] == [10, 20] and len(part["val_ppl"]) == 2
        assert part["val_ppl"][-1] < part["val_ppl"][0]
        assert all(value > 0 for value in part["grad_norm"])
        assert all(0 <= value <= 1 for value in part["clip_fraction"])
        assert part["skipped_steps"][-1] == 0


def test_claims_have_effects_and_verdicts(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a claim without a test, and a verdict of a fourth kind."""
    assert main(["study", "report", str(smoke), "--section", "claims", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["claims"]
    verdicts = {row[-1] for row in table["rows"]}
    assert verdicts <= {"supported", "not supported", "not testable here"}
    text = " ".join(row[0] for row in table["rows"])
    for word in ("time grows", "trains faster", "decodes faster", "memory", "perplexity",
                 "recalls more", "copies better", "kernels"):  # fmt: skip
        assert word in text
    kernels = next(row for row in table["rows"] if "kernels" in row[0])
    assert kernels[-1] == "not testable here" and "CUDA" in kernels[2]


def test_profile_files_say_what_was_measured(smoke: Path) -> None:
    """Catches self times that count time twice or leave some out, and a wrong label."""
    for row in StudyReport(smoke).store.rows("profile"):
        assert row["time_of"] == "CPU operators" and row["cuda_time_ms"] is None
        assert row["cpu_time_ms"] == pytest.approx(row["profiled_wall_ms"], rel=0.05)
        assert 0 < row["outside_operators_ms"] < row["cpu_time_ms"]


def test_report_is_one_file_with_its_pictures(smoke: Path) -> None:
    """Catches a page that asks for something from outside, and a table without a backend."""
    html = (smoke / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 8
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    markdown = (smoke / "report.md").read_text()
    assert "torch (scaled" in markdown and "All validity gates hold." in markdown


def test_speedscope_of_collapsed_stacks() -> None:
    """Catches frames that are numbered wrongly, and a check that lets everything pass."""
    value = speedscope_of("x", [("a;b", 5), ("a;c", 7)])
    assert check_speedscope(value) == "3 frames"
    assert value["profiles"][0]["samples"] == [[0, 1], [0, 2]]
    value["profiles"][0]["weights"][0] = 6
    with pytest.raises(ValueError, match="sum up"):
        check_speedscope(value)


def test_pt_is_the_same_command() -> None:
    """Catches an entry point that cannot be run, or loses the options of the command."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "pt.py"), "--help"], capture_output=True, text=True,
        check=False, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--preset" in result.stdout and "--publish" in result.stdout


def test_numbers_of_the_command_line() -> None:
    """Catches 64k that is 64, a range that stops early, and per cent that are shares."""
    assert parse_lengths("1k:8k") == (1024, 2048, 4096, 8192)
    assert parse_lengths("100,300") == (100, 300)
    assert parse_number("5M") == 5_000_000 and parse_number("1.5k") == 1536
    assert parse_share("1%") == parse_share("0.01") == 0.01
    for bad in ("", "x", "0", "8k:1k", "-3"):
        with pytest.raises(UserError):
            parse_lengths(bad)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "huge"], "preset 'huge' does not exist"),
        (["--attn", "softmax,mamba"], "mechanism 'mamba' does not exist"),
        (["--attn", "softmax,softmax"], "each once"),
        (["--params", "2k"], "use --params|Use --params"),
        (["--data", "no/such/file.txt"], "no such file"),
        (["--plugin", "nowhere.py"], "there is no such file"),
        (["--backend", "fla", "--strict-backend", "--attn", "kda"], "backend 'fla' cannot compute"),
    ],
)
def test_bad_input_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a study that begins with what it cannot do, and a traceback."""
    status = main(["study", "run", "--preset", "smoke", "--out", str(tmp_path / "x"), *words])
    error = " ".join(capsys.readouterr().err.split())
    assert status == 2, error
    assert any(part in error for part in message.split("|")), error


def test_list_and_doctor_name_every_mechanism(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a mechanism that the commands keep to themselves."""
    from rxlm.nn.mixers import MIXERS

    assert main(["study", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["mechanisms"]) == set(MIXERS)
    assert main(["study", "doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mechanisms"]
    assert set(found) == set(MIXERS)
    assert found["kda"]["backend"] == "torch" and "CUDA" in found["kda"]["backend_reason"]


def test_publishing_leaves_links_that_work(smoke: Path, tmp_path: Path) -> None:
    """Catches a page whose figures are elsewhere."""
    page = StudyReport(smoke).publish(tmp_path, "study-smoke")
    text = page.read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    pictures = [link for link in links if link.endswith(".png")]
    assert pictures and all((tmp_path / link).is_file() for link in pictures)
    assert str(tmp_path) not in text and str(smoke) not in text


def test_store_takes_the_last_row_of_the_same_name(tmp_path: Path) -> None:
    """Catches tables with a measurement and what replaced it side by side."""
    store = ResultStore(tmp_path)
    for value in (1.0, float("nan")):
        store.add("k", "memory", [{"attention": "kda", "seq_len": 8, "total_mb": value}])
    (row,) = ResultStore(tmp_path).rows("memory")
    assert row["total_mb"] is None and row["outcome"] == "ok"
