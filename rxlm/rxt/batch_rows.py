"""What a batch is given, row by row: ids out of padded tensors, settings, seeds. Pure functions.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings

ValueType = TypeVar("ValueType")

PerRow: TypeAlias = ValueType | Sequence[ValueType]
"""One value for all rows, or one for each."""


def row_ids(
    input_ids: Tensor, attention_mask: Tensor | None, batch_size: int, pad_id: int
) -> list[list[int]]:
    """Return the real ids of each row; a row may have none.

    Args:
        input_ids: integers ``[B, T]``.
        attention_mask: which ids are real, same shape (bool, or 0 and 1); None = all.
        batch_size: B.
        pad_id: [PAD], which is no real id.

    Raises:
        UserError: if shapes do not fit, or there is padding and no mask.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != batch_size:
        raise UserError(
            f"input_ids has shape {list(input_ids.shape)}, but the model holds {batch_size} "
            f"conversations: give [{batch_size}, T], one row each (without real ids where a row "
            "has nothing to say)."
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise UserError(f"input_ids has dtype {input_ids.dtype}; expected integers.")
    if attention_mask is None:
        if bool((input_ids == pad_id).any()):
            raise UserError(
                f"input_ids holds [PAD] ({pad_id}) but attention_mask is None: pass the mask that "
                "says which ids are real, as tokenize_batch() returns it."
            )
        return [[int(token) for token in row] for row in input_ids.tolist()]
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids "
            f"{list(input_ids.shape)}: they must be equal."
        )
    mask = attention_mask.bool().tolist()
    return [
        [int(token) for token, real in zip(row, kept, strict=True) if real]
        for row, kept in zip(input_ids.tolist(), mask, strict=True)
    ]


def single_row_ids(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Return the real ids of the only row, ``[1, T]`` or ``[T]``.

    Raises:
        UserError: if there are several rows, or the mask has another shape.
    """
    ids = input_ids if input_ids.dim() > 1 else input_ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise UserError(
            f"input_ids has shape {list(input_ids.shape)}: the held conversation takes one row "
            "[1, T]. Answer many conversations with set_batch_mode() and batch_interact(), or with "
            "generate() and update_memory()."
        )
    if attention_mask is None:
        return [int(token) for token in ids[0].tolist()]
    mask = attention_mask if attention_mask.dim() > 1 else attention_mask[None]
    if mask.shape != ids.shape:
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids "
            f"{list(input_ids.shape)}: they must be equal."
        )
    return [int(token) for token in ids[0][mask[0].bool()].tolist()]


def settings_of_rows(
    values: Mapping[str, Any], batch_size: int, what: str
) -> list[SamplingSettings]:
    """Return each row's sampling settings; each of ``values`` is for all rows or one a row.

    Raises:
        UserError: if a value is not valid, or a sequence has not B values.
    """
    columns = {name: _column(name, value, batch_size) for name, value in values.items()}
    if all(column is None for column in columns.values()):
        return [SamplingSettings.parse(dict(values), what)] * batch_size
    return [
        SamplingSettings.parse(
            {
                name: values[name] if column is None else column[row]
                for name, column in columns.items()
            },
            f"{what}, row {row}",
        )
        for row in range(batch_size)
    ]


def seeds_of_rows(seed: PerRow[int | None], batch_size: int) -> list[int | None]:
    """Return each row's new seed: ``seed + b`` for row b, those of a sequence, None for none.

    Raises:
        UserError: if a sequence has not B values, or a value is no whole number.
    """
    column = _column("seed", seed, batch_size)
    if column is not None:
        return [None if value is None else _whole("seed", value) for value in column]
    if seed is None:
        return [None] * batch_size
    first = _whole("seed", seed)
    return [first + row for row in range(batch_size)]


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r}: expected a whole number.") from None


def _column(name: str, value: Any, batch_size: int) -> list[Any] | None:
    """Return the values of a sequence; None for a value that all rows share."""
    if hasattr(value, "tolist"):  # A tensor or an array, of one value or of many.
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return None
    if len(value) != batch_size:
        raise UserError(
            f"{name} has {len(value)} values for {batch_size} conversations: give one for all, or "
            "one each."
        )
    return list(value)
