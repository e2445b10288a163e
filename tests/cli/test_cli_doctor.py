"""`rxlm doctor`: the report, its two views, and the exit status when something is broken."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from rxlm.cli import doctor
from rxlm.cli.main import main


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine look like one without a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_json_report_is_complete(no_cuda: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a report that is not JSON (a torch object in it) or lacks what a bug report needs."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["chosen"] == "cpu"
    assert report["linear_attention"]["chosen"] == "torch"
    assert report["model_check"]["milliseconds"] > 0
    assert report["machine"]["torch_threads"] == torch.get_num_threads()


def test_table_shows_extras_with_their_brackets(
    no_cuda: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches markup eating '[serve]', which leaves an install command that does nothing."""
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-distribution": "serve"})
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "pip install 'reactive-lm[serve]'" in output
    assert "needs a CUDA device" in output


def test_broken_package_is_status_1_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a doctor that crashes on, or overlooks, exactly what it is there to find."""
    monkeypatch.setattr(doctor, "REQUIRED", {"no-such-distribution": "no_such_module"})
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["versions"]["no-such-distribution"] is None
    assert "no-such-distribution cannot be imported: ModuleNotFoundError" in captured.err


def test_broken_torch_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the checks that need torch running although torch does not load."""
    monkeypatch.setattr(doctor, "REQUIRED", {"torch": "no_such_torch"})
    report = doctor.examine(tmp_path)
    assert report["device"] is None
    assert report["model_check"] is None
    assert len(report["problems"]) == 1


def test_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a doctor that says all is well where the first checkpoint cannot be written."""
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", 1e9)
    problems = doctor.examine(tmp_path)["problems"]
    assert len(problems) == 1
    assert str(tmp_path) in problems[0]


def test_model_that_does_not_run_is_reported() -> None:
    """Catches the training step failing with a traceback instead of becoming a reason."""
    measurement, problem = doctor.check_model("meta")
    assert measurement is None
    assert problem is not None
    assert "meta" in problem


def test_check_leaves_the_random_state_alone() -> None:
    """Catches a check that reseeds the process: a library must not touch the caller's RNG."""
    before = torch.get_rng_state()
    measurement, problem = doctor.check_model("cpu")
    assert problem is None
    assert measurement is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_cuda_device_is_listed_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a doctor that finds the GPU but reports the CPU, or the other way round."""
    gpu = types.SimpleNamespace(name="Example GPU", total_memory=80 * 1024**3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    devices = doctor.find_devices()
    assert devices["chosen"] == "cuda"
    assert devices["found"][1] == {"name": "cuda:0", "description": "Example GPU, 80 GiB"}


@pytest.mark.gpu
def test_model_runs_on_the_gpu() -> None:
    """Catches a check that works on the CPU only: the RNG guard and the timing differ there."""
    measurement, problem = doctor.check_model("cuda")
    assert problem is None
    assert measurement is not None


def test_absent_fla_comes_with_the_reason() -> None:
    """Catches 'not available' without the one thing that is missing."""
    backends = doctor.find_linear_attention_backends("cpu")
    assert backends["chosen"] == "torch"
    fla = backends["backends"][1]
    assert not fla["available"]
    assert "CUDA" in fla["reason"]
