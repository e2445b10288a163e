"""Rows of token ids of different lengths as one tensor, and whether ids are of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rxlm.errors import UserError


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Return right-padded ids, int64 ``[B, T]``, and the bool mask of the real ones.

    T is the longest row's length, at least one.
    """
    longest = max(1, max(len(row) for row in rows))
    ids = torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.view(len(rows), longest), torch.arange(longest) < lengths[:, None]


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raise ``UserError`` if ``what`` holds ids outside ``0 .. vocab_size - 1``."""
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise UserError(
            f"{what} holds token id {outside[0]}, outside the model's vocabulary of {vocab_size} "
            "tokens: it was made with another tokenizer."
        )
