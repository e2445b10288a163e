"""The optimizer with named state: parameter groups, construction, its state as named tensors.

Not here: learning rates (``schedule.py``) and the update itself (``update.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.training.master_weights import MasterWeights
from rxlm.training.muon import MuonAdamW, fields_of, layer_matrices, split_groups
from rxlm.training.settings import TrainSettings

logger = logging.getLogger(__name__)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name; a tied parameter appears once.

    Raises:
        UserError: when there is none.
    """
    found = {name: param for name, param in module.named_parameters() if param.requires_grad}
    if not found:
        raise UserError(
            f"{type(module).__name__}: every parameter is frozen, so there is nothing to train. "
            "Unfreeze a part of the model."
        )
    return found


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Matrices and tables (two or more dimensions) decay unless they carry a true attribute
    ``_no_weight_decay``; vectors and scalars (biases, norms, gates) do not.
    """
    parameters = trainable_parameters(module).values()
    decays = [item for item in parameters if _decays(item)]
    others = [item for item in parameters if not _decays(item)]
    groups = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    settings: TrainSettings,
    masters: MasterWeights | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer over ``groups``; with ``masters``, over those of their parameters.

    Raises:
        ValueError: when a trainable parameter is in no group or in several, or a group holds a
            parameter that does not train.
    """
    names = {id(param): name for name, param in trainable_parameters(module).items()}
    grouped = [param for group in groups for param in group["params"]]
    strangers = [tuple(param.shape) for param in grouped if id(param) not in names]
    missing = sorted(names.keys() - {id(param) for param in grouped})
    if strangers or missing or len(grouped) != len(names):
        raise ValueError(
            "parameter_groups must hold every trainable parameter exactly once: "
            f"{len(grouped)} grouped, {len(names)} trainable, missing "
            f"{[names[key] for key in missing]}, not trainable (shapes) {strangers}."
        )
    if settings.optimizer == "muon":
        groups = split_groups(groups, layer_matrices(module))
    optimized = [
        {"lr_scale": 1.0, **group, "params": _optimized(group["params"], masters)}
        for group in groups
    ]
    if settings.optimizer == "muon":
        return MuonAdamW(optimized, settings)
    # The fused kernel exists for these devices and saves a dozen launches per parameter.
    fused = all(param.device.type in {"cpu", "cuda"} for param in grouped)
    return torch.optim.AdamW(
        optimized,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights | None = None
) -> dict[str, Tensor]:
    """Return the optimizer state as tensors named ``<parameter>/exp_avg`` and the like."""
    parameters = trainable_parameters(module)
    optimized = _optimized(parameters.values(), masters)
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, param in zip(parameters, optimized, strict=True)
        for key, value in optimizer.state.get(param, {}).items()
    }


def load_optimizer_tensors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    masters: MasterWeights | None = None,
) -> None:
    """Put back what :func:`optimizer_tensors` returned.

    A parameter that trains now and has no saved state begins with fresh moments; saved state of a
    parameter that no longer trains is dropped. (Which parts train is a setting of the run, and
    the Trainer logs that it changed.)

    Raises:
        UserError: when a saved tensor does not fit its parameter, or another optimizer kept it.
    """
    parameters = trainable_parameters(module)
    optimized = _optimized(parameters.values(), masters)
    names = {id(param): name for name, param in zip(parameters, optimized, strict=True)}
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        by_parameter.setdefault(name, {})[field] = tensor
    state: dict[int, dict[str, Tensor]] = {}
    ordered = [
        (param, fields_of(group)) for group in optimizer.param_groups for param in group["params"]
    ]
    for index, (param, fields) in enumerate(ordered):
        name = names[id(param)]
        saved = by_parameter.get(name, {})
        if saved and saved.keys() != fields:
            raise UserError(
                f"the optimizer state of {name} holds {', '.join(sorted(saved))}, but this run's "
                f"optimizer keeps {', '.join(sorted(fields))}: train.optimizer has changed. Go on "
                "with the one that the run began with, or begin a new run from its weights "
                "(init_from)."
            )
        for field, tensor in saved.items():
            if tensor.ndim and tensor.shape != param.shape:
                raise UserError(
                    f"optimizer state {name}/{field} has shape {tuple(tensor.shape)}, but the "
                    f"parameter has {tuple(param.shape)}: this checkpoint is of another model."
                )
        if saved:
            state[index] = saved
    # Through the public method, which knows where each optimizer keeps its step counter.
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _optimized(parameters: Iterable[Tensor], masters: MasterWeights | None) -> list[Tensor]:
    return [param if masters is None else masters.of(param) for param in parameters]


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
