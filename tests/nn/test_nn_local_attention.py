"""``LocalAttention``, feature by feature; the names of the tests are those of the features.

Oracles: the package local-attention 1.11.2 itself where it is installed (its defects included, for
``compat``), and a dense form written here, with true rotary positions and an explicit mask.

Shapes: X packed batch and heads, N tokens, D head dimension, W window.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rxlm.errors import UserError
from rxlm.nn import LocalAttention

ROOT = Path(__file__).resolve().parents[2]


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(3)]
    return [part.requires_grad_() for part in made]


def with_gradients(function: Any, *arguments: Tensor, **named: Any) -> list[Tensor]:
    """Return the output and the gradients of the (three) inputs for one direction."""
    out = function(*arguments, **named)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, arguments[:3], direction)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


# --- the dense oracle ---------------------------------------------------------------------------


def dense_mask(
    n: int, window: int, backward: int, forward: int, causal: bool, exact: bool
) -> Tensor:
    """Return bool ``[N, N]``, written pair by pair."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i, j in itertools.product(range(n), range(n)):
        if exact:
            seen = i - j <= backward * window and j - i <= forward * window
        else:
            seen = -backward <= j // window - i // window <= forward
        mask[i, j] = seen and (j <= i or not causal)
    return mask


def rotate(x: Tensor) -> Tensor:
    """Rotate as complex numbers (x[d] + i x[d + D/2]), from the definition."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, rotary: bool = True, scores: Any = 0.0
) -> Tensor:
    if rotary:
        q, k = rotate(q), rotate(k)
    mixed = torch.where(
        mask, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + scores, torch.tensor(-torch.inf)
    )
    blind = ~mask.any(dim=-1, keepdim=True)
    weights = torch.where(blind, 0.0, torch.where(blind, 0.0, mixed).softmax(dim=-1))
    return torch.where(mask, weights, 0.0) @ v


WINDOWS = [
    pytest.param(causal, backward, forward, exact, id=f"{causal}-{backward}-{forward}-{exact}")
    for causal in (True, False)
    for backward in (0, 1, 2)
    for forward in ((0,) if causal else (0, 1, 2))
    for exact in (False, True)
]
windows = pytest.mark.parametrize(("causal", "backward", "forward", "exact"), WINDOWS)


# --- signature, example -------------------------------------------------------------------------


def test_signature() -> None:
    """Catches a missing, renamed or reordered argument, and a default that changed. Dropout is
    0.0 as in both packages' code (a text about zeta says 0.1)."""
    none = None
    expected = {
        "window_size": inspect.Parameter.empty, "causal": False, "look_backward": 1,
        "look_forward": none, "dropout": 0.0, "shared_qk": False, "rel_pos_emb_config": none,
        "dim": none, "autopad": False, "exact_windowsize": False, "scale": none,
        "use_rotary_pos_emb": True, "use_xpos": False, "xpos_scale_base": none,
    }  # fmt: skip
    found = inspect.signature(LocalAttention).parameters
    positional = [p for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {p.name: p.default for p in positional} == expected
    assert [p.name for p in positional] == list(expected)
    found = inspect.signature(LocalAttention.forward).parameters
    names = [p.name for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == ["self", "q", "k", "v", "mask", "input_mask", "attn_bias", "window_size"]
    assert all(found[name].default is None for name in names[4:])


def test_signature_needs_no_torch_until_used() -> None:
    """Catches rxlm.nn importing torch before somebody asks for a module."""
    import subprocess

    code = "import sys, rxlm.nn; assert 'torch' not in sys.modules; dir(rxlm.nn)"
    code += "; from rxlm.nn import LocalAttention, LocalMHA; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_seed_example() -> None:
    """Catches an example of zeta's documentation that raises (there it does) or is wrong."""
    q, k, v = (torch.randn(1, 100, 32) for _ in range(3))
    out = LocalAttention(window_size=5, causal=True, dim=32)(q, k, v)
    expected = dense(q.double(), k.double(), v.double(), dense_mask(100, 5, 1, 0, True, False))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


# --- the package itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> ModuleType:
    """The package local-attention; skips, with the reason, where it is missing."""
    path = ROOT / "benchmarks" / "local_attention_package.py"
    spec = importlib.util.spec_from_file_location("local_attention_package", path)
    assert spec is not None and spec.loader is not None
    finder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finder)
    module: ModuleType | None = finder.load()
    if module is None:
        pytest.skip(f"local-attention=={finder.VERSION} is not installed (extra 'dev')")
    return module


def grid() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the 588 settings: constructor arguments, and what the call gets."""
    points: list[tuple[dict[str, Any], dict[str, Any]]] = []
    switches = itertools.product(
        WINDOWS, ("none", "rotary", "xpos"), (False, True), (False, True), (None, 0.3)
    )
    for window, positions, shared, autopad, scale in switches:
        causal, backward, forward, exact = window.values
        arguments = {
            "window_size": 4, "causal": causal, "look_backward": backward, "dim": 8,
            "look_forward": forward, "exact_windowsize": exact, "shared_qk": shared,
            "use_rotary_pos_emb": positions != "none", "use_xpos": positions == "xpos",
            "autopad": autopad, "scale": scale,
        }  # fmt: skip
        points.append((arguments, {"length": 18 if autopad else 20}))
    for causal in (True, False):
        common = {"window_size": 8, "causal": causal, "dim": 8, "autopad": True}
        for names in (("mask",), ("bias",), ("mask", "bias")):
            points.append((common, {"length": 21, "given": names}))
        for size in (4, 16, 32):
            wide = {**common, "autopad": False, "use_xpos": True, "exact_windowsize": True}
            points.append((wide, {"length": 64, "window_size": size}))
    return points


def test_conformance_588(package: ModuleType) -> None:
    """Catches compat that is not what the package computes: outputs and gradients, float64."""
    points = grid()
    assert len(points) == 588
    worst = 0.0
    for arguments, call in points:
        q, k, v = inputs(2, 2, call["length"], 8)
        named: dict[str, Any] = {}
        if "mask" in call.get("given", ()):
            named["mask"] = torch.rand(2, call["length"]) > 0.4
        if "bias" in call.get("given", ()):
            columns = 8 * (2 if arguments["causal"] else 3)
            named["attn_bias"] = torch.randn(2, 8, columns, dtype=torch.float64)
        if "window_size" in call:
            named["window_size"] = call["window_size"]
        ours = LocalAttention(**arguments, compat="local-attention")
        theirs = package.LocalAttention(**arguments)
        found = with_gradients(ours, q, k, v, **named)
        expected = with_gradients(theirs, q, k, v, **named)
        for one, two in zip(found, expected, strict=True):
            worst = max(worst, (one - two).abs().max().item())
    assert worst < 1e-12


def test_conformance_is_not_the_default(package: ModuleType) -> None:
    """Catches a compat switch without effect: defaults must differ where the package is wrong."""
    q, k, v = inputs(1, 2, 18, 8)
    arguments: dict[str, Any] = {"window_size": 4, "dim": 8, "autopad": True}
    theirs = package.LocalAttention(**arguments)(q, k, v)
    assert (LocalAttention(**arguments)(q, k, v) - theirs).abs().max() > 0.01
    # Causal without positions there is nothing wrong: one result.
    arguments |= {"causal": True, "use_rotary_pos_emb": False, "scale": 0.2}
    theirs = package.LocalAttention(**arguments)(q, k, v)
    torch.testing.assert_close(LocalAttention(**arguments)(q, k, v), theirs, atol=1e-12, rtol=0)


def test_conformance_of_causal_rotation(package: ModuleType) -> None:
    """Catches another rotary convention: causal, the package is right up to its float32 angles."""
    q, k, v = inputs(1, 2, 20, 8)
    arguments: dict[str, Any] = {"window_size": 4, "dim": 8, "causal": True}
    for xpos in (False, True):
        theirs = package.LocalAttention(**arguments, use_xpos=xpos)(q, k, v)
        ours = LocalAttention(**arguments, use_xpos=xpos)(q, k, v)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_conformance_loads_a_checkpoint(package: ModuleType) -> None:
    """Catches a checkpoint of the package that is refused for the constants it contains."""
    state = package.LocalAttention(4, dim=8).state_dict()
    assert state
    for compat in (None, "local-attention"):
        LocalAttention(4, dim=8, compat=compat).load_state_dict(state)


# --- what it computes ---------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("length", [1, 63, 150])
def test_dense_reference(
    causal: bool, backward: int, forward: int, exact: bool, length: int
) -> None:
    """Catches a wrong window, shifted positions (A1), padding that is seen (A2) and gradients that
    miss a block, at several blocks of queries."""
    q, k, v = inputs(2, 2, length, 4)
    for window in (5, 70):
        module = LocalAttention(
            window, causal, backward, forward, autopad=True, exact_windowsize=exact
        )
        mask = dense_mask(length, window, backward, forward, causal, exact)
        expected = with_gradients(lambda *x, mask=mask: dense(*x, mask), q, k, v)
        assert_all_close(with_gradients(module, q, k, v), expected)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_dense_reference_with_masks(data: st.DataObject) -> None:
    """Catches masks, biases and blind queries that go wrong only at some lengths and windows."""
    length, window = data.draw(st.integers(1, 90)), data.draw(st.sampled_from([1, 3, 16, 80]))
    causal, exact = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    keys, pairs = torch.rand(2, length) > 0.5, torch.rand(length, length) > 0.2
    columns = window * (2 if causal else 3)
    bias = torch.randn(3, window, columns, dtype=torch.float64)
    q, k, v = inputs(2, 3, length, 4)
    module = LocalAttention(window, causal, autopad=True, exact_windowsize=exact)
    shape = dense_mask(length, window, 1, 0 if causal else 1, causal, exact)
    seen = shape & pairs & keys[:, None, None]
    row = torch.arange(length)
    column = (row[None] - row[:, None] // window * window + window).clamp(0, columns - 1)
    spread = bias[:, (row % window)[:, None], column]
    assert_all_close(
        with_gradients(module, q, k, v, mask=keys, attn_mask=pairs, attn_bias=bias),
        with_gradients(lambda *x: dense(*x, seen, scores=spread), q, k, v),
    )


def test_windows_defaults_and_errors() -> None:
    """Catches another rule for look_forward=None, and sizes that are accepted."""
    assert LocalAttention(4).look_forward == 1
    assert LocalAttention(4, causal=True).look_forward == 0
    with pytest.raises(UserError, match="causal=True with look_forward=1"):
        LocalAttention(4, causal=True, look_forward=1)
    with pytest.raises(UserError, match="window_size=0"):
        LocalAttention(0)
    with pytest.raises(UserError, match="look_backward=-1"):
        LocalAttention(4, look_backward=-1)


@pytest.mark.parametrize("causal", [True, False])
def test_autopad(causal: bool) -> None:
    """Catches padded keys that are attended to (A2), at all lengths to three windows, and a length
    that does not fit being accepted without autopad."""
    module = LocalAttention(6, causal, autopad=True)
    for length in range(1, 19):
        q, k, v = inputs(1, 2, length, 4)
        mask = dense_mask(length, 6, 1, 0 if causal else 1, causal, False)
        torch.testing.assert_close(module(q, k, v), dense(q, k, v, mask))
    q, k, v = inputs(1, 2, 13, 4)
    with pytest.raises(UserError, match=r"13 tokens are not divisible by window_size=6.*autopad"):
        LocalAttention(6, causal)(q, k, v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [3, 40])
def test_exact_counts_keys(causal: bool, window: int) -> None:
    """Catches a window that is not exact: keys are counted by the gradient. A token sees W tokens
    before itself, itself (and W after)."""
    length = 3 * window + 2
    q, k, v = inputs(1, 1, length, 4)
    module = LocalAttention(window, causal, autopad=True, exact_windowsize=True)
    out = module(q, k, v).sum(dim=-1).flatten()
    for i in (0, window, length // 2, length - 1):
        (gradient,) = torch.autograd.grad(out[i], v, retain_graph=True)
        seen = gradient[0, 0].abs().sum(dim=-1) > 0
        last = i if causal else min(length - 1, i + window)
        expected = torch.zeros(length, dtype=torch.bool)
        expected[max(0, i - window) : last + 1] = True
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_shared_qk(causal: bool) -> None:
    """Catches keys that are not of length one, a token that sees itself beside others, and a first
    token that sees nothing instead of itself."""
    q, _, v = inputs(1, 2, 21, 4)
    module = LocalAttention(7, causal, shared_qk=True, scale=1.0, use_rotary_pos_emb=False)
    out = module(q, q, v)
    if causal:
        torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    mask = dense_mask(21, 7, 1, 0 if causal else 1, causal, False) & ~torch.eye(21).bool()
    if causal:
        mask[0, 0] = True
    unit = q / q.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out, dense(q * 2, unit, v, mask, rotary=False))


# --- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_rotary_is_relative(causal: bool) -> None:
    """Catches positions that depend on the window (A1: queries were shifted): a sequence behind a
    window of hidden tokens gives what it gives alone."""
    q, k, v = inputs(1, 2, 12, 8)
    module = LocalAttention(4, causal, exact_windowsize=True)
    alone = module(q, k, v)
    moved = [torch.cat((torch.ones(1, 2, 4, 8).double(), part), dim=2) for part in (q, k, v)]
    mask = torch.arange(16)[None] >= 4
    torch.testing.assert_close(module(*moved, mask=mask)[:, :, 4:], alone)


def test_rotary_at_far_positions() -> None:
    """Catches angles computed in float32, which lose digits at position 100,000."""
    from rxlm.ops.rotary import rotate_halves

    q, k, _ = inputs(1, 4, 8, dtype=torch.float32)
    steps = torch.arange(4)
    near = rotate_halves(q, steps) @ rotate_halves(k, steps).mT
    far = rotate_halves(q, steps + 100_000) @ rotate_halves(k, steps + 100_000).mT
    torch.testing.assert_close(far, near, atol=3e-6, rtol=1e-5)


def test_rotary_is_on_without_dim() -> None:
    """Catches a flag that reads True without effect, as in the package without ``dim``."""
    q, k, v = inputs(1, 2, 12, 8)
    on, off = (LocalAttention(4, use_rotary_pos_emb=flag)(q, k, v) for flag in (True, False))
    assert not torch.allclose(on, off)
    torch.testing.assert_close(on, LocalAttention(4, dim=8)(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_xpos_is_a_decay_of_the_distance(causal: bool, exact: bool) -> None:
    """Catches a decay that depends on where the block begins."""
    length, width = 90, 8
    q, k, v = inputs(1, 2, length, width)
    module = LocalAttention(
        30, causal, use_xpos=True, xpos_scale_base=20.0, exact_windowsize=exact, dim=width
    )
    steps = torch.arange(0, width, 2, dtype=torch.float64)
    zeta = ((steps + 0.4 * width) / (1.4 * width)).repeat(2)
    place = torch.arange(length, dtype=torch.float64)[:, None]
    mask = dense_mask(length, 30, 1, 0 if causal else 1, causal, exact)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q) * zeta ** (place / 20), rotate(k) * zeta ** (-place / 20)
        return dense(q, k, v, mask, rotary=False)

    assert_all_close(
        with_gradients(module, q, k, v), with_gradients(expected, q, k, v), tolerance=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [1, 2, 7, 64, 1150, 4096])
def test_xpos_is_finite(window: int, dtype: torch.dtype) -> None:
    """Catches the division by zero at W=1 and factors that overflow at large windows (A6)."""
    q, k, v = inputs(1, min(2 * window, window + 300), 4, dtype=dtype)
    for causal in (True, False):
        module = LocalAttention(window, causal, use_xpos=True, autopad=True)
        for found in with_gradients(module, q, k, v):
            assert found.dtype == dtype and torch.isfinite(found).all()


def test_dynamic_window() -> None:
    """Catches a window of the call that only reaches some parts (A5): rotary without xpos,
    exact limits and autopad follow it; the base of xpos stays."""
    q, k, v = inputs(1, 2, 45, 8)
    for options in ({}, {"exact_windowsize": True}, {"use_xpos": True, "xpos_scale_base": 2.0}):
        module, other = (
            LocalAttention(window, True, autopad=True, **options) for window in (4, 16)
        )
        found = module(q, k, v, window_size=16)
        torch.testing.assert_close(found, other(q, k, v))
        assert not torch.allclose(found, module(q, k, v))
    steep = LocalAttention(4, True, use_xpos=True, autopad=True)
    large = inputs(1, 3000, 4, dtype=torch.float32)
    assert torch.isfinite(steep(*large, window_size=1500)).all()
    bias = torch.zeros(2, 4, 8)
    with pytest.raises(UserError, match=r"expected \[heads, 16, 32\]"):
        LocalAttention(4, True, autopad=True)(q, k, v, attn_bias=bias, window_size=16)


def test_deprecated() -> None:
    """Catches the old argument without a warning, or with another result."""
    q, k, v = inputs(1, 2, 12, 8)
    with pytest.warns(DeprecationWarning, match="rel_pos_emb_config"):
        old = LocalAttention(4, rel_pos_emb_config=(8, 2))
    assert old.dim == 8
    torch.testing.assert_close(old(q, k, v), LocalAttention(4, dim=8)(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"use_rotary_pos_emb": False}, {"shared_qk": True}])
def test_low_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Catches types that do not match once rotary is on (A8)."""
    q, k, v = inputs(2, 12, 8, dtype=torch.float32)
    low = [part.detach().to(dtype).requires_grad_() for part in (q, k, v)]
    module = LocalAttention(4, **options)
    found, expected = with_gradients(module, *low), with_gradients(module, q, k, v)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), two, atol=0.05, rtol=0.05)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_mask_types(causal: bool, dtype: torch.dtype) -> None:
    """Catches masks of numbers that are refused (A7) or added; input_mask is the same thing."""
    q, k, v = inputs(2, 2, 20, 4)
    keep = torch.rand(2, 20) > 0.3
    module = LocalAttention(5, causal)
    shape = dense_mask(20, 5, 1, 0 if causal else 1, causal, False)
    expected = dense(q, k, v, shape & keep[:, None, None])
    torch.testing.assert_close(module(q, k, v, mask=keep.to(dtype)), expected)
    torch.testing.assert_close(module(q, k, v, input_mask=keep.to(dtype)), expected)
    packed = module(*(part.flatten(0, 1) for part in (q, k, v)), mask=keep.to(dtype))
    torch.testing.assert_close(packed, expected.flatten(0, 1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mask_that_hides_everything(causal: bool, dtype: torch.dtype) -> None:
    """Catches a mean of values, or NaN in a gradient, for queries that see nothing (A3)."""
    q, k, v = inputs(2, 2, 20, 4, dtype=dtype)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0] = False
    keep[1, :10] = False
    found = with_gradients(LocalAttention(5, causal), q, k, v, mask=keep)
    assert all(torch.isfinite(part).all() for part in found)
    assert found[0][0].abs().max() == 0 and found[0][1, :, :5].abs().max() == 0
    assert all(part[0].abs().max() == 0 for part in found[1:])


def test_mask_misuse() -> None:
    """Catches masks that are broadcast or reinterpreted instead of refused."""
    q, k, v = inputs(2, 2, 20, 4)
    module = LocalAttention(5)
    keep = torch.ones(2, 20, dtype=torch.bool)
    with pytest.raises(UserError, match="two names of one argument"):
        module(q, k, v, mask=keep, input_mask=keep)
    with pytest.raises(UserError, match="batch that divides 4 sequences"):
        module(q, k, v, mask=keep[[0, 1, 1]])
    with pytest.raises(UserError, match="other values than 0 and 1"):
        module(q, k, v, mask=keep * 0.5)
    with pytest.raises(UserError, match=r"attn_mask of shape \[20, 19\]"):
        module(q, k, v, attn_mask=torch.ones(20, 19).bool())


def test_mask_of_pairs_per_row() -> None:
    """Catches an extra mask [B, N, N] whose rows are mixed up."""
    q, k, v = inputs(2, 2, 20, 4)
    pairs = torch.rand(2, 20, 20) > 0.5
    found = LocalAttention(5)(q, k, v, attn_mask=pairs)
    mask = dense_mask(20, 5, 1, 1, False, False) & pairs[:, None]
    torch.testing.assert_close(found, dense(q, k, v, mask))


def test_bias_learns() -> None:
    """Catches a bias whose gradient is lost or not summed over windows; heads tile the batch."""
    q, k, v = inputs(6, 20, 4)
    bias = torch.zeros(3, 5, 10, dtype=torch.float64, requires_grad=True)
    module = LocalAttention(5, True)
    assert torch.autograd.gradcheck(
        lambda b: module(q.detach(), k.detach(), v.detach(), attn_bias=b), bias, fast_mode=True
    )
    biased = torch.randn(3, 5, 10, dtype=torch.float64)
    one_by_one = [
        module(*(part[i : i + 1] for part in (q, k, v)), attn_bias=biased[i % 3 : i % 3 + 1])
        for i in range(6)
    ]
    torch.testing.assert_close(module(q, k, v, attn_bias=biased), torch.cat(one_by_one))
    with pytest.raises(UserError, match=r"attn_bias of shape \[4, 5, 10\].*divide 6"):
        module(q, k, v, attn_bias=torch.zeros(4, 5, 10))


# --- misuse, cost -------------------------------------------------------------------------------


def test_misuse() -> None:
    """Catches arguments that fail deep inside, or not at all."""
    q, k, v = inputs(1, 2, 20, 7)
    with pytest.raises(UserError, match="heads 7 wide with rotary"):
        LocalAttention(5)(q, k, v)
    with pytest.raises(UserError, match="heads 7 wide with rotary"):
        LocalAttention(5, dim=7)
    assert LocalAttention(5, use_rotary_pos_emb=False)(q, k, v).shape == q.shape
    with pytest.raises(UserError, match="dim=8 but heads are 6 wide: give dim=6"):
        LocalAttention(5, dim=8)(*(part[..., :6] for part in (q, k, v)))
    with pytest.raises(UserError, match=r"k \[1, 2, 19, 7\].*extend"):
        LocalAttention(5, use_rotary_pos_emb=False)(q, k[:, :, 1:], v)
    with pytest.raises(UserError, match="use_xpos=True needs use_rotary_pos_emb=True"):
        LocalAttention(5, use_xpos=True, use_rotary_pos_emb=False)
    with pytest.raises(UserError, match="compat='zeta'"):
        LocalAttention(5, compat="zeta")
    with pytest.raises(UserError, match="dropout=1"):
        LocalAttention(5, dropout=1.0)


def test_dropout_only_in_training() -> None:
    """Catches dropout that is always on, or never."""
    q, k, v = inputs(1, 2, 20, 4)
    module = LocalAttention(5, dropout=0.5)
    assert not torch.equal(module(q, k, v), module(q, k, v))
    module.eval()
    torch.testing.assert_close(module(q, k, v), LocalAttention(5)(q, k, v))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        for part in parts:
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"shared_qk": True}, {"use_xpos": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_cost_is_linear(options: dict[str, Any], masked: bool) -> None:
    """Catches anything of size N x N, forward or backward: no tensor outgrows the inputs."""
    sizes = []
    for length in (1024, 4096):
        q, k, v = inputs(2, length, 4, dtype=torch.float32)
        mask = torch.rand(2, length) > 0.2 if masked else None
        with _Largest() as largest:
            with_gradients(LocalAttention(64, True, **options), q, k, v, mask=mask)
        sizes.append(largest.numel)
    assert sizes[1] <= 4 * sizes[0]
    assert sizes[1] <= 2 * 2 * 4096 * 8
