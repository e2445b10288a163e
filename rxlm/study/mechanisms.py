"""What a study compares: every entry of ``rxlm.nn.mixers.MIXERS``, and who computes it.

A mechanism of one's own is one decorated function in a file that is named with ``--plugin``; it
then appears in every table, figure and claim:

    from rxlm.study.mechanisms import register_attention

    @register_attention("mean", cost="linear", summary="running mean")
    def _mean(settings):             # MixerSettings: dim, num_heads, window, ...
        return RunningMean(settings.dim)      # mixer(x, key_mask=None, cache=None) -> (y, cache)

Not here: the contract of mixers (``rxlm.nn.mixers``).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from rxlm.data.synthetic_tasks import register_task
from rxlm.errors import UserError
from rxlm.nn.feature_map_attention import FeatureMapAttention
from rxlm.nn.linear_attention import LinearSelfAttention
from rxlm.nn.linear_settings import FORMS
from rxlm.nn.mixers import MIXERS, SoftmaxMixer, register_mixer
from rxlm.nn.window_attention import WindowAttention
from rxlm.ops.linear_attention import select_backend
from rxlm.study.settings import StudySettings

register_attention = register_mixer
"""The decorator that enters a mechanism into the one table of mixers."""

TITLES = {
    "softmax": "softmax",
    "local": "window",
    "elu": "ELU + 1",
    "taylor": "Taylor",
    "gla": "GLA",
    "deltanet": "DeltaNet",
    "gated_deltanet": "Gated DeltaNet",
    "kda": "KDA",
    "based": "Based",
    "gated_conv": "gated conv",
}
"""What tables call a mechanism; others go by their name."""

__all__ = [
    "TITLES",
    "Backend",
    "backend_of",
    "check_mechanisms",
    "load_plugins",
    "register_attention",
    "register_task",
    "set_backend",
    "title",
]


class Backend(NamedTuple):
    """Who computes a mechanism; part of every row."""

    backend_requested: str
    backend: str
    """Who ran."""
    backend_version: str
    backend_reason: str
    """Why that one."""


def title(name: str) -> str:
    """Return what tables call a mechanism."""
    return TITLES.get(name, name)


def load_plugins(plugins: Sequence[str]) -> None:
    """Import files or modules that register mechanisms and tasks, each once in a process.

    Raises:
        UserError: for a file or a module that is not there.
    """
    for plugin in plugins:
        if not plugin.endswith(".py"):
            try:
                importlib.import_module(plugin)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"plugin {plugin!r}: {error}. Give a file that ends in .py, or a module that "
                    "can be imported."
                ) from error
            continue
        path = Path(plugin).resolve()
        if not path.is_file():
            raise UserError(f"plugin {plugin}: there is no such file.")
        name = f"rxlm_study_plugin_{path.stem}_{abs(hash(str(path))):x}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def check_mechanisms(settings: StudySettings) -> None:
    """Load plugins, and raise ``UserError`` for a mechanism that is not in the table."""
    load_plugins(settings.plugins)
    for name in settings.attention:
        if name not in MIXERS:
            raise UserError(
                f"mechanism {name!r} does not exist: use one of {', '.join(MIXERS)}, or register "
                "it in a file and name that with --plugin."
            )


def backend_of(
    mixer: nn.Module,
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    form: str = "",
    needs_gradient: bool = False,
    strict: bool = False,
) -> Backend:
    """Say who computes a mixer (or what wraps one).

    Args:
        mixer: as it was built.
        requested: ``auto``, ``torch`` or ``fla``; only linear attention has a choice.
        device: where.
        dtype: of its input.
        form: ``chunk``, ``recurrent`` or ``step``; default: that of many tokens.
        needs_gradient: whether the result will be differentiated.
        strict: whether a backend that was asked for and cannot run is an error.

    Raises:
        UserError: if ``strict``, and the backend that was asked for cannot run.
    """
    for part in mixer.modules():
        if isinstance(part, LinearSelfAttention):
            settings = part.settings
            options = {
                "form": form or FORMS[settings.mode],
                "device": device,
                "dtype": dtype,
                "key_dim": settings.key_dim,
                "needs_gradient": needs_gradient,
            }
            try:
                choice = select_backend(settings.mechanism, backend=requested, **options)  # type: ignore[arg-type]
            except UserError:
                if strict:
                    raise
                choice = select_backend(settings.mechanism, backend="auto", **options)  # type: ignore[arg-type]
            version = _version("fla-core") if choice.name == "fla" else torch.__version__
            return Backend(requested, choice.name, version, choice.reason)
    # Whatever wraps them, these are what computes.
    known = {
        SoftmaxMixer: "torch (scaled_dot_product_attention)",
        WindowAttention: "torch (blocks of scaled_dot_product_attention)",
        FeatureMapAttention: "torch (chunks)",
    }
    for part in mixer.modules():
        for kind, name in known.items():
            if isinstance(part, kind):
                return Backend(requested, name, torch.__version__, "the only implementation")
    name = f"torch ({type(mixer).__module__}.{type(mixer).__qualname__})"
    return Backend(requested, name, torch.__version__, "the only implementation")


def set_backend(module: nn.Module, requested: str, strict: bool) -> None:
    """Make the linear attention inside ``module`` compute with the backend that was asked for.

    Where it cannot run, ``auto`` takes its place, and the rows say so (:func:`backend_of`), unless
    ``strict``: then the first call raises.
    """
    for part in module.modules():
        if isinstance(part, LinearSelfAttention):
            backend = requested
            if requested == "fla" and not strict:
                backend = "auto"  # takes fla wherever it can run
            part.settings = dataclasses.replace(part.settings, backend=backend)  # type: ignore[arg-type]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
