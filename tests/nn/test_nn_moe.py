"""Mixture of experts against loops over experts, and what its router reports.

Shapes: N tokens, D = 16, E experts, K visited, F = 24.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rxlm.nn.checkpointing import recompute
from rxlm.nn.expert_routing import active_record, record_routing
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.moe import MixtureOfExperts, MoeSettings
from rxlm.ops.grouped_matmul import grouped_backend, grouped_matmul

DIM, INNER = 16, 24


def mixture(*, seed: int = 0, randomized: bool = True, **fields: Any) -> MixtureOfExperts:
    """Return a mixture in double precision, by default with every parameter random."""
    torch.manual_seed(seed)
    sizes = {"dim": DIM, "hidden_dim": INNER, "num_experts": 5, "top_k": 2}
    module = MixtureOfExperts(MoeSettings(**{**sizes, **fields})).double()
    if randomized:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.4)
    return module


def written_out(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """Return the output for ``x`` ``[N, D]``, token by token and expert by expert."""
    settings = module.settings
    activate = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}[settings.activation]

    def network(weights: Any, index: int, token: Tensor) -> Tensor:
        def bias(parameter: Tensor | None) -> Tensor | float:
            if parameter is None:
                return 0.0
            return parameter[index if len(parameter) > 1 else 0]

        hidden = weights.up[index] @ token + bias(weights.up_bias)
        if settings.gated:
            half = len(hidden) // 2
            hidden = activate(hidden[:half]) * hidden[half:]
        else:
            hidden = activate(hidden)
        return weights.down[index] @ hidden + bias(weights.down_bias)

    outputs = []
    for token in x:
        probability = (module.router.weight @ token).softmax(0)
        rank = probability if module.router.offset is None else probability + module.router.offset
        chosen = rank.argsort(descending=True)[: settings.top_k]
        weight = probability[chosen]
        weight = weight / weight.sum() if settings.top_k > 1 else weight
        output = sum(
            (
                w * network(module.experts, int(e), token)
                for w, e in zip(weight, chosen, strict=True)
            ),
            torch.zeros(DIM, dtype=x.dtype),
        )
        if settings.num_shared:
            mix = torch.full((settings.num_shared,), 1 / settings.num_shared, dtype=x.dtype)
            if hasattr(module, "shared_mix"):
                mix = (module.shared_mix @ token).softmax(0)
            for index, share in enumerate(mix):
                output = output + share * network(module.shared, index, token)
        outputs.append(output)
    return torch.stack(outputs)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"num_experts": 1, "top_k": 1},
    {"bias": "local"},
    {"bias": "global", "gated": False, "activation": "gelu"},
    {"num_shared": 1, "shared_hidden_dim": 20},
    {"num_shared": 3, "shared_hidden_dim": 8, "shared_bias": "local"},
    {"num_shared": 2, "shared_hidden_dim": 8, "shared_bias": "local", "weighted_shared": True},
    {"num_shared": 2, "shared_hidden_dim": 8, "shared_bias": "global", "weighted_shared": True},
    {"balance": "bias"},
]


@pytest.mark.parametrize("backend", ["segments", "gather", "loop", None])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_equals_the_loop_over_tokens_and_experts(fields: dict[str, Any], backend: Any) -> None:
    """Catches rows given to the wrong expert, weights of the wrong visit, a bias or shared expert
    that is dropped, and gradients that differ from those of the plain form."""
    module = mixture(backend=backend, **fields)
    x = torch.randn(13, DIM, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(13, DIM, dtype=torch.float64)
    parameters = [x, *(p for p in module.parameters() if p is not module.router.offset)]
    actual, expected = module(x), written_out(module, x)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-8)
    gradients = [
        torch.autograd.grad(output, parameters, direction, allow_unused=True)
        for output in (actual, expected)
    ]
    for got, wanted, parameter in zip(*gradients, parameters, strict=True):
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(
            zero if got is None else got, zero if wanted is None else wanted, atol=1e-9, rtol=1e-7
        )


def test_grouped_kernel_equals_segments() -> None:
    """Catches offsets of groups that are starts instead of ends, and matrices not transposed, in
    the form that runs on a GPU; groups without rows included."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    counts = torch.tensor([3, 0, 9, 4])
    x = torch.randn(16, 32).bfloat16().requires_grad_()
    weight = torch.randn(4, 24, 32).bfloat16().requires_grad_()
    direction = torch.randn(16, 24).bfloat16()
    results = []
    for backend in ("segments", "grouped_mm", "gather"):
        output = grouped_matmul(x, weight, counts, backend)  # type: ignore[arg-type]
        results.append((output, *torch.autograd.grad(output, (x, weight), direction)))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.02)


