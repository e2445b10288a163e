"""Cross-entropy in chunks against torch's own, and the promise that all scores never exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rxlm.errors import UserError
from rxlm.ops import losses
from rxlm.ops.losses import linear_cross_entropy

REDUCTIONS = ("mean", "sum", "none")


class LargestTensor(TorchDispatchMode):
    """Records which operators run, backward included, and how large their largest result is."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def inputs(
    num_rows: int, vocab_size: int, dim: int = 5, bias: bool = True, dtype: Any = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(num_rows * 1000 + vocab_size)
    hidden = torch.randn(num_rows, dim, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, dim, generator=draw, dtype=dtype).requires_grad_()
    offset = torch.randn(vocab_size, generator=draw, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,), generator=draw)
    return hidden, weight, offset if bias else None, labels


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **options: Any):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, **options)


def gradients(loss: Tensor, values: Any) -> tuple[Tensor, ...]:
    """Gradients of a loss whose parts count unequally, and not 1 if there is one part."""
    factor = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view_as(loss)
    return torch.autograd.grad((loss * factor).sum(), [v for v in values if v is not None])


@given(
    num_rows=st.integers(1, 30),
    vocab_size=st.integers(1, 20),
    chunk_size=st.one_of(st.none(), st.integers(1, 35)),
    bias=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_chunks_equal_torch(
    num_rows: int, vocab_size: int, chunk_size: int | None, bias: bool, reduction: Any
) -> None:
    """Catches a lost or doubled rest of rows, a gradient of the wrong reduction or factor, and
    a count of right predictions that forgets a chunk."""
    values = inputs(num_rows, vocab_size, bias=bias)
    loss, correct = linear_cross_entropy(
        *values, chunk_size=chunk_size, reduction=reduction, return_correct=True
    )
    expected = plain(*values, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, wanted = gradients(loss, values[:3]), gradients(expected, values[:3])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    guesses = F.linear(*values[:3]).argmax(dim=-1)
    assert int(correct) == int((guesses == values[3]).sum())
    assert correct.dtype == torch.int64
    with torch.no_grad():
        again = linear_cross_entropy(*values, chunk_size=chunk_size, reduction=reduction)
    assert torch.equal(again, loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_scores_never_exist(reduction: Any) -> None:
    """Catches scores, or their gradients, of all rows: in the forward pass, the backward pass or
    an evaluation; and gradients that are computed where nobody can ask for them."""
    num_rows, vocab_size, chunk = 600, 40, 100
    values = inputs(num_rows, vocab_size, dtype=torch.float32)
    sizes = []
    for with_grad in (True, False):
        with LargestTensor() as largest, torch.set_grad_enabled(with_grad):
            loss = linear_cross_entropy(
                *values, chunk_size=chunk, reduction=reduction, return_correct=True
            )[0]
            if with_grad:
                loss.sum().backward()
        sizes.append(largest.numel)
        assert ("aten.exp_.default" in largest.names) == with_grad
    assert sizes == [chunk * vocab_size] * 2
    with LargestTensor() as largest:
        plain(*values, reduction=reduction).sum().backward()
    assert largest.numel == num_rows * vocab_size, "the recorder sees what it has to"


def test_chunks_are_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches chunks where one piece is cheaper, a default that holds everything, and a small
    rest. The limits are lowered so that the test is quick."""
    monkeypatch.setattr(losses, "WHOLE_SCORES", 2000)
    monkeypatch.setattr(losses, "FEWEST_ROWS", 16)
    for num_rows, vocab_size, rows in ((40, 50, 40), (41, 50, 21), (300, 400, 16), (33, 400, 11)):
        values = inputs(num_rows, vocab_size, dim=3)
        with LargestTensor() as largest:
            loss = linear_cross_entropy(*values)
        assert largest.numel == max(rows * vocab_size, 3 * vocab_size)
        assert (loss.grad_fn.name() == "NllLossBackward0") == (rows == num_rows)
        torch.testing.assert_close(loss, plain(*values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_a_tied_weight_gets_both_gradients(chunk_size: int) -> None:
    """Catches a gradient of the output layer that replaces that of the embedding, and one that
    changes what a second backward pass through the same graph finds."""
    hidden, weight, _, labels = inputs(11, 9)
    ids = labels.flip(0)
    loss = linear_cross_entropy(weight[ids] * hidden, weight, None, labels, chunk_size=chunk_size)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    (expected,) = torch.autograd.grad(plain(weight[ids] * hidden, weight, None, labels), [weight])
    torch.testing.assert_close(once, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    """Catches gradients that come out in the place of another, or that nobody asked for."""
    values = inputs(11, 9)
    place = ("hidden", "weight", "bias").index(frozen)
    values[place].requires_grad_(False)
    wanted = [value for value in values[:3] if value.requires_grad]
    found = torch.autograd.grad(linear_cross_entropy(*values, chunk_size=4), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(plain(*values), wanted))
    assert values[place].grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_bf16_keeps_softmax_and_sums_in_fp32(dtype: torch.dtype, reduction: Any) -> None:
    """Catches a softmax in bfloat16, a factor 1 / N that is rounded to it, and a gradient of the
    weight that is rounded after each of 300 chunks. Weights are fp32 under autocast, or bf16."""
    hidden, weight, bias, labels = inputs(300, 20, dim=16)
    values = [value.detach().to(dtype).requires_grad_() for value in (hidden, weight, bias)]
    exact = [value.detach().double().requires_grad_() for value in values]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = linear_cross_entropy(*values, labels, chunk_size=1, reduction=reduction)
        scores = F.linear(*values).float()
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(scores, labels, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found = gradients(loss, values)
    wanted = gradients(plain(*exact, labels, reduction=reduction), exact)
    assert [value.dtype for value in found] == [dtype] * 3
    for ours, true in zip(found, wanted, strict=True):
        assert (ours.double() - true).norm() < 0.01 * true.norm()


def test_second_derivatives_are_refused_clearly() -> None:
    """Catches a gradient that silently counts as a constant in a gradient penalty."""
    hidden, weight, bias, labels = inputs(11, 9)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(
            hidden, weight, bias, labels, chunk_size=4, reduction=reduction
        ).sum()
        with pytest.raises(UserError, match=r"no second derivative.*chunk_size=len"):
            torch.autograd.grad(loss, [hidden], create_graph=True)
    whole = linear_cross_entropy(hidden, weight, bias, labels, chunk_size=11)
    (grad,) = torch.autograd.grad(whole, [hidden], create_graph=True)
    assert grad.requires_grad


def test_no_rows() -> None:
    """Catches a division of work by zero rows: the sum of nothing is 0, as in torch."""
    values = inputs(0, 9)
    loss, correct = linear_cross_entropy(*values, reduction="sum", return_correct=True)
    loss.backward()
    assert (float(loss.detach()), int(correct)) == (0.0, 0)
    assert not values[1].grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((11,), -100)}, "label -100 is outside 0 .. 8"),
        ({"labels": torch.full((11,), 9)}, "label 9 is outside 0 .. 8"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels \[4\] do not fit"),
        ({"hidden": torch.zeros(1, 11, 5)}, r"hidden \[1, 11, 5\].*Flatten"),
        ({"bias": torch.zeros(5)}, r"bias \[5\]: expected \[9\]"),
        ({"hidden": torch.zeros(11, 5)}, r"torch.float32 and weight torch.float64"),
        ({"chunk_size": 0}, "chunk_size=0: expected a positive"),
        ({"reduction": "max"}, "reduction='max': expected mean, sum or none"),
    ],
)
def test_what_cannot_be_is_an_error(change: dict[str, Any], message: str) -> None:
    """Catches an ignored label, rows that are paired wrongly, and settings without a meaning."""
    given_values = dict(zip(("hidden", "weight", "bias", "labels"), inputs(11, 9), strict=True))
    arguments = {**given_values, "chunk_size": 4, **change}
    with pytest.raises(UserError, match=message):
        linear_cross_entropy(**arguments)
