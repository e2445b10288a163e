"""Weights as a CPU reads them fastest for one token: column by column.

A product of one row with a matrix reads the whole matrix once. Kept row by row ``[out, in]``, as
training keeps it, every output is a short dot product, and libraries reach a fraction of the
memory's bandwidth (``matrix times vector`` beside ``triad`` in ``benchmarks/decode.py``); kept
column by column, the outputs are summed up together along memory. The parameters stay what they
are, the values and shapes too; only their strides change, so nothing that uses or saves them has
to know. Products are summed up in another order, so their last bits may differ.

Small matrices stay as they are: a compiled step reads them along their rows
(:mod:`rxlm.rxt.one_row_products`), as it does experts, by index.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxlm.rxt.components import RxTDecoder
from rxlm.rxt.one_row_products import SMALL


def keep_by_columns(decoder: RxTDecoder) -> None:
    """Change the memory layout of the large matrices that every step of a decoder reads.

    Does nothing for those that are kept like that already, and on other devices than CPUs.
    """
    for weight in _matrices(decoder):
        large = weight.numel() > SMALL or weight.dtype != torch.float32
        if large and weight.device.type == "cpu" and not weight.t().is_contiguous():
            # What inference mode makes could not be trained later.
            with torch.inference_mode(mode=False), torch.no_grad():
                weight.data = weight.detach().t().contiguous().t()


def _matrices(decoder: RxTDecoder) -> list[Tensor]:
    tied = decoder.config.tie_embeddings
    head = decoder.embedding.weight if tied else decoder.head_weight
    layers = [
        part.weight
        for part in decoder.modules()
        if isinstance(part, nn.Linear) and isinstance(part.weight, nn.Parameter)
    ]
    return [weight for weight in (head, *layers) if weight.is_floating_point()]
