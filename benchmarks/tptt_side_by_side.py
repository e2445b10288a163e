"""The drop-in ``LinearAttention`` beside tptt 0.12.1: whose results are those that are documented?

Prints a table of errors and, with ``--out``, writes it. tptt is not a dependency: name the folder
it was put into. It imports peft, psutil and jinja2, which its layers do not use; empty modules
stand in for those that are missing.

    pip install --no-deps --target runs/tptt tptt==0.12.1
    python benchmarks/tptt_side_by_side.py --tptt runs/tptt --out docs/benchmarks

Needs transformers (imported by tptt) and einops.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import shlex
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.evaluation import timing
from rxlm.nn import LinearAttention
from rxlm.nn.drop_in.operator_modes import OPERATOR_MODES
from rxlm.ops.linear_attention.value_gates import value_gated_delta_rule

NAME = "tptt"
CHUNK_SIZES = (1, 2, 3, 16, 64)
EXACT_MODES = tuple(mode for mode, parts in OPERATOR_MODES.items() if parts.linear)


class Row(NamedTuple):
    """One finding: what was asked of both, and what came out."""

    number: str
    asked: str
    theirs: str
    ours: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, write; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    try:
        tptt = load(options.tptt)
        with torch.no_grad():
            rows = compare(tptt)
            rows.append(grid(options.longest))
            speed = measure(tptt, options.lengths, options.rounds) if options.lengths else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "benchmarks/tptt_side_by_side.py", *typed])
    page = render(rows, speed, command)
    print(page)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{NAME}.md").write_text(page, encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--tptt", type=Path, required=True, help="folder that holds tptt 0.12.1 (pip --target)")
    add("--lengths", type=int, nargs="*", metavar="T", help="also time both, at these lengths")
    add("--rounds", type=int, default=5, help="how often each is timed")
    add("--longest", type=int, default=130, metavar="T", help="of the grid of lengths and chunks")
    add("--out", type=Path, help=f"folder to write {NAME}.md to; default: print only")
    return parser.parse_args(arguments)


def load(folder: Path) -> Any:
    """Import tptt's module of layers by path, without what its package imports beside it.

    Raises:
        UserError: if it is not there, or something that it needs.
    """
    package = folder / "tptt"
    if not (package / "modeling_tptt.py").is_file():
        raise UserError(
            f"{folder} holds no tptt: pip install --no-deps --target {folder} tptt==0.12.1"
        )
    missing = [
        name for name in ("transformers", "einops") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UserError(f"tptt needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    names = {
        "peft": ("LoraConfig", "PeftModel", "get_peft_model"),
        "psutil": (),
        "jinja2": ("Environment", "FileSystemLoader"),
    }
    for name, attributes in names.items():
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            for attribute in attributes:
                setattr(stub, attribute, type(attribute, (), {}))
            sys.modules[name] = stub
    parent = types.ModuleType("tptt")
    parent.__path__ = [str(package)]
    sys.modules["tptt"] = parent
    return importlib.import_module("tptt.modeling_tptt")


# --- layers with the same weights ---------------------------------------------------------------


def pair(tptt: Any, mode: str = "delta_rule", **options: Any) -> tuple[Any, LinearAttention]:
    """tptt's layer and ours with its weights."""
    torch.manual_seed(0)
    config = dict(tptt.TpttConfig.RECURRENT_MODES[mode])
    theirs = tptt.LinearAttention(32, 4, operator_mode=mode, recurrent_config=config, **options)
    ours = LinearAttention(32, 4, operator_mode=mode, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def inputs(length: int) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def largest(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


# --- findings -----------------------------------------------------------------------------------


def compare(tptt: Any) -> list[Row]:
    """T1 to T9 of tptt's findings, the same question to both."""
    rows = operators(tptt)
    theirs, ours = pair(tptt)
    x = inputs(128)
    rows.append(
        Row(
            "T2",
            "T = 127 against the first 127 of T = 128: largest difference of outputs",
            *(f"{largest(f(x)[:, :127], f(x[:, :127])):.2g}" for f in (theirs, ours)),
        )
    )
    rows += cached(tptt) + masked(tptt) + modes(tptt)
    return rows


def operators(tptt: Any) -> list[Row]:
    """T1: the delta rule from given q, k, v and beta, one beta a head (so it has one reading)."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 24, 8)  # batch, heads, tokens, head dimension
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    q, k = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (q, k))
    beta = torch.rand(2, 3, 24, 1, generator=generator).expand(shape)
    exact = delta_rule(q.double(), k.double(), v.double(), beta.double())
    tokens_first = [tensor.transpose(1, 2) for tensor in (q, k, v, beta)]
    rows = []
    for chunk_size in (1, 2, 4, 8, 24):
        virtual = [tensor.unsqueeze(3) for tensor in (q, k, v, torch.ones(shape), beta)]
        theirs, _ = tptt.LinearAttentionOp.chunk_delta_product_forward(
            *virtual, chunk_size, use_checkpoint=False
        )
        ours = value_gated_delta_rule(
            tokens_first[0],
            tokens_first[1].unsqueeze(2),
            tokens_first[2].unsqueeze(2),
            None,
            tokens_first[3].unsqueeze(2),
            chunk_size=chunk_size,
        ).output.transpose(1, 2)
        rows.append(
            Row(
                "T1",
                f"delta rule, chunks of {chunk_size}: relative error of the output (float32)",
                f"{relative(theirs, exact):.2g}",
                f"{relative(ours, exact):.1g}",
            )
        )
    return rows


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of arXiv:2506.17671, section 3.3, token by token; ``[B, H, T, D]`` each."""
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[2]):
        error = v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], beta[:, :, t] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2)


