"""The two stages of a study, for the one Trainer: learning a synthetic task, learning text.

Both train a :class:`~rxlm.study.network.StudyNetwork` and predict at some positions: of a task
where it asks, of a text everywhere. A task is a curriculum of sizes in one run: half of the steps
are of the hardest size so far, the others of any; the next is added when the hardest is mostly
answered.

Shapes: B rows, T tokens, Q answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.data.mqar import IGNORED
from rxlm.data.order import random_offset
from rxlm.data.synthetic_tasks import SequenceTask
from rxlm.storage.model_folder import WEIGHTS_FILE
from rxlm.storage.weights import copy_weights, save_model_folder
from rxlm.study.corpus import Corpus
from rxlm.study.network import StudyNetwork
from rxlm.training.objective import Objective, StepOutput
from rxlm.version import __version__

TEST_SEED, VALID_SEED, ORDER_SEED = 1_000_000, 2_000_000, 3_000_000
"""Added to the seed of a run: rows of training are none of validation or test."""
UNLOCK = 0.9
"""Share of right answers at which the next size is added."""
_SMOOTHING = 0.8
_VALIDATION_TOKENS = 4096
_ROWS_AT_ONCE_TOKENS = 16384

Predict = Callable[[Tensor, Tensor], Tensor]
"""Tokens ``[B, T]`` and which of them ask, bool ``[B, T]``, to the answers ``[Q]``."""


class TaskScore(NamedTuple):
    """Right answers of one size: single tokens, and rows that are right as a whole."""

    right_tokens: int
    tokens: int
    right_rows: int
    rows: int

    @property
    def accuracy(self) -> float:
        """Share of right tokens."""
        return self.right_tokens / self.tokens


def score_task(predict: Predict, task: SequenceTask, seed: int, num_rows: int) -> TaskScore:
    """Return what is answered right in the first ``num_rows`` rows of ``seed``.

    Args:
        predict: is shown tokens and where it is asked, never the targets of those places.
        task: the size.
        seed: of the rows.
        num_rows: at least 1.
    """
    right_tokens = tokens = right_rows = 0
    at_once = max(1, _ROWS_AT_ONCE_TOKENS // task.length)
    for start in range(0, num_rows, at_once):
        ids, targets = task_batch(task, seed, range(start, min(num_rows, start + at_once)))
        asked = targets != IGNORED
        good = torch.zeros_like(asked)
        good[asked] = predict(ids, asked) == targets[asked]
        right_tokens += int(good.sum())
        tokens += int(asked.sum())
        right_rows += int((good | ~asked).all(dim=1).sum())
    return TaskScore(right_tokens, tokens, right_rows, num_rows)


def task_batch(task: SequenceTask, seed: int, positions: range) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, int64 ``[B, T]`` each."""
    rows = task.rows(seed, positions)
    return torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)


def predictor(network: StudyNetwork) -> Predict:
    """Return the likeliest answers of a network."""

    @torch.no_grad()
    def predict(ids: Tensor, asked: Tensor) -> Tensor:
        hidden, _ = network(ids.to(network.device))
        return network.logits(hidden[asked.to(network.device)]).argmax(dim=-1).cpu()

    return predict


class StudyObjective(Objective):
    """What both stages share: the network and its files."""

    def __init__(self, network: StudyNetwork) -> None:
        self.network = network

    def trained_modules(self) -> nn.Module:
        """Return the network."""
        return self.network

    def save_model(self, directory: Path) -> None:
        """Write weights and configuration."""
        config = {
            "architecture": type(self.network).__name__,
            "rxlm_version": __version__,
            **self.network.config.model_dump(mode="json"),
        }
        card = "A model of a study of attention mechanisms (`rxlm study`).\n"
        save_model_folder(self.network, directory, config=config, card=card, tokenizer=None)

    def load_model_weights(self, directory: Path) -> None:
        """Load the weights in place, strictly."""
        copy_weights(self.network, directory / WEIGHTS_FILE)

    def _loss(self, ids: Tensor, targets: Tensor) -> StepOutput:
        """Predict ``targets`` ``[B, T]`` where they are not IGNORED."""
        asked = targets != IGNORED
        hidden, _ = self.network(ids)
        loss, correct = self.network.cross_entropy(hidden[asked], targets[asked])
        count = int(asked.sum())
        return StepOutput(loss, count, {"accuracy": correct / count}, ids.numel())

    def count_targets(self, batch: Any) -> int:
        """Return how many answers there are."""
        return int((batch[1] != IGNORED).sum())


