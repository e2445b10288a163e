"""What must hold before any number is worth reading; a mechanism that fails is not compared.

    causality         the gradient of a token reaches no later token, and each earlier one or itself
    chunk invariance  ragged pieces with a carried cache give what one call gives
    decode = prefill  the same, token by token, through the whole network
    oracle            the form that runs, in the dtype that runs, against the token-by-token form in
                      float64: outputs and gradients
    gradcheck         analytic against numeric gradients in float64, on a tiny mixer

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.errors import RunError, UserError
from rxlm.evaluation.tables import FAILED, PASSED, Table
from rxlm.lm.model import mixer_settings
from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.study.calibration import ModelPlan, build
from rxlm.study.mechanisms import set_backend, title
from rxlm.study.settings import StudySettings

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error, relative to the largest entry of what is right."""
_TOKENS = 97
"""More than one chunk of every form, and no multiple of one."""
_PIECES = (1, 30, 2, 64)
_TINY = 5


class Gate(NamedTuple):
    """One check of one mechanism: the error that was found, and the largest that passes."""

    attention: str
    gate: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds; an error that is no number does not."""
        return self.error <= self.tolerance


def check_mechanism(settings: StudySettings, plan: ModelPlan, device: torch.device) -> list[Gate]:
    """Return all gates of a mechanism; one that raises has failed, with the reason."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    mixers = mixer_settings(plan.config)
    name = plan.attention
    checks: list[tuple[str, torch.dtype, Callable[[], float]]] = [
        ("causality", dtype, lambda: _causality(name, mixers, settings, device, dtype)),
        ("chunk invariance", dtype, lambda: _pieces(name, mixers, settings, device, dtype)),
        ("decode = prefill", dtype, lambda: _decode(settings, plan, device, dtype)),
        ("oracle", dtype, lambda: _oracle(name, mixers, settings, device, dtype)),
        ("gradcheck", torch.float64, lambda: _gradcheck(name)),
    ]
    found = []
    for gate, kind, check in checks:
        tolerance = 0.0 if gate == "causality" else TOLERANCES[kind]
        try:
            found.append(Gate(name, gate, check(), tolerance))
        except (RunError, UserError, RuntimeError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            found.append(Gate(name, gate, float("inf"), tolerance, reason))
    return found


def gates_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of gates, one line a mechanism."""
    names = list(dict.fromkeys(row["gate"] for row in rows))
    body = []
    for attention in dict.fromkeys(row["attention"] for row in rows):
        cells = {row["gate"]: row for row in rows if row["attention"] == attention}
        errors = [_cell(cells.get(name)) for name in names]
        good = all(row["passed"] for row in cells.values())
        body.append((title(attention), *errors, PASSED if good else FAILED))
    notes = [
        f"{title(row['attention'])}, {row['gate']}: {row['note']}" for row in rows if row["note"]
    ]
    note = "Largest errors, relative to the largest entry. " + " ".join(notes)
    return Table("Validity gates", ("mechanism", *names, "all"), body, note.strip())


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['error']:.1e}" + ("" if row["passed"] else " !")


def _mixer(
    name: str,
    mixers: MixerSettings,
    settings: StudySettings,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_mixer(name, mixers)
    set_backend(mixer, settings.backend, settings.strict_backend)
    return mixer.to(device, dtype).eval()


def _input(mixers: MixerSettings, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, _TOKENS, mixers.dim, generator=generator).to(device, dtype)


def _relative(found: Tensor, right: Tensor) -> float:
    difference = (found.double() - right.double()).abs().max()
    return float(difference / right.double().abs().max().clamp(min=1e-30))


def _causality(
    name: str,
    mixers: MixerSettings,
    settings: StudySettings,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Return the largest gradient that a token has for a later one; infinite if a token does not
    even see itself."""
    mixer = _mixer(name, mixers, settings, device, dtype)
    x = _input(mixers, device, dtype).requires_grad_()
    y, _ = mixer(x)
    worst = 0.0
    for place in (0, 1, _TOKENS // 2, 63, 64, _TOKENS - 2):
        (gradient,) = torch.autograd.grad(y[:, place].float().sum(), x, retain_graph=True)
        if place + 1 < _TOKENS:
            worst = max(worst, float(gradient[:, place + 1 :].abs().max()))
        if not float(gradient[:, place].abs().max()) > 0:
            return float("inf")
    return worst


@torch.no_grad()
def _pieces(
    name: str,
    mixers: MixerSettings,
    settings: StudySettings,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    mixer = _mixer(name, mixers, settings, device, dtype)
    x = _input(mixers, device, dtype)
    expected, _ = mixer(x)
    cache, parts, start = None, [], 0
    for length in _PIECES:
        part, cache = mixer(x[:, start : start + length], cache=cache)
        parts.append(part)
        start += length
    return _relative(torch.cat(parts, dim=1), expected)


@torch.no_grad()
def _decode(
    settings: StudySettings, plan: ModelPlan, device: torch.device, dtype: torch.dtype
) -> float:
    network = build(settings, plan).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(plan.config.vocab_size, (1, _TOKENS), generator=generator).to(device)
    expected = network.logits(network(ids)[0])
    worst = 0.0
    for prefill in (1, _TOKENS - 9):
        hidden, cache = network(ids[:, :prefill])
        states = [hidden]
        for place in range(prefill, min(_TOKENS, prefill + 40)):
            hidden, cache = network(ids[:, place : place + 1], cache=cache)
            states.append(hidden)
        found = network.logits(torch.cat(states, dim=1))
        worst = max(worst, _relative(found, expected[:, : found.shape[1]]))
    return worst


def _oracle(
    name: str,
    mixers: MixerSettings,
    settings: StudySettings,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Return the largest error of outputs and input gradients against the definition."""
    mixer = _mixer(name, mixers, settings, device, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        definition = build_mixer(name, dataclasses.replace(mixers, mode="fused"))
    definition.load_state_dict(copy.deepcopy(mixer.state_dict()))
    definition = definition.cpu().double().eval()
    x = _input(mixers, device, dtype).requires_grad_()
    exact = x.detach().cpu().double().requires_grad_()
    y, _ = mixer(x)
    # One token after the other, whatever the mixer's own form for many tokens.
    cache, parts = None, []
    for token in exact.split(1, dim=1):
        part, cache = definition(token, cache=cache)
        parts.append(part)
    right = torch.cat(parts, dim=1)
    weight = torch.randn(right.shape, generator=torch.Generator().manual_seed(3)).double()
    (gradient,) = torch.autograd.grad((y * weight.to(y)).sum(), x)
    (right_gradient,) = torch.autograd.grad((right * weight).sum(), exact)
    return max(
        _relative(y.detach().cpu(), right.detach()), _relative(gradient.cpu(), right_gradient)
    )


def _gradcheck(name: str) -> float:
    """Return 0 if analytic and numeric gradients agree, otherwise raise what torch found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        mixer = build_mixer(name, MixerSettings(dim=8, num_heads=2, window=3)).double().eval()
        x = torch.randn(1, _TINY, 8, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(lambda value: mixer(value)[0], (x,), fast_mode=True)
    return 0.0
