"""Training and scoring of small models on multi-query associative recall, for mqar.py.

A model is an embedding, two blocks ``x + mixer(norm(x))``, a norm and a head that shares the
embedding: Zoology's (arXiv:2312.04927), where the feed-forward networks are the identity. Every
mechanism sees convolved tokens: recurrences bring a short convolution; the others (softmax, ELU,
window) get one of the same width in front, as Zoology's hybrids do. Otherwise a mechanism would
lose for the want of a convolution.

Training is a curriculum of one run: the next difficulty is added as soon as the hardest so far is
mostly answered. It ends when fresh rows of every difficulty are answered, or when the learning rate
has fallen to its end.

Shapes: B rows, T tokens, Q questions of all rows, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxlm.data.mqar import IGNORED, MqarSettings, mqar_rows
from rxlm.data.order import random_offset
from rxlm.errors import RunError
from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.nn.short_conv import ShortConvolution

CONVOLUTION = 4
WITHOUT_CONVOLUTION = ("softmax", "elu", "taylor", "local")
"""Mixers that bring no convolution: one stands in front of them."""
TEST_SEED, STOP_SEED, ORDER_SEED = 1_000_000, 2_000_000, 3_000_000
"""Added to the seed of a run: rows of training are no rows of a test."""
Predict = Callable[[Tensor, Tensor], Tensor]
"""Tokens ``[B, T]`` and which of them ask, bool ``[B, T]``, to the answers ``[Q]``."""


class Difficulty(NamedTuple):
    """Pairs told and asked, and tokens of a row when training and when tested."""

    num_pairs: int
    train_length: int
    test_length: int


@dataclass(frozen=True)
class Recipe:
    """How every model is trained and tested; the same for all mechanisms.

    Attributes:
        difficulties: in the order of the curriculum. Tests are Zoology's; its rows of few pairs
            are mostly filler, so training rows are as short as they can be.
        vocab_size: V.
        learning_rate: constant after ``warm_up`` steps, falling linearly to a 20th over the last
            third of the steps, or from the step on at which the hardest is ``nearly`` known.
        tokens_per_step: of each batch, whatever its length.
        max_steps: after which training ends.
        decay_steps: how long the fall takes when it begins early.
        unlock: share of answers at which the next difficulty is added.
        target: share of answers, at every difficulty, at which training ends.
        questions: of each difficulty in the final test.
    """

    difficulties: tuple[Difficulty, ...] = (
        Difficulty(4, 16, 64),
        Difficulty(8, 32, 64),
        Difficulty(16, 64, 64),
        Difficulty(32, 128, 128),
        Difficulty(64, 256, 256),
    )
    vocab_size: int = 256
    learning_rate: float = 4e-3
    warm_up: int = 50
    weight_decay: float = 0.1
    tokens_per_step: int = 2048
    max_steps: int = 1200
    decay_steps: int = 300
    nearly: float = 0.97
    unlock: float = 0.9
    target: float = 0.995
    questions: int = 8192


class Recaller(nn.Module):
    """The two-layer model."""

    def __init__(self, mixer: str, dim: int, num_heads: int, vocab_size: int) -> None:
        super().__init__()
        settings = MixerSettings(
            dim=dim, num_heads=num_heads, expand_k=1.0, expand_v=1.0, conv_size=CONVOLUTION
        )
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.mixers = nn.ModuleList(build_mixer(mixer, settings) for _ in range(2))
        self.convolutions = nn.ModuleList(
            ShortConvolution(dim, CONVOLUTION) if mixer in WITHOUT_CONVOLUTION else nn.Identity()
            for _ in range(2)
        )
        self.head_norm = nn.RMSNorm(dim)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Return the logits ``[Q, V]`` where ``asked`` ``[B, T]`` is True."""
        hidden, _ = self._run(tokens)
        return F.linear(self.head_norm(hidden[asked]), self.embedding.weight)

    def predict(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Return the likeliest answers ``[Q]``."""
        with torch.no_grad():
            return self(tokens, asked).argmax(dim=-1)

    def state_bytes(self, length: int) -> int:
        """Return what decoding keeps of one row after ``length`` tokens, in both layers."""
        with torch.no_grad():
            _, kept = self._run(torch.zeros(1, length, dtype=torch.long))
        return _num_bytes(kept)

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        kept: list[Any] = []
        for norm, convolution, mixer in zip(
            self.norms, self.convolutions, self.mixers, strict=True
        ):
            y = norm(x)
            if isinstance(convolution, ShortConvolution):
                near, recent = convolution(y)
                y = y + near
                kept.append(recent)
            y, cache = mixer(y)
            kept.append(cache)
            x = x + y
        return x, kept


def _num_bytes(kept: Any) -> int:
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    return sum(_num_bytes(part) for part in kept) if isinstance(kept, (tuple, list)) else 0


class Score(NamedTuple):
    """Right answers, and questions."""

    correct: int
    asked: int

    @property
    def share(self) -> float:
        return self.correct / self.asked


def score(predict: Predict, task: MqarSettings, seed: int, questions: int) -> Score:
    """Return how many of about ``questions`` questions are answered with the right token.

    Args:
        predict: is shown tokens and where it is asked, never the targets.
        task: the difficulty.
        seed: of the test set.
        questions: rounded up to whole rows.
    """
    correct = asked = 0
    rows_at_once = max(1, 8192 // task.length)
    num_rows = -(-questions // task.num_pairs)
    for start in range(0, num_rows, rows_at_once):
        positions = range(start, min(num_rows, start + rows_at_once))
        tokens, where, answers = batch(task, seed, positions)
        correct += int((predict(tokens, where) == answers).sum())
        asked += answers.numel()
    return Score(correct, asked)


def batch(task: MqarSettings, seed: int, positions: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens ``[B, T]``, where they ask ``[B, T]``, and the right answers ``[Q]``."""
    rows = mqar_rows(task, seed, positions)
    targets = torch.from_numpy(rows.targets)
    asked = targets != IGNORED
    return torch.from_numpy(rows.tokens), asked, targets[asked]


class Outcome(NamedTuple):
    """What one training came to; ``curve``: (step, hardest difficulty so far, its share)."""

    scores: dict[int, Score]
    steps: int
    reached_target: bool
    cpu_seconds: float
    wall_seconds: float
    parameters: int
    state_bytes: int
    curve: list[tuple[int, int, float]]


def train(
    mixer: str,
    dim: int,
    num_heads: int,
    seed: int,
    recipe: Recipe,
    progress: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Train one model and test it.

    Raises:
        RunError: if the loss is no number any more.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    torch.manual_seed(seed)
    model = Recaller(mixer, dim, num_heads, recipe.vocab_size)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.98),
    )
    lessons = [MqarSettings(d.num_pairs, d.train_length, recipe.vocab_size) for d in
               recipe.difficulties]  # fmt: skip
    last = len(lessons) - 1
    recent = [0.0] * len(lessons)
    hardest = rows_seen = step = 0
    falls_from = recipe.max_steps * 2 // 3
    falls_for = recipe.max_steps - falls_from
    reached, curve = False, []
    for step in range(1, recipe.max_steps + 1):
        chosen = _choose(seed, step, hardest)
        num_rows = max(1, recipe.tokens_per_step // lessons[chosen].length)
        positions = range(rows_seen, rows_seen + num_rows)
        rows_seen += num_rows
        tokens, asked, answers = batch(lessons[chosen], seed, positions)
        logits = model(tokens, asked)
        loss = F.cross_entropy(logits, answers)
        if not torch.isfinite(loss):
            raise RunError(f"{mixer}, D = {dim}: the loss is {loss.item()} at step {step}.")
        fall = min(1.0, max(0.0, (step - falls_from) / falls_for))
        for group in optimizer.param_groups:
            factor = min(1.0, step / recipe.warm_up) * (1.0 - 0.95 * fall)
            group["lr"] = recipe.learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = (logits.argmax(dim=-1) == answers).float().mean().item()
        recent[chosen] = 0.8 * recent[chosen] + 0.2 * share
        if step % 50 == 0:
            curve.append((step, lessons[hardest].num_pairs, round(recent[hardest], 4)))
            progress(f"step {step}: {recent[hardest]:.1%} of {lessons[hardest].num_pairs} pairs")
        if hardest < last and recent[hardest] >= recipe.unlock:
            hardest += 1
        if hardest == last and recent[last] >= recipe.nearly and step < falls_from:
            falls_from, falls_for = step, min(recipe.decay_steps, recipe.max_steps - step)
        if step % 50 == 0 and recent[last] >= recipe.target - 0.01:
            reached = _all_known(model, recipe, seed)
            if reached:
                break
        if fall == 1.0:
            break
    scores = {
        d.num_pairs: score(
            model.predict,
            MqarSettings(d.num_pairs, d.test_length, recipe.vocab_size),
            TEST_SEED + seed,
            recipe.questions,
        )
        for d in recipe.difficulties
    }
    return Outcome(
        scores,
        step,
        reached,
        time.process_time() - cpu,
        time.perf_counter() - wall,
        sum(parameter.numel() for parameter in model.parameters()),
        model.state_bytes(recipe.difficulties[-1].test_length),
        curve,
    )


def _choose(seed: int, step: int, hardest: int) -> int:
    """Return the difficulty of a step: half of the time the hardest, otherwise any so far."""
    coin = random_offset(ORDER_SEED + seed, step, 2 * (hardest + 1))
    return coin if coin <= hardest else hardest


def _all_known(model: Recaller, recipe: Recipe, seed: int) -> bool:
    """Whether rows that neither training nor the test has are answered, hardest first."""
    return all(
        score(
            model.predict,
            MqarSettings(d.num_pairs, d.test_length, recipe.vocab_size),
            STOP_SEED + seed,
            recipe.questions // 4,
        ).share
        >= recipe.target
        for d in reversed(recipe.difficulties)
    )