def test_backend_is_named() -> None:
    """Catches a kernel that is chosen where it does not run."""
    sizes = (1000, 8, 64, 64)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert grouped_backend(cpu, torch.bfloat16, sizes, kernel=True) == "segments"
    assert grouped_backend(cuda, torch.float32, sizes, kernel=True) == "segments"
    assert grouped_backend(cuda, torch.bfloat16, sizes, kernel=False) == "segments"
    assert grouped_backend(cuda, torch.bfloat16, (1000, 8, 60, 64), kernel=True) == "segments"
    assert grouped_backend(cuda, torch.bfloat16, (4, 8, 64, 64), kernel=True) == "gather"
    if hasattr(F, "grouped_mm"):
        assert grouped_backend(cuda, torch.bfloat16, sizes, kernel=True) == "grouped_mm"


@pytest.mark.parametrize("gated", [True, False])
def test_one_expert_is_the_dense_network(gated: bool) -> None:
    """Catches a mixture that is not what it replaces: another order of gate and value, a weight
    that is not one, another initial size."""
    dense = FeedForward(DIM, INNER, activation="swish", gated=gated, dropout=0.0).double()
    module = mixture(num_experts=1, top_k=1, gated=gated, bias="local", randomized=False)
    with torch.no_grad():
        module.experts.up.copy_(dense.up.weight[None])
        module.experts.down.copy_(dense.down.weight[None])
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    torch.testing.assert_close(module(x), dense(x))


@given(data=st.data(), rows=st.integers(1, 9), shared=st.integers(0, 2))
def test_a_token_depends_on_no_other(data: st.DataObject, rows: int, shared: int) -> None:
    """Catches capacity, statistics of a batch, an order of rows in the output, and a decoding step
    that is not the forward pass."""
    bias = data.draw(st.sampled_from(["global", "local", "off"]))
    module = mixture(num_shared=shared, shared_hidden_dim=8, bias=bias)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(rows, DIM, dtype=torch.float64, generator=generator)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    together = module(x)
    alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-10)
    with torch.no_grad():  # The form of decoding.
        alone = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(module(x[order]), together[order], atol=1e-12, rtol=1e-10)
    folded = module(x.view(1, rows, 1, DIM))
    torch.testing.assert_close(folded.view(rows, DIM), together)


def test_statistics_are_of_real_tokens_only() -> None:
    """Catches padding in the usage or the loss, statistics that are kept between calls, and calls
    of one layer that are not added up."""
    module = mixture()
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    x[1, 2:] = 1e3
    assert active_record() is None
    with record_routing() as padded:
        module(x, mask)
    with record_routing() as real:
        module(x[mask])
    with record_routing() as apart:
        module(x[:1])
        module(x[1:, :2])
    for other in (real, apart):
        torch.testing.assert_close(padded.objective(), other.objective())
        torch.testing.assert_close(padded.metrics(), other.metrics())
        assert len(other.layers()) == 1
    assert padded.layers()[0].visits.sum() == 8 * 2
    probability = (x[mask] @ module.router.weight.T).softmax(-1)
    usage = torch.bincount(probability.topk(2).indices.flatten(), minlength=5) / 16
    expected = 5 * (usage * probability.mean(0)).sum()
    torch.testing.assert_close(padded.objective(), expected)
    assert active_record() is None


