"""KDA over turns at once: the loop over turns with the token-by-token form is the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.linear_attention import kda, kda_over_turns, l2_normalize


def arguments(
    turns: int, batch: int, length: int, heads: tuple[int, int], seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key_dim, value_dim, rows = 6, 4, turns * batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    made = {
        "query": l2_normalize(normal(rows, length, heads[0], key_dim)),
        "key": l2_normalize(normal(rows, length, heads[0], key_dim)),
        "value": normal(rows, length, heads[1], value_dim),
        "log_decay": -3 * uniform(rows, length, heads[1], key_dim),
        "write_strength": uniform(rows, length, heads[1]),
        "keep": uniform(turns, batch, heads[1]),
        "added": normal(turns, batch, heads[1], key_dim, value_dim),
        "initial_state": normal(batch, heads[1], key_dim, value_dim),
    }
    lengths = torch.randint(0, length + 1, (rows, 1), generator=generator)
    return {name: x.requires_grad_() for name, x in made.items()}, torch.arange(length) < lengths


def one_after_the_other(
    given: dict[str, Tensor], key_mask: Tensor, cut: int | None = None
) -> tuple[Tensor, Tensor]:
    """The definition."""
    per_turn = {k: x for k, x in given.items() if k not in ("keep", "added", "initial_state")}
    batch = given["keep"].shape[1]
    outputs, states = [], [given["initial_state"]]
    for turn, (keep, added) in enumerate(zip(given["keep"], given["added"], strict=True)):
        rows = slice(turn * batch, (turn + 1) * batch)
        state = states[-1].detach() if cut and turn and turn % cut == 0 else states[-1]
        result = kda(
            **{name: x[rows] for name, x in per_turn.items()},
            initial_state=keep[..., None, None] * state + added,
            key_mask=key_mask[rows],
            form="recurrent",
        )
        outputs.append(result.output)
        states.append(result.final_state)
    return torch.cat(outputs), torch.stack(states)


def gradients(results: tuple[Tensor, Tensor], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in results:
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        loss = loss + (tensor * weight).sum()
    return torch.autograd.grad(loss, list(given.values()))


@given(
    turns=st.integers(1, 5),
    batch=st.integers(1, 3),
    length=st.integers(1, 37),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 4)]),
    chunk_size=st.sampled_from([1, 4, 16, 64]),
    cut=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 99),
)
def test_turns_at_once_are_turns_in_order(
    turns: int,
    batch: int,
    length: int,
    heads: tuple[int, int],
    chunk_size: int,
    cut: int | None,
    seed: int,
) -> None:
    """Catches chunks in the wrong order, a start that is applied twice or to another turn, padding
    or absent turns that leave a trace, and a gradient that is cut elsewhere."""
    made, mask = arguments(turns, batch, length, heads, seed)
    found = kda_over_turns(**made, key_mask=mask, chunk_size=chunk_size, backprop_turns=cut)
    wanted = one_after_the_other(made, mask, cut)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(found, made), gradients(wanted, made), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": torch.ones(3, 2, 2)}, r"keep has shape \[3, 2, 2\]"),
        ({"added": torch.ones(2, 2, 2, 4, 6)}, r"added has shape .* expected \[2, 2, 2, 6, 4\]"),
        ({"initial_state": torch.ones(4, 2, 6, 4)}, r"initial_state .* expected \[2, 2, 6, 4\]"),
        ({"chunk_size": 12}, "chunk_size 12 is not a power of two"),
        ({"key_mask": torch.ones(4, 5)}, "expected torch.bool"),
        ({"log_decay": torch.ones(4, 5, 2, 6)}, "log_decay reaches 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    """Catches shapes that broadcast to a wrong result without a word."""
    made, _ = arguments(2, 2, 5, (2, 2), 0)
    with pytest.raises(UserError, match=message):
        kda_over_turns(**{**made, **changes})  # type: ignore[arg-type]
