"""Weights of fla's layers (flash-linear-attention) as weights of :class:`LinearSelfAttention`.

Names of fla 0.4 to 0.6: GatedLinearAttention, DeltaNet, GatedDeltaNet, KimiDeltaAttention. Needs
no fla. Not here: fla's options that this package does not have (their weights are refused).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.linear_settings import LinearAttentionSettings

_PARTS = ("q", "k", "v")
_RENAMED = {
    "o_proj.weight": "output.weight",
    "b_proj.weight": "gates.write.weight",
    "A_log": "gates.A_log",
    "dt_bias": "gates.dt_bias",
    "o_norm.weight": "norm.weight",
    "g_norm.weight": "norm.weight",
    "g_norm_swish_gate.weight": "norm.weight",
    "a_proj.weight": "gates.decay.weight",
    "g_proj.weight": "output_gate.weight",
    **{f"g_proj.{name}": f"output_gate.{name}" for name in ("0.weight", "1.weight", "1.bias")},
    **{f"f_proj.{name}": f"gates.decay.{name}" for name in ("0.weight", "1.weight")},
    **{f"gk_proj.{name}": f"gates.decay.{name}" for name in ("0.weight", "1.weight", "1.bias")},
}


def from_fla(settings: LinearAttentionSettings, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a state dictionary of one fla layer.

    Args:
        settings: of the module that will load the result.
        weights: what ``state_dict()`` of the fla layer gives.

    Returns:
        What ``LinearSelfAttention(settings).load_state_dict`` takes.

    Raises:
        UserError: for weights that are missing or that have no place in such a module.
    """
    joined = {"query_key_value.weight": [f"{part}_proj.weight" for part in _PARTS]}
    if settings.conv_size is not None:
        joined["short_convolution.weight"] = [f"{part}_conv1d.weight" for part in _PARTS]
    taken = {name for names in joined.values() for name in names}
    missing = sorted(taken - weights.keys())
    foreign = sorted(weights.keys() - taken - _RENAMED.keys())
    if missing or foreign:
        raise UserError(
            f"weights of fla's {settings.mechanism}: missing {missing or 'none'}, without a place "
            f"{foreign or 'none'}. Settings have to describe the same layer (conv_size="
            f"{settings.conv_size}); biases of convolutions and query, key and value projections "
            "are not supported."
        )
    result = {name: torch.cat([weights[part] for part in parts]) for name, parts in joined.items()}
    if settings.conv_size is not None:
        result["short_convolution.weight"] = result["short_convolution.weight"].squeeze(1)
    for name, tensor in weights.items():
        if name not in taken:
            # fla 0.4 keeps A_log as [1, 1, H, 1].
            result[_RENAMED[name]] = tensor.flatten() if name == "A_log" else tensor
    return result