def test_metrics_tell_even_from_collapsed() -> None:
    """Catches metrics whose ends are not where the documentation says."""
    module = mixture(num_experts=4, top_k=1, randomized=False)
    nn.init.eye_(module.router.weight)
    even = torch.eye(DIM, dtype=torch.float64)[:4] * 30
    for x, usage, load in ((even, 1.0, 1.0), (even[:1].expand(4, -1), 0.25, 4.0)):
        with record_routing() as record:
            module(x)
        metrics = record.metrics()
        assert metrics["expert_usage"].item() == pytest.approx(usage, abs=1e-6)
        assert metrics["expert_max_load"].item() == pytest.approx(load, abs=1e-6)
        assert metrics["expert_balance"].item() == pytest.approx(load, abs=1e-6)
    with record_routing() as record:
        pass
    assert record.metrics() == {}


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_recomputed_blocks_report_once(balance: Any) -> None:
    """Catches statistics that are lost in, or added twice by, gradient checkpointing, and a
    balance loss whose gradient does not come through."""
    module = mixture(balance=balance)
    x = torch.randn(9, DIM, dtype=torch.float64)
    gradients = []
    for run in (module, lambda x: recompute(module, x), lambda x: recompute(recompute, module, x)):
        module.zero_grad()
        with record_routing() as record:
            output = run(x)
            assert len(record.entries) == 1
            # Inside the block: the second forward pass must not report here, either.
            (output.square().sum() + record.objective()).backward()
            assert len(record.entries) == 1
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))
    if balance == "bias":
        assert module.router.offset is not None and module.router.offset.grad is not None
        expected = record.layers()[0].usage - 1 / 5
        torch.testing.assert_close(module.router.offset.grad, expected)


@pytest.mark.parametrize("balance", ["loss", "bias", "both"])
def test_balancing_evens_the_usage(balance: Any) -> None:
    """Catches a loss or offsets without effect, or with the opposite one."""

    def usage_after(scale: float) -> float:
        module = mixture(num_experts=6, top_k=2, balance=balance, randomized=False).float()
        with torch.no_grad():
            # One direction that all tokens share makes two experts win everywhere.
            module.router.weight[:2, 0] += 3.0
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(1)
        for _ in range(60):
            x = torch.randn(64, DIM, generator=generator)
            x[:, 0] = 1.0
            with record_routing() as record:
                output = module(x)
            loss = (output - x.roll(1, dims=1)).square().mean() + scale * record.objective()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return record.metrics()["expert_usage"].item()

    without, balanced = usage_after(0.0), usage_after(0.1)
    assert without < 0.65
    assert balanced > 0.8


def test_offsets_choose_but_do_not_weigh() -> None:
    """Catches an offset that changes the weights of the chosen experts, or gets a gradient from
    the task."""
    module = mixture(balance="bias", top_k=1)
    x = torch.randn(8, DIM, dtype=torch.float64)
    assert module.router.offset is not None
    with torch.no_grad():
        module.router.offset.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0]))
    routing = module.router(x, None)
    assert (routing.experts == 2).all()
    torch.testing.assert_close(routing.weights[:, 0], routing.probabilities[:, 2])
    module(x).sum().backward()
    assert module.router.offset.grad is None


@pytest.mark.parametrize("follows", [True, False])
def test_router_precision(follows: bool) -> None:
    """Catches scores in autocast's type although single precision was asked for, a setting without
    effect, and a model in bfloat16 whose router is, too."""
    x = torch.randn(64, DIM)
    choices = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        module = MixtureOfExperts(
            MoeSettings(DIM, INNER, 8, 2, router_dtype=dtype, router_follows_autocast=follows)
        )
        exact = (x @ module.router.weight.T).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            probabilities = module.router(x, None).probabilities
            assert module(x).dtype == x.dtype
        choices[dtype] = (probabilities - exact).abs().max().item()
        assert probabilities.dtype == torch.float32
    assert choices[torch.bfloat16] > 1e-4
    assert (choices[torch.float32] > 1e-4) == follows
    module = MixtureOfExperts(MoeSettings(DIM, INNER, 8, 2)).bfloat16()
    low = x.bfloat16()
    exact = (low.float() @ module.router.weight.float().T).softmax(-1)
    torch.testing.assert_close(module.router(low, None).probabilities, exact)
    assert module(low).dtype == torch.bfloat16


def test_shapes_are_found_without_storage() -> None:
    """Catches a transfer from the device, which the meta device does not have."""
    with torch.device("meta"):
        module = MixtureOfExperts(MoeSettings(DIM, INNER, 8, 2, num_shared=1, shared_hidden_dim=4))
        with record_routing() as record:
            output = module(torch.empty(2, 3, DIM))
    assert output.shape == (2, 3, DIM) and output.device.type == "meta"
    assert record.objective().shape == ()
