"""Ten lines make a mechanism or a task part of every output; the playbook's Trainer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxlm.cli.main import main
from rxlm.data.synthetic_tasks import TASKS
from rxlm.nn.mixers import MIXERS
from rxlm.study.checking import check_study
from rxlm.study.mechanisms import load_plugins
from rxlm.study.report import StudyReport
from rxlm.study.runner import Study
from rxlm.study.trainer import Trainer

PLUGIN = """
import torch
from torch import nn
from rxlm.data.synthetic_tasks import SequenceTask, register_task
from rxlm.study.mechanisms import register_attention


class RunningMean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.value, self.output = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, key_mask=None, cache=None):
        before, count = (x.new_zeros(len(x), 1, x.shape[2]), 0) if cache is None else cache
        total = before + self.value(x).cumsum(dim=1)
        counts = count + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.output(total / counts), (total[:, -1:], count + x.shape[1])


@register_attention("mean", cost="linear", summary="running mean")
def _mean(settings):
    return RunningMean(settings.dim)


@register_task("echo", summary="say the token before", sizes=(4,))
def _echo(size, vocab_size):
    def row(generator):
        tokens = generator.integers(vocab_size, size=size)
        targets = tokens.copy()
        targets[0], targets[1:] = -100, tokens[:-1]
        return tokens, targets

    return SequenceTask("echo", size, size, vocab_size, 1.0 / vocab_size, row)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    yield str(file)
    MIXERS.pop("mean", None)
    TASKS.pop("echo", None)


def test_register_attention_and_register_task_reach_every_output(
    plugin: str, tmp_path: Path, tiny_study: Callable[..., Study], tiny: dict[str, Any]
) -> None:
    """Catches a table, a figure or a claim that knows only what this package brings."""
    load_plugins([plugin])
    folder = tmp_path / "study"
    study = tiny_study(
        folder, attention=("softmax", "mean"), plugins=(plugin,), tasks={"echo": tiny["task"]}
    )
    assert study.run()
    StudyReport(folder).write()
    wrong = [item for item in check_study(folder) if item.problem]
    assert not wrong
    for name in ("efficiency", "memory", "ppl", "scaling", "profile", "prefill", "decode",
                 "operator", "gates", "tasks"):  # fmt: skip
        with (folder / "results" / f"{name}.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["attention"] == "mean"]
        assert rows, name
    assert all(row["total_mb"] for row in csv.DictReader(
        (folder / "results" / "memory.csv").read_text().splitlines()))  # fmt: skip
    assert (folder / "figures" / "task_echo.png").is_file()
    assert (folder / "profiler_results" / "mean_trace.json").is_file()
    markdown = (folder / "report.md").read_text()
    assert "Task echo" in markdown and markdown.count("| mean |") >= 7
    assert any("mean" in claim.claim for claim in StudyReport(folder).claims)
    history = json.loads((folder / "history.json").read_text())
    assert {part["what"] for part in history.values()} == {"echo", "pretrain"}
    models = json.loads((folder / "model_configs.json").read_text())["models"]
    assert set(models) == {"softmax", "mean"}


class Gate(nn.Module):
    """Each token by itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_mask: Any = None, cache: Any = None) -> tuple[Tensor, Any]:
        return self.linear(x), x[:, :0]


def test_trainer_of_the_playbook(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Catches a method that is missing, a class that is not measured like the others, and stages
    that cannot be run one by one."""
    Trainer.ATTN_CLASSES["gate"] = Gate
    try:
        changes = {**tiny, "attention": ("softmax", "gate"), "stages": ("gates",)}
        del changes["task"]
        trainer = Trainer(None, seq_len=16, batch_size=4, lr=1e-3, device="cpu",
                          out=tmp_path / "pt", preset_name="smoke", **changes)  # fmt: skip
        configs = trainer.calibrate_model_configs(14_000)
        assert set(configs) == {"softmax", "gate"}
        rows = trainer.test_training_efficiency([16])
        steps = [row for row in rows if row["phase"] == "step"]
        assert {row["attention"] for row in steps} == {"softmax", "gate"}
        text = trainer.settings.text.model_copy(update={"validation_tokens": 64})
        trainer.settings = trainer.settings.model_copy(update={"text": text})
        assert {row["attention"] for row in trainer.pretrain_all(epochs=0.002)} == {
            "softmax", "gate",
        }  # fmt: skip
        before = trainer.test_perplexity_summary()
        assert before == trainer.test_perplexity_summary()
        pages = trainer.plot_results()
        assert all(page.is_file() for page in pages)
        assert "gate" in trainer.ATTN_CLASSES and len(trainer.ATTN_CLASSES) == len(MIXERS)
    finally:
        del Trainer.ATTN_CLASSES["gate"]
    for name in ("test_memory_scaling", "test_copy_task", "test_associative_recall",
                 "test_model_scaling", "profile_attention", "profile_attention_detailed",
                 "test_inference_latency"):  # fmt: skip
        assert callable(getattr(Trainer, name))


def test_plugin_appears_in_the_list(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that lists before it loads."""
    assert main(["study", "list", "--plugin", plugin]) == 0
    text = capsys.readouterr().out
    assert "running mean" in text and "say the token before" in text


def test_plugin_is_loaded_once(plugin: str) -> None:
    """Catches a second registration under the same name, which would be refused."""
    load_plugins([plugin])
    load_plugins([plugin])
    torch.manual_seed(0)
    assert "mean" in MIXERS