class TaskObjective(StudyObjective):
    """A synthetic task in ascending sizes."""

    def __init__(
        self, network: StudyNetwork, tasks: Sequence[SequenceTask], seed: int, tokens_per_step: int
    ) -> None:
        super().__init__(network)
        self.name = f"study-task-{tasks[0].name}"
        self.tasks, self.seed, self.tokens_per_step = tasks, seed, tokens_per_step
        self._hardest = 0
        self._recent = 0.0

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Return tokens and targets of one size."""
        task = self.tasks[self._chosen(step)]
        rows = self._rows(task)
        # No two steps share rows, whatever sizes they are of.
        first = step * self._rows(self.tasks[0])
        return task_batch(task, self.seed, range(first, first + rows))

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> StepOutput:
        """Predict the answers."""
        return self._loss(*batch)

    def validate(self) -> dict[str, float]:
        """Return the share of right answers over all sizes, and of the hardest."""
        predict = predictor(self.network)
        scores = [
            score_task(predict, task, VALID_SEED + self.seed, _validation_rows(task))
            for task in self.tasks
        ]
        shares = [score.accuracy for score in scores]
        # The worst size counts: an average hides that one is not known at all.
        return {
            "accuracy": sum(shares) / len(shares),
            "accuracy_worst": min(shares),
            "accuracy_hardest": shares[-1],
            "size": float(self.tasks[self._hardest].size),
        }

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the next size once the hardest so far is mostly answered."""
        if self._chosen(step) != self._hardest:
            return
        self._recent = _SMOOTHING * self._recent + (1 - _SMOOTHING) * metrics["accuracy"]
        if self._recent >= UNLOCK and self._hardest < len(self.tasks) - 1:
            self._hardest += 1
            self._recent = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return where the curriculum is."""
        return {"hardest": self._hardest, "recent": self._recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the curriculum."""
        self._hardest, self._recent = int(state["hardest"]), float(state["recent"])

    def batch_state(self) -> Any:
        """Return the hardest size so far."""
        return self._hardest

    def _chosen(self, step: int) -> int:
        """Return the size of a step: half of the time the hardest, otherwise any so far."""
        coin = random_offset(ORDER_SEED + self.seed, step, 2 * (self._hardest + 1))
        return min(coin, self._hardest)

    def _rows(self, task: SequenceTask) -> int:
        return max(1, self.tokens_per_step // task.length)


def _validation_rows(task: SequenceTask) -> int:
    return max(8, _VALIDATION_TOKENS // task.length)


class TextObjective(StudyObjective):
    """Every next token of a text."""

    name = "study-pretrain"

    def __init__(
        self,
        network: StudyNetwork,
        corpus: Corpus,
        *,
        seed: int,
        seq_len: int,
        batch_tokens: int,
        validation_tokens: int,
    ) -> None:
        super().__init__(network)
        self.corpus, self.seed, self.seq_len = corpus, seed, seq_len
        self.rows_per_step = max(1, batch_tokens // seq_len)
        self.validation_tokens = validation_tokens

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Return rows and their next tokens."""
        first = step * self.rows_per_step
        rows = self.corpus.batch(self.seed, range(first, first + self.rows_per_step), self.seq_len)
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> StepOutput:
        """Predict every next token."""
        return self._loss(*batch)

    def validate(self) -> dict[str, float]:
        """Return loss, perplexity and bits per byte."""
        losses, num_bytes = row_losses(
            self.network, self.corpus, self.seq_len, self.validation_tokens
        )
        return text_metrics(losses, num_bytes, self.seq_len)


@torch.no_grad()
def row_losses(
    network: StudyNetwork, corpus: Corpus, seq_len: int, validation_tokens: int
) -> tuple[list[float], float]:
    """Return the mean loss of every validation row in nats a token, and the bytes predicted."""
    rows, num_bytes = corpus.validation_rows(seq_len, validation_tokens)
    ids = torch.from_numpy(rows).to(network.device)
    losses: list[float] = []
    for part in ids.split(max(1, _ROWS_AT_ONCE_TOKENS // seq_len)):
        hidden, _ = network(part[:, :-1])
        scores = network.logits(hidden).flatten(0, 1).float()
        found = nn.functional.cross_entropy(scores, part[:, 1:].flatten(), reduction="none")
        losses += found.view(len(part), -1).double().mean(dim=1).tolist()
    return losses, num_bytes


def text_metrics(losses: Sequence[float], num_bytes: float, seq_len: int) -> dict[str, float]:
    """Return loss (nats a token), perplexity and bits per byte of rows of ``seq_len`` tokens."""
    loss = sum(losses) / len(losses)
    nats = sum(losses) * seq_len
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
    }
