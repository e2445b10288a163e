"""What an output layer's loss costs in chunks and in one piece: memory and time, forward and
backward.

    python benchmarks/output_loss.py
    python benchmarks/output_loss.py --device cuda --dtype bfloat16 --tokens 16384
"""

from __future__ import annotations

import argparse

import torch

from rxlm.evaluation.timing import (
    extra_memory,
    in_fresh_process,
    interleave,
    load_average,
    machine_name,
    quartiles,
)
from rxlm.ops.losses import linear_cross_entropy

Sizes = tuple[int, int, int]


def prepare(sizes: Sizes, chunk_size: int | None, device: str, dtype: str, seed: int = 0):
    """Return a call: loss, right predictions and gradients of hidden states and weight."""
    num_tokens, dim, vocab_size = sizes
    draw = torch.Generator().manual_seed(seed)
    options = {"device": device, "dtype": getattr(torch, dtype)}
    hidden = torch.randn(num_tokens, dim, generator=draw).to(**options).requires_grad_()
    weight = (0.02 * torch.randn(vocab_size, dim, generator=draw)).to(**options).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,), generator=draw).to(device)

    def call() -> None:
        loss, _ = linear_cross_entropy(
            hidden, weight, None, labels, chunk_size=chunk_size, return_correct=True
        )
        torch.autograd.grad(loss, [hidden, weight])

    return call


def memory(sizes: Sizes, chunk_size: int | None, device: str, dtype: str) -> int | None:
    """Return bytes on top of what the call is given; runs in a process of its own."""
    torch.set_num_threads(1)
    # Loads what the first call of a process loads.
    prepare((8, 8, 8), 4, device, dtype)()
    return extra_memory(lambda: prepare(sizes, chunk_size, device, dtype), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    print(
        f"{machine_name(options.device)}, {options.threads} threads, load {load_average():.1f}, "
        f"{options.dtype}, width {options.dim}, vocabulary {options.vocab}, torch "
        f"{torch.__version__}"
    )
    print(f"{'tokens':>8} {'scores':>12} {'MB':>8} {'seconds: median (quartiles)':>32}")
    for num_tokens in options.tokens:
        sizes = (num_tokens, options.dim, options.vocab)
        ways = {"one piece": num_tokens, "default": None}
        common = (options.device, options.dtype)
        calls = {name: prepare(sizes, chunk, *common) for name, chunk in ways.items()}
        seconds = interleave(
            [calls], rounds=options.rounds, budget=60.0, fewest_rounds=2, synchronize=synchronize
        )
        for name, chunk in ways.items():
            extra = in_fresh_process(memory, sizes, chunk, *common)
            size = "-" if extra is None else f"{extra / 2**20:.0f}"
            low, middle, high = quartiles(seconds[name])
            print(
                f"{num_tokens:8} {name:>12} {size:>8} {middle:14.3f} ({low:.3f} .. {high:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
