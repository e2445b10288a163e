"""Cross-entropy of an output layer, without all of its scores at once.

The N * V scores of N tokens are often the largest tensor of a training step, and exist several
times: in the dtype of products, in fp32 for the softmax, and as gradients. Here they are made, used
and dropped a chunk of rows at a time. The softmax is always of fp32 or better. Not here: where
hidden states and labels come from (``rxlm.training.objectives``), sampling.

Shapes: N tokens, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from rxlm.errors import UserError

Reduction = Literal["mean", "sum", "none"]

WHOLE_SCORES = 2**23
"""Up to so many scores (32 MB in fp32) are computed in one piece: chunks would save nothing."""
FEWEST_ROWS = 512
"""Of a chunk, however large the vocabulary: each chunk reads the whole weight and writes its
gradient, which fewer rows would not pay for."""
_IGNORED = -(2**31)
"""No label: torch would leave out -100, which here is a mistake."""


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
    return_correct: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
    return_correct: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``F.cross_entropy(F.linear(hidden, weight, bias), labels)``, chunk by chunk.

    For ``mean`` and ``sum`` the gradients are computed with the loss, from the same scores, and
    wait as ``[N, D]`` and ``[V, D]`` for the backward pass, so no score is computed twice; call it
    under ``torch.no_grad()`` where no gradient is wanted. For ``none``, where the weights of the
    losses are not known yet, the backward pass computes each chunk's scores again. A gradient of
    the weight is summed over chunks in fp32 or better.

    One chunk is the plain computation. In more, loss and gradients are equal up to the order of
    sums.

    Args:
        hidden: ``[N, D]``.
        weight: of the output layer, ``[V, D]``; may be that of the embedding, too.
        bias: ``[V]`` or None.
        labels: int64 ``[N]``, each in ``0 .. V - 1``; no value is ignored, so leave out rows.
        chunk_size: rows whose scores exist at once; None: all of them up to ``WHOLE_SCORES``
            scores, beyond that as many as make so many, ``FEWEST_ROWS`` at least.
        reduction: ``mean`` or ``sum`` over tokens, or ``none``.
        return_correct: whether to count, too, the tokens whose best score is the label's.

    Returns:
        the loss, ``[]`` or ``[N]``, in fp32 or better; with ``return_correct`` a pair of it and an
        int64 count ``[]``.

    Raises:
        UserError: for shapes, labels, a chunk size or a reduction that cannot be; in the backward
            pass, if a second derivative is asked for (``create_graph=True``) through several
            chunks.
    """
    _check(hidden, weight, bias, labels, chunk_size, reduction)
    num_rows = len(hidden)
    size = chunk_size or _rows_of_a_chunk(num_rows, len(weight))
    if size >= num_rows:
        loss, correct = _plain(hidden, weight, bias, labels, reduction, return_correct)
    else:
        loss, correct = _Chunked.apply(
            *(hidden, weight, bias, labels, size),
            *(reduction != "none", return_correct, torch.is_grad_enabled()),
        )
        loss = loss / num_rows if reduction == "mean" else loss
    return (loss, correct) if return_correct else loss


def _rows_of_a_chunk(num_rows: int, vocab_size: int) -> int:
    if num_rows * vocab_size <= WHOLE_SCORES:
        return num_rows
    most = max(FEWEST_ROWS, WHOLE_SCORES // vocab_size)
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks)  # of equal size: no small rest


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    reduction: str,
    count_correct: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the number of right predictions (0 if not asked for)."""
    scores = F.linear(hidden, weight, bias)
    scores = scores.to(_sum_dtype(scores.dtype))
    loss = F.cross_entropy(scores, labels, reduction=reduction, ignore_index=_IGNORED)
    return loss, _correct(scores, labels, count_correct)


def _correct(scores: Tensor, labels: Tensor, is_wanted: bool) -> Tensor:
    if not is_wanted:
        return labels.new_zeros(())
    return (scores.detach().argmax(dim=-1) == labels).sum()


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return what products are computed in: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _Chunked(torch.autograd.Function):
    """Losses, summed or not, and the number of right predictions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        is_sum: bool,
        count_correct: bool,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.is_sum, ctx.chunk_size, ctx.dtype = is_sum, chunk_size, _product_dtype(hidden)
        needs = [with_gradients and is_sum and need for need in ctx.needs_input_grad[:3]]
        losses, correct, grads = _run(
            (hidden, weight, bias), labels, ctx.chunk_size, ctx.dtype, needs, None, count_correct
        )
        if is_sum:
            ctx.save_for_backward(*grads)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.mark_non_differentiable(correct)
        return losses.sum() if is_sum else losses, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_correct: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError(
                "linear_cross_entropy: there is no second derivative of a loss that was computed "
                "in chunks. Leave out create_graph=True, or give chunk_size=len(hidden)."
            )
        grads: list[Tensor | None]
        if ctx.is_sum:
            grads = [
                # The factor is often 1 / N, which bfloat16 would round.
                None if grad is None else (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype)
                for grad in ctx.saved_tensors
            ]
        else:
            *parameters, labels = ctx.saved_tensors
            needs = list(ctx.needs_input_grad[:3])
            grads = _run(
                tuple(parameters), labels, ctx.chunk_size, ctx.dtype, needs, grad_loss, False
            )[2]
        return (*grads, None, None, None, None, None)