def cached(tptt: Any) -> list[Row]:
    """T3 and T4: decoding after a prompt, and token by token."""
    theirs, ours = pair(tptt)
    x = inputs(9)
    theirs(x[:, :8], use_cache=True)
    after = theirs(x[:, 8:], use_cache=True)
    theirs.linear_cache.reset()
    empty = theirs(x[:, 8:], use_cache=True)
    _, cache = ours(x[:, :8], return_cache=True)
    our_change = largest(ours(x[:, 8:], cache=cache), ours(x[:, 8:]))
    rows = [
        Row(
            "T3",
            "a step after 8 tokens against one from nothing: difference (0: the past was lost)",
            f"{largest(after, empty):.2g}",
            f"{our_change:.2g}",
        )
    ]
    for mode in ("delta_rule", "gated_delta_rule", "delta_product", "gated_delta_product"):
        theirs, ours = pair(tptt, mode)
        x = inputs(24)
        steps = torch.cat([theirs(x[:, t : t + 1], use_cache=True) for t in range(24)], dim=1)
        outputs, state = [], None
        for t in range(24):
            y, state = ours(x[:, t : t + 1], cache=state, return_cache=True)
            outputs.append(y)
        rows.append(
            Row(
                "T4",
                f"{mode}: token by token against all at once, largest difference",
                f"{largest(steps, theirs(x)):.2g}",
                f"{largest(torch.cat(outputs, dim=1), ours(x)):.1g}",
            )
        )
    return rows


def masked(tptt: Any) -> list[Row]:
    """T5 and T6: masks of 0 and 1 in floating point, padding on the left."""
    x = inputs(12)
    rows = []
    for side in ("right", "left"):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[:, slice(8, 12) if side == "right" else slice(0, 4)] = 0
        real = mask[0].bool()
        found = [largest(f(x, attn_mask=mask)[:, real], f(x[:, real])) for f in pair(tptt)]
        rows.append(
            Row(
                "T6",
                f"padding on the {side}, mask of integers: largest difference from no padding",
                f"{found[0]:.2g}",
                f"{found[1]:.1g}",
            )
        )
    real = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]).expand(2, -1)
    changes = [largest(f(x, attn_mask=real.float())[:, 5:], f(x)[:, 5:]) for f in pair(tptt)]
    rows.append(
        Row(
            "T5",
            "two hidden tokens, float mask: change of the later outputs (0: the mask was ignored)",
            *(f"{change:.2g}" for change in changes),
        )
    )
    return rows


