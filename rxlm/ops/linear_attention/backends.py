"""Who computes: this package in plain PyTorch, or the kernels of fla (flash-linear-attention).

fla is optional, never imported before it is asked for, and called with keyword arguments that its
versions 0.5 and 0.6 share. Where it cannot run, the reason is kept: ``auto`` reports it, asking
for ``fla`` raises it.

Shapes: B batch, T tokens, H query/key heads, HV value heads, K/V head dimensions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention.inputs import MECHANISMS, Tokens, repeat_heads

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "fla"]
Form = Literal["chunk", "recurrent", "step"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "fla")
FORMS: tuple[Form, ...] = ("chunk", "recurrent", "step")

FLA_VERSIONS = ((0, 5), (0, 7))  # from the first, below the second
FLA_LARGEST_KEY_DIM = 256  # asserted by the kernels of the delta rule
# Mechanism -> module and names of the chunk and the token-by-token kernel.
FLA_KERNELS = {
    "gla": ("fla.ops.gla", "chunk_gla", "fused_recurrent_gla"),
    "deltanet": ("fla.ops.delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule"),
    "gated_deltanet": (
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    ),
    "kda": ("fla.ops.kda", "chunk_kda", "fused_recurrent_kda"),
}
# Their token-by-token kernels raise in the backward pass, or detach the result silently.
FLA_WITHOUT_RECURRENT_GRADIENT = ("gated_deltanet", "kda")


class BackendChoice(NamedTuple):
    """The backend that runs, and why.

    Attributes:
        name: ``"torch"`` or ``"fla"``.
        reason: one clause for a report: why this one.
    """

    name: Literal["torch", "fla"]
    reason: str


def select_backend(
    mechanism: str,
    *,
    backend: str = "auto",
    form: str = "chunk",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    key_dim: int = 64,
    needs_gradient: bool = False,
) -> BackendChoice:
    """Say which backend computes a mechanism under given conditions. Also for reports.

    Args:
        mechanism: one of ``MECHANISMS``.
        backend: ``auto`` takes fla where it can run and torch otherwise.
        form: ``chunk``, ``recurrent`` or ``step``.
        device: where the tensors are.
        dtype: of queries, keys and values.
        key_dim: K.
        needs_gradient: whether the result will be differentiated.

    Returns:
        The choice, with its reason.

    Raises:
        UserError: on unknown names, and for ``fla`` where it cannot run, saying why.
    """
    for field, name, known in (
        ("linear attention", mechanism, tuple(MECHANISMS)),
        ("form", form, FORMS),
        ("backend", backend, BACKENDS),
    ):
        if name not in known:
            raise UserError(f"{field} {name!r} does not exist; choose one of {', '.join(known)}.")
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    device = torch.device(device)
    if device.type != "cuda":
        obstacle: str | None = f"fla needs a CUDA device and the tensors are on {device.type!r}"
    else:
        obstacle = _obstacle_of_call(mechanism, form, dtype, key_dim, needs_gradient)
        obstacle = obstacle or why_fla_cannot_run()
    if obstacle is None:
        return BackendChoice("fla", "asked for" if backend == "fla" else "fla can run here")
    if backend == "fla":
        raise UserError(
            f"backend 'fla' cannot compute {mechanism} ({form}) here: {obstacle}. "
            "Use backend 'auto' or 'torch'."
        )
    return BackendChoice("torch", obstacle)


@functools.cache
def why_fla_cannot_run() -> str | None:
    """Return why fla's kernels cannot run on this machine, or None if they can.

    Imports triton and fla only when everything that can be looked up without them is in order.
    """
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device"
    for module, remedy in (("triton", "install triton"), ("fla", "pip install 'fla-core>=0.5'")):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed ({remedy})"
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return "fla is installed without the package fla-core, so before 0.5 (upgrade it)"
    if not FLA_VERSIONS[0] <= _release(version) < FLA_VERSIONS[1]:
        return f"fla-core {version} is installed, versions 0.5 and 0.6 are supported"
    try:
        for module, *names in FLA_KERNELS.values():
            kernels = importlib.import_module(module)
            missing = [name for name in names if not hasattr(kernels, name)]
            if missing:
                return f"fla-core {version} has no {missing[0]} in {module}"
    except (ImportError, RuntimeError, OSError) as error:
        return f"fla-core {version} cannot be imported: {type(error).__name__}: {error}"
    return _triton_defect()


def log_choice(mechanism: str, form: str, choice: BackendChoice) -> None:
    """Log a choice the first time that it is made in this process."""
    if not torch.compiler.is_compiling():
        _log_once(mechanism, form, choice)


def run_fla(
    mechanism: str,
    form: str,
    tokens: Tokens,
    initial_state: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Call fla's kernel; for the rest see the public functions.

    Args:
        mechanism: one that :func:`select_backend` sends to fla.
        form: ``chunk``, or ``recurrent`` and ``step`` for the token-by-token kernel.
        tokens: as given by the caller, padding already ignored.
        initial_state: ``[B, HV, K, V]``.
        scale: factor on the queries; default ``K**-0.5``.

    Returns:
        Outputs ``[B, T, HV, V]``, final state ``[B, HV, K, V]`` float32.
    """
    if mechanism in ("gla", "deltanet"):
        tokens = repeat_heads(tokens)  # these kernels know one number of heads only
    if mechanism == "deltanet" and form == "chunk" and tokens.query.dtype == torch.float32:
        # The chunk kernel of the plain delta rule refuses float32: with gates of 0 the gated one
        # computes the same.
        mechanism = "gated_deltanet"
        zeros = torch.zeros(tokens.value.shape[:3], device=tokens.value.device)
        tokens = Tokens(tokens.query, tokens.key, tokens.value, zeros, tokens.write_strength)
    arguments: dict[str, Any] = {
        "q": tokens.query,
        "k": tokens.key,
        "v": tokens.value,
        "scale": tokens.query.shape[-1] ** -0.5 if scale is None else scale,
        "initial_state": None if initial_state is None else initial_state.float().contiguous(),
        "output_final_state": True,
    }
    if tokens.log_decay is not None:
        gate_name = "gk" if mechanism == "gla" and form != "chunk" else "g"
        arguments[gate_name] = tokens.log_decay
    if tokens.write_strength is not None:
        arguments["beta"] = tokens.write_strength
    module, chunk_kernel, recurrent_kernel = FLA_KERNELS[mechanism]
    kernel: Callable[..., tuple[Tensor, Tensor]] = getattr(
        importlib.import_module(module), chunk_kernel if form == "chunk" else recurrent_kernel
    )
    output, final_state = kernel(**arguments)
    return output, final_state


