"""Models of equal size, gates, backends, the short convolution for everyone, memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rxlm.cli.main import main
from rxlm.errors import UserError
from rxlm.lm.model import mixer_settings
from rxlm.nn.mixers import MIXERS, MixerSettings, build_mixer, register_mixer
from rxlm.study.calibration import build, costs_of, plan_model
from rxlm.study.gates import check_mechanism
from rxlm.study.mechanisms import backend_of
from rxlm.study.memory import AllocationCounter, measure_memory, saved_bytes
from rxlm.study.runner import Study
from rxlm.study.settings import StudySettings, preset

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(MIXERS))
@pytest.mark.parametrize("params", [100_000, 5_000_000])
def test_calibrate_parameters_within_one_percent(name: str, params: int) -> None:
    """Catches a count that forgets a part, and models that are not of equal size."""
    settings = StudySettings(attention=(name,), params=params, depth=2 if params < 10**6 else 5)
    plan = plan_model(settings, name, 5000)
    assert abs(plan.non_embedding / params - 1) <= 0.01
    if params < 10**6:
        network = build(settings, plan)
        counted = sum(item.numel() for item in network.parameters())
        assert counted == plan.total == plan.non_embedding + 5000 * plan.config.dim


def test_calibrate_command_prints_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that prints other models than those that are run."""
    words = ["study", "calibrate", "--attn", "softmax,kda", "--seq-lens", "64", "--json"]
    assert main([*words, "--params", "200000", "--assert-within", "1%"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["attention"] for row in rows] == ["softmax", "kda"]
    assert all(abs(row["deviation"]) <= 0.01 for row in rows)
    softmax, kda = rows
    assert softmax["state_bytes"] > kda["state_bytes"] > 0
    assert softmax["flops_per_token_counted"] == softmax["flops_per_token_formula"]
    # Half the tolerance that one unit of the feed-forward network can meet.
    assert main([*words, "--params", "60000", "--assert-within", "0.0001%"]) == 2
    assert "outside of the tolerance" in capsys.readouterr().err


def test_state_of_softmax_grows_and_that_of_a_recurrence_does_not() -> None:
    """Catches a formula that takes keys and values for a state."""
    settings = preset("smoke")
    for name, grows in (("softmax", True), ("elu", False)):
        plan = plan_model(settings, name, 64)
        short, long = (costs_of(settings, plan, tokens) for tokens in (32, 64))
        assert (long.state_bytes > short.state_bytes) is grows
        assert (long.flops_formula > short.flops_formula) is grows


def test_networks_begin_equal_and_all_are_convolved() -> None:
    """Catches a comparison of embeddings, and one of convolutions."""
    settings = preset("smoke")
    networks = {
        name: build(settings, plan_model(settings, name, 64))
        for name in ("softmax", "gated_deltanet")
    }
    first, second = networks.values()
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    for network in networks.values():
        names = [name for name, _ in network.named_parameters() if "short_convolution" in name]
        assert len(names) == settings.depth
    bare = settings.model_copy(update={"equal_convolution": False})
    network = build(bare, plan_model(bare, "softmax", 64))
    assert not [name for name, _ in network.named_parameters() if "short_convolution" in name]


@pytest.mark.parametrize("name", list(MIXERS))
def test_gates_hold_for_every_mechanism(name: str) -> None:
    """Catches a mechanism whose numbers would describe something else."""
    settings = preset("smoke", params=60_000)
    gates = check_mechanism(settings, plan_model(settings, name, 64), CPU)
    assert {gate.gate for gate in gates} == {
        "causality", "chunk invariance", "decode = prefill", "oracle", "gradcheck",
    }  # fmt: skip
    assert all(gate.passed for gate in gates), gates


PEEKING = """
from torch import nn
from rxlm.study.mechanisms import register_attention

class Peeking(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Linear(dim, dim)

    def forward(self, x, key_mask=None, cache=None):
        return self.weight(x.mean(dim=1, keepdim=True).expand_as(x)) + x, x[:, :0]

@register_attention("peeking", cost="linear", summary="sees the future")
def _peeking(settings):
    return Peeking(settings.dim)
"""


def test_a_failed_gate_is_printed_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches numbers of a broken mechanism that come with exit status 0."""
    plugin = tmp_path / "peeking.py"
    plugin.write_text(PEEKING)
    folder = tmp_path / "study"
    words = ["study", "bench", "op", "--preset", "smoke", "--out", str(folder), "--plugin",
             str(plugin), "--attn", "softmax,peeking", "--seq-lens", "16,32"]  # fmt: skip
    try:
        assert main(words) == 1
    finally:
        MIXERS.pop("peeking", None)
    captured = capsys.readouterr()
    assert "a validity gate failed" in captured.err
    assert "FAILED" in captured.out
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    failed = {row["gate"] for row in rows if row["kind"] == "gate" and not row["passed"]}
    assert {"causality", "chunk invariance", "decode = prefill"} <= failed
    assert all(row["attention"] == "peeking" for row in rows
               if row["kind"] == "gate" and not row["passed"])  # fmt: skip


def test_fallback_is_recorded_and_strict_refuses() -> None:
    """Catches a backend that silently is another one."""
    mixer = build_mixer("gated_deltanet", MixerSettings(dim=16, num_heads=2))
    found = backend_of(mixer, "fla", CPU, torch.float32)
    assert (found.backend_requested, found.backend) == ("fla", "torch")
    assert "CUDA" in found.backend_reason and found.backend_version == torch.__version__
    with pytest.raises(UserError, match="cannot compute"):
        backend_of(mixer, "fla", CPU, torch.float32, strict=True)
    softmax = backend_of(build_mixer("softmax", MixerSettings(dim=16, num_heads=2)), "auto", CPU,
                         torch.float32)  # fmt: skip
    assert "scaled_dot_product_attention" in softmax.backend


def test_counted_bytes_are_those_of_living_tensors() -> None:
    """Catches a counter that never lets go, counts views, or misses a peak."""
    x = torch.zeros(1000)
    counter = AllocationCounter()
    counter.know(iter([x]))
    with counter:
        y = x + 1  # 4,000 bytes
        view = y[10:20]
        z = y * 2  # 4,000 more
        del y, z
        assert counter.held == 4000  # the view keeps its storage
        del view
        assert counter.held == 0
        w = torch.ones(500)
    assert (counter.held, counter.peak) == (2000, 8000)
    del w


def test_saved_bytes_are_what_backward_needs() -> None:
    """Catches weights that count as activations, and storages that count twice."""
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(10, 8, requires_grad=True)
    known = [layer.weight, x]
    total, y = saved_bytes(lambda: torch.tanh(layer(x)), iter(known))
    assert total == y.numel() * 4
    total, _ = saved_bytes(lambda: torch.tanh(layer(x * 1.5)), iter(known))
    assert total == (y.numel() + x.numel()) * 4


def test_memory_scaling_is_measured_in_three_ways(smoke: Path) -> None:
    """Catches memory of a CPU that is zero, and a slope that is not that of the bytes."""
    from rxlm.study.claims import slopes_of
    from rxlm.study.manifest import open_settings
    from rxlm.study.results import ResultStore

    settings, store = open_settings(smoke), ResultStore(smoke)
    rows = store.rows("memory")
    assert all(row["counted_total_mb"] > 0 and row["saved_mb"] > 0 for row in rows)
    assert all("total_mb" in row for row in rows)
    slopes = slopes_of(store, settings, "memory", "saved_mb")
    assert 0.9 < slopes["softmax"].slope < 1.1
    assert slopes["softmax"].low <= slopes["softmax"].theil_sen <= slopes["softmax"].high


def test_running_out_of_memory_is_an_outcome() -> None:
    """Catches a row that is missing, and a measurement that ends the study."""
    settings = preset("smoke", memory_limit_mb=6.0)
    config = plan_model(settings, "gated_deltanet", 64).config
    row = measure_memory(settings, "gated_deltanet", mixer_settings(config), 8192, CPU)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    assert row["outcome"] == "oom" and row["reason"]
    assert 0 <= row["largest_length"] < 8192


def test_a_time_budget_leaves_rows_and_is_made_up_for(
    tmp_path: Path, tiny_study: Callable[..., Study], tiny: dict[str, Any]
) -> None:
    """Catches points that are lost for good because time was short once."""
    study = tiny_study(tmp_path, stages=("op",), time_budget=1e-6)
    study.run()
    rows = study.store.rows("op")
    assert {row["outcome"] for row in rows} == {"time_budget"}
    again = tiny_study(tmp_path, stages=("op",))
    again.run()
    timed = [row for row in again.store.rows("op") if row["outcome"] == "ok"]
    assert {(row["attention"], row["seq_len"]) for row in timed} == {
        (name, length) for name in ("softmax", "gated_deltanet") for length in tiny["op_lens"]
    }


def test_model_scaling_keeps_sizes_within_two_percent() -> None:
    """Catches '~1M' that is 1.75M."""
    from rxlm.study.calibration import depth_of

    settings = StudySettings(attention=("softmax", "kda"))
    for params in (1_000_000, 5_000_000, 15_000_000, 30_000_000):
        for name in ("softmax", "kda", "taylor"):
            plan = plan_model(settings, name, 256, params=params, depth=depth_of(params),
                              tolerance=0.02)  # fmt: skip
            assert abs(plan.deviation) <= 0.02


def test_a_mechanism_that_is_put_in_twice_is_refused() -> None:
    """Catches a plug-in that silently replaces a mechanism."""
    with pytest.raises(UserError, match="exists"):
        register_mixer("softmax", cost="linear", summary="x")(lambda settings: nn.Identity())