def _run(
    parameters: tuple[Tensor | None, ...],
    labels: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    needs: Sequence[bool],
    factors: Tensor | None,
    count_correct: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Go through the chunks.

    Args:
        parameters: hidden states, weight and bias.
        labels: ``[N]``.
        chunk_size: rows of a chunk.
        dtype: of the products (that of autocast, if it is on).
        needs: of which of the three a gradient is wanted.
        factors: what each loss counts, ``[N]``; None: 1.
        count_correct: whether to count right predictions.

    Returns:
        losses ``[N]``, the count, and gradients of the weighted sum of the losses.
    """
    # As autocast would cast, but once, not for every chunk.
    hidden, weight, bias = (value if value is None else value.to(dtype) for value in parameters)
    assert hidden is not None
    assert weight is not None
    exact = _sum_dtype(dtype)
    losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    correct = labels.new_zeros(())
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            scores = F.linear(hidden[rows], weight, bias)
            correct += _correct(scores, labels[rows], count_correct)
            log_probs = F.log_softmax(scores, dim=-1, dtype=exact)
            del scores
            losses[rows] = F.nll_loss(
                log_probs, labels[rows], reduction="none", ignore_index=_IGNORED
            )
            if not any(needs):
                continue
            errors = _score_gradients(log_probs, labels[rows])
            del log_probs
            if factors is not None:
                errors *= factors[rows, None]
            if grad_bias is not None:
                grad_bias += errors.sum(dim=0)
            errors = errors.to(dtype)
            if grad_hidden is not None:
                torch.mm(errors, weight, out=grad_hidden[rows])
            if grad_weight is not None and dtype == exact:
                grad_weight.addmm_(errors.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += errors.T @ hidden[rows]
    grads = (grad_hidden, grad_weight, grad_bias)
    return (
        losses,
        correct,
        [
            None if grad is None or value is None else grad.to(value.dtype)
            for grad, value in zip(grads, parameters, strict=True)
        ],
    )


def _score_gradients(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the gradients of the scores, softmax - one-hot, in the place of ``log_probs``."""
    errors = log_probs.exp_()
    return errors.scatter_add_(1, labels[:, None], errors.new_full((len(labels), 1), -1.0))


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk_size: int | None,
    reduction: str,
) -> None:
    where = "linear_cross_entropy: "
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"{where}reduction='{reduction}': expected mean, sum or none.")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"{where}chunk_size={chunk_size}: expected a positive number, or None.")
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or labels.shape != hidden.shape[:1]:
        raise UserError(
            f"{where}hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels "
            f"{list(labels.shape)} do not fit: expected [N, D], [V, D] and [N]. Flatten rows first."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"{where}bias {list(bias.shape)}: expected [{len(weight)}], or None.")
    if _product_dtype(hidden) != _product_dtype(weight):
        raise UserError(
            f"{where}hidden is {hidden.dtype} and weight {weight.dtype}: convert one of them, or "
            "use autocast."
        )
    # On a GPU looking at labels would wait for them; there torch's kernels end on a bad one.
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= len(weight):
            raise UserError(
                f"{where}label {low if low < 0 else high} is outside 0 .. {len(weight) - 1}. Leave "
                "out the rows of tokens that are not to be predicted."
            )
