"""The benchmark of decoding runs, counts what a step reads, and writes what it says."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["model.decoder.num_layers=1", "model.decoder.stm_size=8", "model.decoder.vocab_size=300",
        "tokenizer.vocab_size=300"]  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, found as when it runs as a script."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return importlib.import_module("decode")


def test_small_run_writes_every_file(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a script that no longer fits the model or Llama, or a contender that is not run."""
    arguments = ["--quick", "--no-compile", "--new", "2", "--prompts", "8", "--rounds", "1"]
    assert script.main([*arguments, "--out", str(tmp_path), "--set", *TINY]) == 0
    assert "reference package is not compared" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "decode.csv").read_text().splitlines()))
    names = {row["contender"] for row in rows if row["task"] == "turn"}
    assert names == {"rxlm", "Llama", "Llama, StaticCache", "Llama, generate()",
                     "Llama, as many active"}  # fmt: skip
    assert {row["contender"] for row in rows if row["task"] == "first token"} == names
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "of the bound" in (tmp_path / "decode.md").read_text()


def test_a_step_reads_what_its_tokens_visit(script: ModuleType) -> None:
    """Catches a bound from too few or too many bytes: of Micro, by hand."""
    contenders = importlib.import_module("decode_contenders")
    model = contenders.published("micro")
    width, vocab, experts = 128, 7500, 3 * 256 * 128
    layer = 4 * width * 64 + width  # Self-attention and its output bias.
    layer += 2 * width * 64 + width  # Queries and output of reading the memory.
    layer += 3 * width + 12 * width  # Norms, router.
    memory, past = 2 * 256 * 64, 2 * 10 * 64
    head = vocab * width + vocab  # And its bias; Micro has no norm before it.
    one = width + head + 6 * (layer + 2 * experts + memory + past)
    assert contenders.bytes_of_a_step(model, 1, 10) == pytest.approx(4 * one)
    visited = 12 * (1 - (10 / 12) ** 8)
    eight = 8 * width + head + 6 * (layer + visited * experts + 8 * (memory + past))
    assert contenders.bytes_of_a_step(model, 8, 10) == pytest.approx(4 * eight)
    whole = contenders.llama_of(model, contenders.count(model.decoder))
    assert contenders.count(whole) == pytest.approx(contenders.count(model.decoder), rel=0.01)
