"""KDA with a state that is changed between chunks: the oracle is the loop, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention import kda, kda_with_starts, l2_normalize

KEY_DIM, VALUE_DIM = 6, 4


def arguments(
    batch: int, chunks: int, size: int, heads: tuple[int, int], seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return random tensors, and a mask that hides tokens anywhere."""
    generator = torch.Generator().manual_seed(seed)
    length = chunks * size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    made = {
        "query": l2_normalize(normal(batch, length, heads[0], KEY_DIM)),
        "key": l2_normalize(normal(batch, length, heads[0], KEY_DIM)),
        "value": normal(batch, length, heads[1], VALUE_DIM),
        "log_decay": -3 * uniform(batch, length, heads[1], KEY_DIM),
        "write_strength": uniform(batch, length, heads[1]),
        "keep": uniform(batch, chunks, heads[1]),
        "added": normal(batch, chunks, heads[1], KEY_DIM, VALUE_DIM),
        "initial_state": normal(batch, heads[1], KEY_DIM, VALUE_DIM),
    }
    mask = uniform(batch, length) < 0.8
    return {name: x.requires_grad_() for name, x in made.items()}, mask


def one_after_the_other(
    given: dict[str, Tensor], key_mask: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition."""
    of_tokens = {k: x for k, x in given.items() if k not in ("keep", "added", "initial_state")}
    size = key_mask.shape[1] // cut.shape[1]
    outputs, states = [], [given["initial_state"]]
    for chunk in range(cut.shape[1]):
        tokens = slice(chunk * size, (chunk + 1) * size)
        state = torch.where(cut[:, chunk, None, None, None], states[-1].detach(), states[-1])
        result = kda(
            **{name: x[:, tokens] for name, x in of_tokens.items()},
            initial_state=given["keep"][:, chunk, :, None, None] * state + given["added"][:, chunk],
            key_mask=key_mask[:, tokens],
            form="recurrent",
        )
        outputs.append(result.output)
        states.append(result.final_state)
    return torch.cat(outputs, dim=1), torch.stack(states)


def gradients(results: tuple[Tensor, Tensor], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in results:
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        loss = loss + (tensor * weight).sum()
    return torch.autograd.grad(loss, list(given.values()))


@given(
    batch=st.integers(1, 3),
    chunks=st.integers(1, 5),
    size=st.sampled_from([1, 2, 8]),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 4)]),
    seed=st.integers(0, 99),
)
def test_chunks_at_once_are_chunks_in_order(
    batch: int, chunks: int, size: int, heads: tuple[int, int], seed: int
) -> None:
    """Catches chunks in the wrong order, a start that is applied twice or to another chunk,
    padding that leaves a trace, and a gradient that is cut elsewhere."""
    made, mask = arguments(batch, chunks, size, heads, seed)
    cut = torch.rand(batch, chunks, generator=torch.Generator().manual_seed(seed)) < 0.3
    found = kda_with_starts(**made, key_mask=mask, cut=cut)
    wanted = one_after_the_other(made, mask, cut)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(found, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": torch.ones(2, 3, 1)}, r"keep has shape \[2, 3, 1\], expected \[2, 3, 2\]"),
        ({"keep": torch.ones(2, 3)}, r"keep has shape \[2, 3\]"),
        ({"added": torch.ones(2, 3, 2, 4, 6)}, r"added has shape .* expected \[2, 3, 2, 6, 4\]"),
        ({"cut": torch.ones(2, 4, dtype=torch.bool)}, r"cut has shape .* expected \[2, 3\]"),
        ({"initial_state": torch.ones(4, 2, 6, 4)}, "initial_state"),
        ({"key_mask": torch.ones(2, 12)}, r"expected torch\.bool"),
        ({"log_decay": torch.ones(2, 12, 2, 6)}, "log_decay reaches 1"),
        (
            {"keep": torch.ones(2, 5, 2), "added": torch.ones(2, 5, 2, 6, 4)},
            "12 tokens are not a multiple of the 5 chunks",
        ),
        (
            {"keep": torch.ones(2, 4, 2), "added": torch.ones(2, 4, 2, 6, 4)},
            "chunk_size 3 is not a power of two",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """Catches shapes that broadcast to a wrong result without a word."""
    made, _ = arguments(2, 3, 4, (2, 2), 0)
    with pytest.raises(UserError, match=message):
        kda_with_starts(**{**made, **changes})
