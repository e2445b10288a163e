"""The two examples of the guide to ``LinearAttention`` run, learn, and beat persistence."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The example scripts, imported as when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("minimal", "time_series")
    return {name: importlib.import_module(f"linear_attention_{name}") for name in names}


def test_minimal_example_learns(scripts: dict[str, ModuleType]) -> None:
    """A layer that does not train, or loses the first token over eleven others, would show: without
    memory the loss stays at the variance of the target, 1."""
    losses = scripts["minimal"].train(steps=50)
    assert len(losses) == 50
    assert sum(losses[-5:]) / 5 < 0.1 < 0.8 < losses[0]


def test_minimal_example_takes_a_mask(scripts: dict[str, ModuleType]) -> None:
    """A model of several layers in which padding leaks from one to the next would show."""
    torch.manual_seed(0)
    model = scripts["minimal"].MySequenceModel(input_dim=3, hidden_dim=16).eval()
    x = torch.randn(1, 6, 3)
    padded = torch.cat((torch.full((1, 4, 3), 1e3), x), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, attn_mask=mask)[:, 4:], model(x), rtol=0, atol=1e-5
        )


def test_timeseries_example_beats_persistence(scripts: dict[str, ModuleType]) -> None:
    """Predictions compared with the wrong index, or in normalised units, would show: noise alone
    has a variance of 0.09, and repeating the last value errs by about 4.7."""
    found = scripts["time_series"].forecast(steps=50)
    assert found.losses[-1] < 0.1 * found.losses[0]
    assert found.error < 0.2 * found.persistence_error
    values = scripts["time_series"].series()
    assert torch.equal(found.true, values[found.time])
    assert found.time.tolist() == list(range(400, 600))
    assert found.predicted.mean() == pytest.approx(float(found.true.mean()), abs=1.0)


def test_timeseries_windows_are_aligned(scripts: dict[str, ModuleType]) -> None:
    """A target inside of its window, or one step too far, would show."""
    x, y, time = scripts["time_series"].windows(torch.arange(60.0))
    assert x.shape == (36, 24, 1)
    assert torch.equal(y[:, 0], x[:, -1, 0] + 1)
    assert torch.equal(y[:, 0], time.float())


def test_timeseries_plot_is_written(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """A plot that needs a display, or other names than those of the result, would show."""
    pytest.importorskip("matplotlib").use("Agg")
    scripts["time_series"].plot(scripts["time_series"].forecast(steps=1), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "linear_attention_time_series" in sys.modules
