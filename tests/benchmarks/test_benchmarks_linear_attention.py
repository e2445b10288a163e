"""The benchmark of linear attention runs, and its arithmetic is right. Nothing is timed here."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = [
    *("--lengths", "64", "128", "--rounds", "2", "--step-rounds", "2", "--threads", "1"),
    *("--heads", "1", "--head-dim", "8", "--positions", "64", "32768", "--only", "rxlm", "naive"),
]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the benchmark, found as when it runs as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    names = ("linear_attention_contenders", "linear_attention_report", "linear_attention")
    found = {name: importlib.import_module(name) for name in names}
    return {**found, "timing": importlib.import_module("rxlm.evaluation.timing")}


def test_small_run_writes_every_file(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a script that no longer fits the operators, or a row without its backend."""
    arguments = [*SMALL, "--memory-lengths", "--out", str(tmp_path)]
    assert scripts["linear_attention"].main(arguments) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "linear_attention.csv").read_text().splitlines()))
    ours = {
        (row["task"], row["tokens"], row["mechanism"]) for row in rows if row["source"] == "rxlm"
    }
    mechanisms = ("gla", "deltanet", "gated_deltanet", "kda", "elu", "taylor")
    lengths = {"forward": "64 128", "forward+backward": "64 128", "step": "64 32768"}
    assert ours == {
        (task, tokens, mechanism)
        for task in lengths
        for tokens in lengths[task].split()
        for mechanism in mechanisms
    }
    assert {row["backend"] for row in rows} == {"torch"}
    states = {
        row["state_or_cache_bytes"]
        for row in rows
        if (row["task"], row["source"]) == ("step", "rxlm")
    }
    features = {"elu": 8, "taylor": 45}  # of 8 entries
    assert states == {str(8 * 8 * 4), *(str(count * (8 + 1) * 4) for count in features.values())}
    assert (tmp_path / "linear_attention.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "linear_attention.md").read_text()
    assert "KDA, rxlm: step at position 32,768" in page


@pytest.mark.parametrize("option", ["--lengths", "--backward-lengths", "--memory-lengths"])
def test_lengths_that_fla_cannot_take_are_refused(
    scripts: dict[str, ModuleType], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an assertion of fla's files that ends a run after minutes."""
    assert scripts["linear_attention"].main([option, "100"]) == 2
    assert f"{option}: 100 is not a multiple of 64" in capsys.readouterr().err


def test_ratios_are_taken_within_rounds(scripts: dict[str, ModuleType]) -> None:
    """Catches a ratio of medians, which a disturbance of one round would move."""
    timing = scripts["timing"]
    found = timing.ratio([2.0, 20.0, 6.0, 8.0, 10.0], [1.0, 10.0, 2.0, 2.0, 2.0])
    assert found == timing.Quartiles(lower=2.0, median=3.0, upper=4.0)


def test_slope_is_the_exponent(scripts: dict[str, ModuleType]) -> None:
    """Catches logarithms on one axis only, or swapped axes."""
    lengths = [2048, 4096, 32768]
    found = scripts["timing"].log_log_slope(lengths, [3e-9 * length**1.5 for length in lengths])
    assert found == pytest.approx(1.5)


def test_every_round_runs_everything_until_the_budget_is_spent(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rounds that are cut short, and a budget that ends a run before three rounds."""
    timing = scripts["timing"]
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    groups = [{"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}]
    samples = timing.interleave(groups, rounds=5, budget=0.0, warm_up=lambda key: False)
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert [set(calls[i : i + 2]) for i in (0, 2, 4)] == [{"a", "b"}] * 3


def test_memory_is_that_of_the_call_alone(scripts: dict[str, ModuleType]) -> None:
    """Catches a peak that counts the arguments, or one that misses what is freed in between."""
    found = scripts["timing"].in_fresh_process(_memory_of_64_mib)
    assert found is None or 60 * 2**20 < found < 80 * 2**20


def test_a_process_that_dies_gives_no_memory(scripts: dict[str, ModuleType]) -> None:
    """Catches a benchmark that waits for ever for a process that ran out of memory."""
    assert scripts["timing"].in_fresh_process(_die) is None


def _memory_of_64_mib() -> int | None:
    from rxlm.evaluation.timing import extra_memory

    def prepare() -> object:
        held = bytearray(b"x") * (200 * 2**20)
        return lambda: len(bytearray(b"x") * (64 * 2**20)) + len(held)

    found: int | None = extra_memory(prepare, "cpu")
    return found


def _die() -> int | None:
    import os

    os._exit(1)
