"""Which parameters belong to the memory, the embedding, the output layer, and the rest.

For freezing and for learning rates of their own. Works on a whole network and on its components.
Not here: which of them a training stage trains (:mod:`rxlm.training.objectives.model_objective`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from rxlm.errors import UserError
from rxlm.memory.attention import MemoryAttention
from rxlm.nn.int8_linear import require_trainable

Group = Literal["memory", "memory_norms", "embedding", "head", "body"]
"""``memory``: memory attention, memory cross-attention, and what MD-GDN reads of a memory;
``memory_norms``: norms before memory cross-attention; ``embedding``; ``head``: the output layer
and its norm (a tied output layer is the embedding); ``body``: everything else."""

GROUPS: tuple[Group, ...] = get_args(Group)


def parameter_groups(module: nn.Module) -> dict[Group, dict[str, nn.Parameter]]:
    """Return all parameters by group and name; a shared one once, under its first name.

    Args:
        module: a network, a decoder, an encoder or a memory attention.
    """
    groups: dict[Group, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    writers = {
        f"{name}.".lstrip(".")
        for name, part in module.named_modules()
        if isinstance(part, MemoryAttention)
    }
    for name, parameter in module.named_parameters():
        writes = any(name.startswith(prefix) for prefix in writers)
        groups["memory" if writes else _group_of(name)][name] = parameter
    return groups


def train_only(module: nn.Module, groups: Iterable[Group]) -> int:
    """Let the parameters of ``groups`` train and freeze all others.

    Args:
        module: as of :func:`parameter_groups`.
        groups: for example ``("memory", "memory_norms")``; none freezes everything.

    Returns:
        the number of parameters that train.

    Raises:
        UserError: for a group that does not exist, or if int8 weights should train; nothing is
            changed then.
    """
    wanted = _checked(groups)
    if wanted:
        require_trainable(module)
    count = 0
    for group, parameters in parameter_groups(module).items():
        for parameter in parameters.values():
            parameter.requires_grad_(group in wanted)
            count += parameter.numel() if group in wanted else 0
    return count


def set_trainable(module: nn.Module, groups: Iterable[Group], trainable: bool) -> None:
    """Freeze the parameters of ``groups``, or let them train; others stay as they are.

    Raises:
        UserError: as :func:`train_only`.
    """
    wanted = _checked(groups)
    if trainable:
        require_trainable(module)
    for group, parameters in parameter_groups(module).items():
        for parameter in parameters.values() if group in wanted else ():
            parameter.requires_grad_(trainable)


def _checked(groups: Iterable[Group]) -> tuple[Group, ...]:
    wanted = tuple(groups)
    for group in wanted:
        if group not in GROUPS:
            near = difflib.get_close_matches(group, GROUPS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"parameter group '{group}' does not exist: use {', '.join(GROUPS)}.{hint}"
            )
    return wanted


def _group_of(name: str) -> Group:
    parts = name.split(".")
    if "embedding" in parts:
        return "embedding"
    if "cross_attention" in parts or "memory_fusion" in parts:
        return "memory"
    if "norm_cross" in parts or "norm_slots" in parts:
        return "memory_norms"
    if any(part.startswith("head_") for part in parts):
        return "head"
    return "body"
