"""Muon for the matrices of layers and AdamW for everything else, as one optimizer.

Muon (K. Jordan et al., 2024) replaces the averaged gradient of a matrix by the nearest
semi-orthogonal one, so that all directions of the matrix learn at the same pace. Its updates are
scaled to the size of AdamW's (J. Liu et al., "Muon is Scalable for LLM Training", 2025,
arXiv 2502.16982), so that one learning rate and one weight decay serve both.

Not here: the two algorithms, which are torch's; which parameters decay (``optim.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from rxlm.training.settings import TrainSettings

_IS_MUON = "is_muon"


def layer_matrices(module: nn.Module) -> set[int]:
    """Return the ``id`` of every parameter that Muon should train: what maps a layer's width.

    These are the weights of linear layers. Left out: tables of tokens (shared with the output
    layer or not), the output layer, what never decays (gates), and what is no matrix, such as the
    stacked matrices of experts, which torch's Muon does not take.
    """
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.Linear)
        and isinstance(part.weight, nn.Parameter)
        and part.weight.ndim == 2
        and id(part.weight) not in tables
        and not getattr(part.weight, "_no_weight_decay", False)
        and not getattr(part.weight, "_scores_tokens", False)
    }


def split_groups(groups: Iterable[Mapping[str, Any]], matrices: set[int]) -> list[dict[str, Any]]:
    """Split every group into what Muon trains and what AdamW trains; empty ones are left out."""
    parts = [
        {**group, "params": [item for item in group["params"] if (id(item) in matrices) is is_muon],
         _IS_MUON: is_muon}
        for group in groups
        for is_muon in (True, False)
    ]  # fmt: skip
    return [part for part in parts if part["params"]]


def fields_of(group: Mapping[str, Any]) -> set[str]:
    """Return what the optimizer of a group keeps of each parameter, by name."""
    return {"momentum_buffer"} if group.get(_IS_MUON) else {"step", "exp_avg", "exp_avg_sq"}


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and torch's AdamW over the groups of one optimizer.

    State, learning rates and groups are those of this object; the two see the same ones.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: TrainSettings) -> None:
        """Begin.

        Args:
            groups: as :func:`split_groups` returns them.
            settings: ``lr``, ``weight_decay`` and ``momentum`` of Muon; ``betas`` and ``eps`` of
                AdamW.
        """
        super().__init__(groups, {"lr": settings.lr, "weight_decay": settings.weight_decay})
        shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        self._parts: list[torch.optim.Optimizer] = []
        if matrices := self._groups(is_muon=True):
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    momentum=settings.momentum,
                    adjust_lr_fn="match_rms_adamw",
                    **shared,
                )
            )
        if others := self._groups(is_muon=False):
            self._parts.append(
                torch.optim.AdamW(
                    others, betas=settings.betas, eps=settings.eps, fused=True, **shared
                )
            )
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the two parts go on from it."""
        super().load_state_dict(state_dict)
        self._share()

    def _groups(self, *, is_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[_IS_MUON] is is_muon]

    def _share(self) -> None:
        """Let the parts work on this object's groups and state."""
        for part in self._parts:
            part.param_groups = self._groups(is_muon=isinstance(part, torch.optim.Muon))
            part.state = cast("dict[Tensor, Any]", self.state)  # type: ignore[assignment]
