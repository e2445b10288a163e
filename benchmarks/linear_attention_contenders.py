"""Who is measured by linear_attention.py: this package, softmax attention, and other people's code.

Foreign code is optional: what is not installed is left out, with the reason. fla's reference files
are read by path, because importing fla needs triton.

Shapes: B batch, T tokens, H heads, K/V head dimensions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import RunError
from rxlm.ops.feature_map_attention import FeatureMapResult, feature_map_attention
from rxlm.ops.linear_attention import (
    MECHANISMS,
    LinearAttentionResult,
    deltanet,
    gated_deltanet,
    gla,
    kda,
    l2_normalize,
    select_backend,
    why_fla_cannot_run,
)
from rxlm.ops.linear_attention.backends import FLA_KERNELS, Form

FEATURE_MAP_NAMES = ("elu", "taylor")
FUNCTIONS: dict[str, Callable[..., LinearAttentionResult | FeatureMapResult]] = {
    "gla": gla,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "kda": kda,
    **{
        name: functools.partial(feature_map_attention, feature_map=name)
        for name in FEATURE_MAP_NAMES
    },
}
TITLES = {
    "softmax": "softmax",
    "gla": "GLA",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "kda": "KDA",
    "elu": "ELU + 1",
    "taylor": "Taylor map",
}
BASELINE = "softmax, SDPA"
LARGEST_DISAGREEMENT = 1e-4  # of outputs and gradients in float32, relative to the largest entry

TAYLOR_DIM = 16  # of a head before the map, as in Based; the number of features is quadratic in it

SLOW: dict[str, Any] = {"max_length": 2048, "limit_reason": "slow, and large in memory"}
TO_STAY_SHORT: dict[str, Any] = {
    "max_length": 16384,
    "limit_reason": "only to keep the benchmark short",
}

Arguments = dict[str, Tensor]
State = Tensor | tuple[Tensor, ...]
Result = tuple[Tensor, State | None]


@dataclass(frozen=True)
class Sizes:
    """What all contenders are given."""

    batch: int = 1
    num_heads: int = 8
    head_dim: int = 64
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Contender:
    """One way to compute a mechanism.

    Attributes:
        mechanism: a key of ``TITLES``.
        source: whose code.
        backend: what computes: ``torch`` or ``fla``.
        attend: arguments (and for steps a state) to output and final state.
        heads_first: whether it takes and returns ``[B, H, T, K]`` instead of ``[B, T, H, K]``.
        max_length: longest sequence that it is given; None for any.
        limit_reason: why there is one.
    """

    mechanism: str
    source: str
    backend: str
    attend: Callable[[Arguments, State | None], Result]
    heads_first: bool = False
    max_length: int | None = None
    limit_reason: str = ""

    @property
    def name(self) -> str:
        return f"{TITLES[self.mechanism]}, {self.source}"

    def takes(self, length: int) -> bool:
        return self.max_length is None or length <= self.max_length


def make_arguments(contender: Contender, length: int, sizes: Sizes) -> Arguments:
    """Return random arguments, the same for all contenders, in the layout that this one takes.

    Queries and keys have length 1 (the Taylor map takes their first 16 entries); gates are those of
    freshly initialised layers: for GLA ``logsigmoid(x) / 16``, for the others
    ``-A softplus(x + b)`` with A in [1, 16] per head and ``softplus(b)`` log-uniform in
    [0.001, 0.1]; x is normally distributed.
    """
    generator = torch.Generator().manual_seed(length)
    normal = functools.partial(torch.randn, generator=generator)
    uniform = functools.partial(torch.rand, generator=generator)
    per_head = (sizes.batch, length, sizes.num_heads)
    arguments = {
        "query": l2_normalize(normal(*per_head, sizes.head_dim)),
        "key": l2_normalize(normal(*per_head, sizes.head_dim)),
        "value": normal(*per_head, sizes.head_dim),
    }
    if contender.mechanism == "taylor":
        for name in ("query", "key"):
            arguments[name] = arguments[name][..., :TAYLOR_DIM].contiguous()
    if contender.mechanism == "gla":
        arguments["log_decay"] = F.logsigmoid(normal(*per_head, sizes.head_dim)) / 16
    elif contender.mechanism in ("gated_deltanet", "kda"):
        channels = (sizes.head_dim,) if contender.mechanism == "kda" else ()
        rates = (1 + 15 * uniform(sizes.num_heads)).view(-1, *[1] * len(channels))
        bias = (1e-3 * 100 ** uniform(sizes.num_heads, *channels)).expm1().log()
        arguments["log_decay"] = -rates * F.softplus(normal(*per_head, *channels) + bias)
    if contender.mechanism in ("deltanet", "gated_deltanet", "kda"):
        arguments["write_strength"] = normal(*per_head).sigmoid()
    if contender.heads_first:
        arguments = {key: x.transpose(1, 2).contiguous() for key, x in arguments.items()}
    exact = ("log_decay", "write_strength")
    return {
        key: x.to(sizes.device, torch.float32 if key in exact else sizes.dtype)
        for key, x in arguments.items()
    }


def make_call(
    contender: Contender, task: str, length: int, sizes: Sizes
) -> Callable[[], tuple[Tensor, ...]]:
    """Return what is timed: a forward pass, or one with the gradients of all its arguments."""
    arguments = make_arguments(contender, length, sizes)
    if task == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (contender.attend(arguments, None)[0],)

        return forward
    for tensor in arguments.values():
        tensor.requires_grad_()
    shape = (sizes.batch, length, sizes.num_heads, sizes.head_dim)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = (weight.transpose(1, 2).contiguous() if contender.heads_first else weight).to(
        sizes.device, sizes.dtype
    )

    def forward_backward() -> tuple[Tensor, ...]:
        output, _ = contender.attend(arguments, None)
        return torch.autograd.grad(output, list(arguments.values()), weight)

    return forward_backward


def make_step(contender: Contender, position: int, sizes: Sizes) -> tuple[Callable[[], Any], int]:
    """Return one decoding step after ``position`` tokens, and the bytes of what it reads from.

    The state is that of our chunk form after as many tokens; for softmax attention it is a cache
    into which the step writes its key and value.
    """
    token = make_arguments(contender, 1, sizes)
    if contender.mechanism == "softmax":
        shape = (sizes.batch, sizes.num_heads, position + 1, sizes.head_dim)
        keys = torch.randn(shape, device=sizes.device, dtype=sizes.dtype)
        values = torch.randn(shape, device=sizes.device, dtype=sizes.dtype)

        @torch.no_grad()
        def read_cache() -> Tensor:
            keys[:, :, position] = token["key"][:, :, 0]
            values[:, :, position] = token["value"][:, :, 0]
            return F.scaled_dot_product_attention(token["query"], keys, values)

        return read_cache, (keys.nbytes + values.nbytes)
    before = Contender(contender.mechanism, "", "", contender.attend)  # always tokens first
    with torch.no_grad():
        read = make_arguments(before, position, sizes)
        state = FUNCTIONS[contender.mechanism](**read).final_state

    @torch.no_grad()
    def step() -> Result:
        return contender.attend(token, state)

    parts = (state,) if isinstance(state, Tensor) else state
    return step, sum(part.nbytes for part in parts)


def check_agreement(
    contenders: list[Contender], sizes: Sizes, length: int = 128
) -> tuple[float, list[str]]:
    """Make sure that all contenders of a mechanism compute the same, gradients included.

    Returns:
        The largest difference to our result, relative to the largest entry of a tensor; and who
        gives gradients that are not finite, where ours are (timed all the same).

    Raises:
        RunError: if a finite result differs by more than ``LARGEST_DISAGREEMENT`` in float32.
    """
    largest, remarks = 0.0, []
    ours = {x.mechanism: x for x in contenders if x.source == "rxlm"}
    others = [x for x in contenders if x.mechanism in ours and x is not ours[x.mechanism]]
    for contender in others:
        for task in ("forward", "forward+backward"):
            error = _disagreement(contender, ours[contender.mechanism], task, length, sizes)
            if task == "forward+backward" and math.isnan(error):
                remarks.append(f"{contender.name}: its gradients are not finite at these gates.")
                continue
            largest = max(largest, error)
            if sizes.dtype == torch.float32 and not error <= LARGEST_DISAGREEMENT:
                raise RunError(
                    f"{contender.name} differs from ours by {error:.1e} ({task}): what follows "
                    "would compare different things."
                )
    return largest, remarks


def _disagreement(
    contender: Contender, ours: Contender, task: str, length: int, sizes: Sizes
) -> float:
    errors = []
    expected, found = (make_call(x, task, length, sizes)() for x in (ours, contender))
    for wanted, tensor in zip(expected, found, strict=True):
        tensor = tensor.transpose(1, 2) if contender.heads_first else tensor
        errors.append((tensor - wanted).abs().max() / wanted.abs().max())
    return float(torch.stack(errors).max())  # NaN if any of them is


# --- who takes part -------------------------------------------------------------------------------


def sequence_contenders(sizes: Sizes, *, foreign: bool = True) -> tuple[list[Contender], list[str]]:
    """Return all that can run here, softmax attention first, and why others cannot.

    Args:
        sizes: what they will be given.
        foreign: whether to load other people's code.
    """
    found = [Contender("softmax", "SDPA", "torch", _softmax, heads_first=True)]
    found += [_ours(name, "chunk", sizes) for name in FUNCTIONS]
    missing: list[str] = []
    for add in (_fla_naive, _transformers, _fla_kernels) if foreign else ():
        add(found, missing, sizes)
    return found, missing


def step_contenders(sizes: Sizes) -> tuple[list[Contender], list[str]]:
    """Return all that decode step by step here, softmax attention first, and why others cannot."""
    found = [Contender("softmax", "SDPA", "torch", _softmax, heads_first=True)]
    found += [_ours(name, "step", sizes) for name in FUNCTIONS]
    missing: list[str] = []
    try:
        functions = _transformers_functions("recurrent")
        found += [
            Contender(name, "transformers", "torch", functools.partial(_named, function))
            for name, function in functions.items()
        ]
    except ImportError as error:
        missing.append(f"transformers' torch steps: {error}")
    return found, missing


def _softmax(arguments: Arguments, state: State | None) -> Result:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True), None


def _ours(name: str, form: Form, sizes: Sizes) -> Contender:
    backend = "torch"
    if name in MECHANISMS:
        backend = select_backend(
            name, form=form, device=sizes.device, dtype=sizes.dtype, key_dim=sizes.head_dim
        ).name

    def attend(arguments: Arguments, state: State | None) -> Result:
        return FUNCTIONS[name](**arguments, initial_state=state, form=form)

    return Contender(name, "rxlm", backend, attend)


def _named(
    function: Callable[..., Result], arguments: Arguments, state: State | None, **names: str
) -> Result:
    """Call with the argument names that fla and transformers share, or with those given."""
    names = {"log_decay": "g", "write_strength": "beta"} | names
    tensors = (arguments[key] for key in ("query", "key", "value"))
    gates = {names[key]: tensor for key, tensor in arguments.items() if key in names}
    return function(*tensors, **gates, initial_state=state, output_final_state=True)


def _fla_naive(found: list[Contender], missing: list[str], sizes: Sizes) -> None:
    try:
        gated = _naive_module("gated_delta_rule").naive_chunk_gated_delta_rule
        channels = _naive_module("kda").naive_chunk_kda
        plain = _naive_module("delta_rule").delta_rule_chunkwise
        loop = _naive_module("gla").naive_recurrent_gla
    except (ImportError, OSError, AttributeError) as error:
        missing.append(f"fla's reference files: {error}")
        return
    call = functools.partial
    add = functools.partial(Contender, source="fla naive", backend="torch")
    found += [
        Contender(
            "gla",
            "fla naive (token by token)",
            "torch",
            call(_named, loop, log_decay="gk"),
            max_length=1024,
            limit_reason="fla has no chunk form of GLA without triton, and the loop is slow",
        ),
        add(
            "deltanet",
            attend=lambda a, _: plain(a["query"], a["key"], a["value"], a["write_strength"]),
            heads_first=True,
            **TO_STAY_SHORT,
        ),
        add("gated_deltanet", attend=call(_named, gated), **TO_STAY_SHORT),
        add("kda", attend=call(_named, channels), **SLOW),
    ]


def _transformers(found: list[Contender], missing: list[str], sizes: Sizes) -> None:
    try:
        functions = _transformers_functions("chunk")
    except ImportError as error:
        missing.append(f"transformers' torch functions: {error}")
        return
    for name, function in functions.items():
        limit = SLOW if name == "kda" else TO_STAY_SHORT
        call = functools.partial(_named, function)
        found.append(Contender(name, "transformers", "torch", call, **limit))


def _fla_kernels(found: list[Contender], missing: list[str], sizes: Sizes) -> None:
    obstacle = why_fla_cannot_run() if sizes.device == "cuda" else "needs a CUDA device"
    if obstacle is not None:
        missing.append(f"fla's kernels: {obstacle}")
        return
    for name, (module, chunk_kernel, _) in FLA_KERNELS.items():
        if name == "deltanet" and sizes.dtype == torch.float32:
            missing.append("fla's kernel of DeltaNet: refuses float32")
            continue
        kernel = getattr(importlib.import_module(module), chunk_kernel)

        def attend(arguments: Arguments, state: State | None, kernel: Any = kernel) -> Result:
            short = {"query": "q", "key": "k", "value": "v", "log_decay": "g"}
            names = short | {"write_strength": "beta"}
            given = {names[key]: tensor for key, tensor in arguments.items()}
            output, final = kernel(**given, initial_state=state, output_final_state=True)
            return output, final

        found.append(Contender(name, "fla kernel", "fla", attend))


def _naive_module(operation: str) -> ModuleType:
    """Load ``fla/ops/<operation>/naive.py`` without importing fla."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ImportError("fla is not installed (pip install --no-deps fla-core einops)")
    path = Path(package.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _transformers_functions(form: str) -> dict[str, Callable[..., Result]]:
    """The torch code that transformers runs without fla; ``form`` is ``chunk`` or ``recurrent``."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed")
    gated = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    channels = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
    found = {
        "gated_deltanet": getattr(gated, f"torch_{form}_gated_delta_rule", None),
        "kda": getattr(channels, f"{form}_kimi_delta_attention", None),
    }
    # A decorator may put a downloaded kernel in front: what is measured is the torch code itself.
    return {name: inspect.unwrap(code) for name, code in found.items() if code is not None}
