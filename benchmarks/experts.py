"""Measures mixtures of experts: how evenly experts are used, and how fast they are computed.

    python benchmarks/experts.py

Prints two Markdown tables. *Usage*: a small decoder learns the built-in dialogues (next token,
no memory) without and with balancing; usage is exp(entropy of the visits) / E, 1 = all experts
equally, on dialogues that were not trained on. *Speed*: forward and backward pass of one mixture,
one thread, by how its experts are computed, beside a dense network of as many multiplications.

Shapes: N tokens, D width, E experts, K experts that a token visits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rxlm.data import DialogueGenerator, conversation_texts
from rxlm.evaluation.timing import interleave, quartiles
from rxlm.nn.expert_routing import record_routing
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.moe import MixtureOfExperts, MoeSettings
from rxlm.rxt.components import RxTDecoder
from rxlm.tokenization import TokenizerTraining, train_tokenizer

COMPONENT = {
    "num_layers": 3, "embed_dim": 64, "att_heads": 4, "stm_size": 4, "seq_len": 128,
    "self_att_type": "gqa", "skip_memory_cross_attention": True, "ff_dim": 64, "use_moe": True,
    "num_experts": 16, "moe_top_k": 1, "num_shared_experts": 0, "moe_bias_mode": "off",
    "tie_embeddings": True,
}  # fmt: skip
LENGTH, ROWS, SCALE, RATE = 64, 16, 0.01, 1e-2


def rows_of_text(first: int, count: int, tokenizer: object) -> Tensor:
    """Return ``[R, LENGTH]`` token ids of generated dialogues, cut where they happen to be."""
    conversations = (DialogueGenerator().conversation(first + i, 8) for i in range(count))
    ids: list[int] = []
    for text in conversation_texts(conversations):
        ids += tokenizer.encode(text)  # type: ignore[attr-defined]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def usage_rows(steps: int) -> list[str]:
    """Train one decoder for each way of balancing; return the rows of the table."""
    texts = conversation_texts(DialogueGenerator().conversation(i, 8) for i in range(200))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=512))
    train, valid = rows_of_text(0, 400, tokenizer), rows_of_text(10_000, 40, tokenizer)
    lines = [
        "| balancing | usage before | usage after | busiest expert | validation loss |",
        "|---|---|---|---|---|",
    ]
    for name, balance, scale in (
        ("none", "loss", 0.0),
        ("loss", "loss", SCALE),
        ("bias", "bias", SCALE),
        ("both", "both", SCALE),
    ):
        torch.manual_seed(0)
        decoder = RxTDecoder(
            {**COMPONENT, "vocab_size": tokenizer.vocab_size, "moe_balance": balance}
        )
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE)
        before, _, _ = measured(decoder, valid)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            ids = train[torch.randint(len(train), (ROWS,), generator=generator)]
            with record_routing() as routing:
                loss = loss_of(decoder, ids)
            optimizer.zero_grad()
            (loss + scale * routing.objective()).backward()
            optimizer.step()
        after, busiest, loss_after = measured(decoder, valid)
        lines.append(
            f"| {name} | {before:.2f} | {after:.2f} | {busiest:.1f} x even | {loss_after:.3f} |"
        )
    return lines


def loss_of(decoder: RxTDecoder, ids: Tensor) -> Tensor:
    """Return the mean next-token loss of rows ``[R, T]``."""
    hidden, _ = decoder(ids[:, :-1])
    return torch.nn.functional.cross_entropy(
        decoder.logits(hidden).flatten(0, 1), ids[:, 1:].flatten()
    )


@torch.no_grad()
def measured(decoder: RxTDecoder, ids: Tensor) -> tuple[float, float, float]:
    """Return usage, load of the busiest expert and loss on held-out rows."""
    with record_routing() as routing:
        loss = loss_of(decoder, ids[:128])
    metrics = routing.metrics()
    return float(metrics["expert_usage"]), float(metrics["expert_max_load"]), float(loss)


def speed_rows(rounds: int) -> list[str]:
    """Time one mixture at a few sizes; return the rows of the table."""
    lines = [
        "| N | D | E, K | by default (ms) | loop (ms) | gather (ms) | dense of equal work (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens, dim, experts, top_k in ((1, 128, 12, 2), (256, 128, 12, 2), (2048, 128, 12, 2),
                                        (1, 256, 64, 4), (1024, 256, 64, 4)):  # fmt: skip
        x = torch.randn(tokens, dim)
        calls: dict[str, Callable[[], object]] = {}
        backends: tuple[Any, ...] = (None, "loop") if tokens > 1 else (None, "loop", "gather")
        for backend in backends:
            settings = MoeSettings(dim, 2 * dim, experts, top_k, backend=backend)
            calls[backend or "default"] = timed(MixtureOfExperts(settings), x)
        dense = FeedForward(dim, 2 * dim * top_k, activation="swish", gated=True, dropout=0.0)
        calls["dense"] = timed(dense, x)
        samples = interleave([calls], rounds=rounds, budget=20.0)
        cells = [
            f"{1000 * quartiles(samples[name]).median:.2f}" if name in samples else "-"
            for name in ("default", "loop", "gather", "dense")
        ]
        lines.append(f"| {tokens} | {dim} | {experts}, {top_k} | {' | '.join(cells)} |")
    return lines


def timed(module: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a decode step for one token, a training step for more."""
    if len(x) == 1:
        return torch.no_grad()(lambda: module(x))

    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(x).sum().backward()

    return step


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="updates of each decoder")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, load average {os.getloadavg()[0]:.1f}\n")
    print("\n".join(usage_rows(arguments.steps)))
    print()
    print("\n".join(speed_rows(arguments.rounds)))


if __name__ == "__main__":
    main()