def _obstacle_of_call(
    mechanism: str, form: str, dtype: torch.dtype, key_dim: int, needs_gradient: bool
) -> str | None:
    """Why fla cannot do this call although it may do others."""
    if dtype == torch.float64:
        return "fla has no float64"
    if dtype == torch.float16 and mechanism == "kda":
        return "its KDA kernels overflow in float16 (use bfloat16)"
    if MECHANISMS[mechanism].delta_rule and key_dim > FLA_LARGEST_KEY_DIM:
        return f"its kernels take keys of at most {FLA_LARGEST_KEY_DIM} channels, not {key_dim}"
    if needs_gradient and form != "chunk" and mechanism in FLA_WITHOUT_RECURRENT_GRADIENT:
        return f"its {form} kernel of {mechanism} has no gradient (use form 'chunk')"
    return None


def _triton_defect() -> str | None:
    """Triton 3.4 to 3.7.0 gives wrong gate gradients on Hopper; fla refuses it (its issue 640)."""
    version = importlib.metadata.version("triton")
    on_hopper = torch.cuda.get_device_capability()[0] == 9
    if on_hopper and _release(version) >= (3, 4) and _release(version, 3) < (3, 7, 1):
        return f"triton {version} miscompiles fla's gradients on this GPU (install triton>=3.7.1)"
    return None


def _release(version: str, num_parts: int = 2) -> tuple[int, ...]:
    """Leading numbers of a version: ``"0.6.0rc1"`` -> ``(0, 6)``."""
    digits = ("".join(c for c in part if c.isdigit()) for part in version.split(".")[:num_parts])
    return tuple(int(part) if part else 0 for part in digits)


@functools.cache
def _log_once(mechanism: str, form: str, choice: BackendChoice) -> None:
    logger.info("linear attention %s (%s): %s, %s", mechanism, form, choice.name, choice.reason)