def modes(tptt: Any) -> list[Row]:
    """T7 and T9: a mode by name, and what the first position of the default mode sees."""
    named = tptt.LinearAttention(32, 4, operator_mode="delta_rule").recurrent_config["order"]
    torch.manual_seed(0)
    theirs = tptt.LinearAttention(32, 4).eval()
    ours = LinearAttention(32, 4, operator_mode="delta_product").eval()
    x = inputs(6)
    spread = [float(layer(x)[:, 0].std(dim=0).max()) for layer in (theirs, ours)]
    return [
        Row(
            "T7",
            "order that operator_mode='delta_rule' gives",
            str(named),
            str(LinearAttention(32, 4, operator_mode="delta_rule").recurrent.order),
        ),
        Row(
            "T9",
            "delta_product: deviation of the first output between inputs (0: it sees none)",
            f"{spread[0]:.2g}",
            f"{spread[1]:.2g}",
        ),
    ]


def grid(longest: int) -> Row:
    """The layer in float64: every length, chunk size and mode against the loop over tokens."""
    worst = 0.0
    x = torch.randn(1, longest, 8, generator=torch.Generator().manual_seed(2)).double()
    for mode in EXACT_MODES:
        torch.manual_seed(0)
        layer = LinearAttention(8, 1, operator_mode=mode, linear_precision=torch.float64)
        layer = layer.double().eval()
        outputs, cache = [], None
        for t in range(longest):  # one token at a time is the loop, not the form by chunks
            y, cache = layer(x[:, t : t + 1], cache=cache, return_cache=True)
            outputs.append(y)
        exact = torch.cat(outputs, dim=1)
        for layer.max_chunk_size in CHUNK_SIZES:
            for length in range(1, longest + 1):
                worst = max(worst, largest(layer(x[:, :length]), exact[:, :length]))
    chunks = ", ".join(map(str, CHUNK_SIZES))
    return Row(
        "",
        f"float64, {len(EXACT_MODES)} modes, every length from 1 to {longest}, chunks of {chunks}: "
        "largest difference from the recurrence",
        "-",
        f"{worst:.1g}",
    )


# --- time ---------------------------------------------------------------------------------------


def measure(tptt: Any, lengths: Sequence[int], rounds: int) -> list[list[str]]:
    """Time a forward pass of both at some lengths; the last row is the exponent of the length."""
    layers = dict(zip(("tptt", "rxlm"), pair(tptt), strict=True))

    def call(name: str, length: int) -> Callable[[], object]:
        x = inputs(length)
        return lambda: layers[name](x)

    groups = [{(name, length): call(name, length) for name in layers} for length in lengths]
    samples = timing.interleave(groups, rounds=rounds, budget=120.0)
    medians = {key: timing.quartiles(values).median for key, values in samples.items()}
    rows = []
    for length in lengths:
        cells = []
        for name in layers:
            q = timing.quartiles(samples[name, length])
            cells.append(f"{1e3 * q.median:.3g} ({1e3 * q.lower:.3g}-{1e3 * q.upper:.3g})")
        rows.append([f"{length:,}", *cells])
    if len(lengths) > 1:
        slopes = [
            timing.log_log_slope(lengths, [medians[name, length] for length in lengths])
            for name in layers
        ]
        rows.append(["time grows as", *(f"T^{slope:.2f}" for slope in slopes)])
    return rows


# --- the page -----------------------------------------------------------------------------------


def render(rows: Sequence[Row], speed: Sequence[Sequence[str]], command: str) -> str:
    """Return the Markdown page."""
    lines = [
        "# The drop-in layer beside tptt 0.12.1",
        "",
        f"Written by `{command}` on {datetime.date.today()}, torch {torch.__version__}, float32 "
        "unless said otherwise; layers of width 32 with 4 heads and the same weights, loaded from "
        "tptt's state dict. What is asked, and what was wrong there, is in "
        "[the page of the layer](../drop_in_linear_attention.md#coming-from-tptt).",
        "",
        *table(["", "asked", "tptt", "rxlm"], rows),
    ]
    if speed:
        lines += [
            "",
            f"Milliseconds of a forward pass, median (quartiles), one thread of "
            f"{timing.machine_name('cpu')}, B = 2, load average {timing.load_average():.1f} (what "
            "else wants to run; with much of it, times and exponents are rough). tptt computes "
            "something cheaper than the delta rule (T1), so this is no race; it shows how time "
            "grows.",
            "",
            *table(["T", "tptt", "rxlm"], speed),
        ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


if __name__ == "__main__":
    sys.exit(main())
