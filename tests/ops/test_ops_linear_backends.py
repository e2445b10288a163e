"""The choice of a backend is explained, and fla is called the way its kernels are written."""

from __future__ import annotations

import ast
import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention import (
    MECHANISMS,
    backends,
    deltanet,
    gla,
    kda,
    mechanisms,
    select_backend,
    why_fla_cannot_run,
)
from rxlm.ops.linear_attention.backends import FLA_KERNELS, BackendChoice, run_fla
from rxlm.ops.linear_attention.inputs import Tokens


def make_tokens(mechanism: str, dtype: torch.dtype = torch.float32) -> Tokens:
    decays = {None: None, "head": (1, 3, 2), "channel": (1, 3, 2, 4)}[MECHANISMS[mechanism].decay]
    return Tokens(
        torch.ones(1, 3, 1, 4, dtype=dtype),
        torch.ones(1, 3, 1, 4, dtype=dtype),
        torch.ones(1, 3, 2, 5, dtype=dtype),
        None if decays is None else torch.zeros(decays),
        torch.ones(1, 3, 2) if MECHANISMS[mechanism].delta_rule else None,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Replace fla by kernels that record how they are called."""
    recorded: list[tuple[str, dict[str, Any]]] = []

    def kernel(name: str) -> Any:
        def record(**arguments: Any) -> tuple[Tensor, None]:
            recorded.append((name, arguments))
            return torch.zeros(1), None

        return record

    for module, *names in FLA_KERNELS.values():
        fake = SimpleNamespace(**{name: kernel(name) for name in names})
        monkeypatch.setitem(sys.modules, module, fake)
    return recorded


def kernel_parameters(module: str, name: str) -> set[str]:
    """Read the parameters of a kernel from fla's source, which cannot be imported everywhere."""
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs fla's source: pip install --no-deps fla-core")
    folder = Path(spec.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    raise AssertionError(f"no function {name} in {folder}")


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("mechanism", list(MECHANISMS))
def test_kernels_are_called_with_parameters_that_they_have(
    mechanism: str, form: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    """A renamed or swallowed keyword (fla's signatures drift) would show without a GPU."""
    for dtype in (torch.float32, torch.bfloat16):
        run_fla(mechanism, form, make_tokens(mechanism, dtype), torch.zeros(1, 2, 4, 5), None)
        name, arguments = calls[-1]
        module = next(module for module, *names in FLA_KERNELS.values() if name in names)
        assert set(arguments) <= kernel_parameters(module, name)
        assert arguments["output_final_state"] is True
        assert arguments["scale"] == 0.5
        assert arguments["initial_state"].dtype == torch.float32
        has_decay = bool({"g", "gk"} & set(arguments))
        assert has_decay == (MECHANISMS[mechanism].decay is not None) or "gated" in name
        assert ("beta" in arguments) == MECHANISMS[mechanism].delta_rule


def test_the_plain_delta_rule_in_float32_takes_the_gated_kernel(
    calls: list[tuple[str, dict[str, Any]]],
) -> None:
    """fla's own chunk kernel refuses float32; gates other than 0 would change the result."""
    run_fla("deltanet", "chunk", make_tokens("deltanet"), None, None)
    run_fla("deltanet", "chunk", make_tokens("deltanet", torch.bfloat16), None, None)
    run_fla("deltanet", "step", make_tokens("deltanet"), None, None)
    names = [name for name, _ in calls]
    assert names == ["chunk_gated_delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule"]
    assert calls[0][1]["g"].shape == (1, 3, 2) and not calls[0][1]["g"].any()


def test_padding_is_neutral_before_fla_sees_it(
    calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that only the torch forms obey would show."""
    choice = BackendChoice("fla", "for the test")
    monkeypatch.setattr(mechanisms, "select_backend", lambda *_, **__: choice)
    given = make_tokens("kda")
    assert given.log_decay is not None and given.write_strength is not None
    decay, strength = given.log_decay - 1, given.write_strength
    mask = torch.tensor([[False, True, True]])
    kda(given.query, given.key, given.value, decay, strength, key_mask=mask)
    _, arguments = calls[-1]
    for name in ("q", "k", "v", "g", "beta"):
        assert not arguments[name][:, 0].any() and bool(arguments[name][:, 1:].any())


def test_auto_on_the_cpu_is_torch_and_says_why() -> None:
    """A choice without a reason cannot be printed by a report."""
    choice = select_backend("kda")
    assert choice.name == "torch"
    assert "CUDA" in choice.reason and "'cpu'" in choice.reason


@pytest.mark.parametrize("function", [gla, deltanet])
def test_asking_for_fla_where_it_cannot_run_is_an_error_that_says_why(function: Any) -> None:
    """A silent fallback to torch would be taken for a measurement of fla."""
    given = make_tokens("gla" if function is gla else "deltanet")
    third = given.log_decay if function is gla else given.write_strength
    with pytest.raises(UserError, match=r"backend 'fla' cannot compute .* CUDA device"):
        function(given.query, given.key, given.value, third, backend="fla")


@pytest.mark.parametrize(
    ("conditions", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.float16}, "overflow in float16"),
        ({"key_dim": 512}, "at most 256 channels, not 512"),
        ({"form": "recurrent", "needs_gradient": True}, "has no gradient"),
        ({"form": "step", "needs_gradient": True}, "has no gradient"),
    ],
)
def test_calls_that_fla_gets_wrong_stay_in_torch(
    conditions: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token-by-token KDA detaches the result silently: training would stand still."""
    monkeypatch.setattr(backends, "why_fla_cannot_run", lambda: None)
    assert select_backend("kda", device="cuda").name == "fla"
    choice = select_backend("kda", device="cuda", **conditions)
    assert choice.name == "torch" and reason in choice.reason
    with pytest.raises(UserError, match=reason):
        select_backend("kda", device="cuda", backend="fla", **conditions)


@pytest.mark.parametrize(
    ("version", "usable"),
    [("0.4.2", False), ("0.5.0", True), ("0.6.1rc1", True), ("0.7.0", False), ("1.0", False)],
)
def test_only_versions_that_were_read_are_used(
    version: str,
    usable: bool,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[str, dict[str, Any]]],
) -> None:
    """A future fla with another state layout would give wrong numbers without an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    versions = {"fla-core": version, "triton": "3.8.0"}
    monkeypatch.setattr(backends.importlib.metadata, "version", versions.__getitem__)
    reason = why_fla_cannot_run.__wrapped__()
    assert (reason is None) == usable
    assert usable or version in str(reason)
    versions["triton"] = "3.6.0"
    assert not usable or "3.6.0" in str(why_fla_cannot_run.__wrapped__())


def test_an_unknown_mechanism_lists_the_known_ones() -> None:
    """A misspelt type must not become another one."""
    with pytest.raises(UserError, match="'mamba' does not exist; choose one of gla, deltanet"):
        select_backend("mamba")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A run must show what computed it, but not at every layer and step."""
    backends._log_once.cache_clear()
    given = make_tokens("gla")
    with caplog.at_level(logging.INFO, logger="rxlm"):
        for _ in range(3):
            gla(given.query, given.key, given.value, given.log_decay)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("linear attention gla (chunk): torch, fla needs")
