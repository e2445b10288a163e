"""Stage ``lm``: a language model without a memory predicts every next token.

A row is a piece of one document, or (``packing``) several pieces that do not see each other, so
nothing is read across documents; all tokens of a piece after its first are targets, [EOS] at a
document's end included. Or (``interactions``) it is a conversation, of which the answers are the
targets. The loss is the mean over the targets of an
update, however it is cut into micro-batches.

Shapes: R rows of a bucket, T tokens of its longest row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rxlm.configuration import Config
from rxlm.data.length_buckets import length_buckets
from rxlm.errors import UserError
from rxlm.lm.language_model import LanguageModel
from rxlm.ops.padding import padded
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.device import move_to_device
from rxlm.training.objective import MemorySaving, Objective, StepOutput
from rxlm.training.objectives.row_windows import RowSource
from rxlm.training.objectives.stream_rows import StreamRows
from rxlm.training.watch import Watched, WatchSettings
from rxlm.training.watching.samples import continued_texts

NOT_ARCHITECTURE = ("dropout", "init_std", "max_seq_len")
"""Fields of the configuration that weights do not depend on (``max_seq_len`` does count for
learned positions)."""


class LMSettings(Config):
    """Settings of language modelling."""

    batch_size: int = Field(default=64, gt=0)
    """Rows of a micro-batch; an update sees ``train.accumulation`` times as many."""
    seq_len: int | None = Field(default=None, ge=3)
    """Tokens of a row at most, with [BOS] and [EOS]; ``null``: the model's ``max_seq_len``."""
    num_buckets: int = Field(default=4, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_rows: int = Field(default=256, gt=0)
    """Rows of a validation, at most."""
    dialogues: int = Field(default=5000, gt=0)
    """Built-in dialogues to read where there is no ``data.text``."""
    turns: int = Field(default=8, gt=0)
    """Turns of each built-in dialogue."""
    packing: bool = False
    """Whether a row is filled up with several documents; they do not see each other. Then
    ``batch_size`` rows hold more tokens, and fewer of them are padding."""
    interactions: bool = False
    """Whether a row is a whole conversation in the form in which a Reactive Transformer reads its
    turns, and only what the model says is learned: the baseline of one (`rxlm eval suite`).
    ``turns`` is then also the most that is read of a conversation from a file."""

    @model_validator(mode="after")
    def _one_form(self) -> LMSettings:
        if self.packing and self.interactions:
            raise ValueError(
                "packing=true fills rows with pieces that do not see each other, interactions=true "
                "with turns that do: choose one"
            )
        return self


class LMRows(NamedTuple):
    """Right-padded rows of one bucket.

    ``ids`` int64 ``[R, T]``, ``mask`` bool ``[R, T]``; ``segments`` int64 ``[R, T]``, which piece
    of a packed row a token is of (from 1; 0 is padding), None where each row is one piece;
    ``learned`` bool ``[R, T]``: which tokens are, None: all.
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor | None = None
    learned: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """Which tokens after the first are predicted, bool ``[R, T - 1]``."""
        if self.learned is not None:
            return self.learned[:, 1:]
        if self.segments is None:
            return self.mask[:, 1:]
        return self.mask[:, 1:] & (self.segments[:, 1:] == self.segments[:, :-1])


def bucketed_rows(rows: Sequence[Sequence[int]], num_buckets: int, pad_id: int) -> list[LMRows]:
    """Sort rows by length and pad them to the longest of their bucket."""
    return [LMRows(*padded(part, pad_id)) for part in length_buckets(rows, num_buckets, len)]


def packed_rows(
    rows: Sequence[Sequence[Sequence[int]]], num_buckets: int, pad_id: int
) -> list[LMRows]:
    """Like :func:`bucketed_rows`, for rows of several pieces each."""
    buckets = []
    for part in length_buckets(rows, num_buckets, lambda row: sum(map(len, row))):
        ids, mask = padded([[token for piece in row for token in piece] for row in part], pad_id)
        numbers = [
            [number for number, piece in enumerate(row, start=1) for _ in piece] for row in part
        ]
        buckets.append(LMRows(ids, mask, padded(numbers, 0)[0]))
    return buckets


def dialogue_rows(
    rows: Sequence[Sequence[EncodedTurn]], num_buckets: int, pad_id: int
) -> list[LMRows]:
    """Like :func:`bucketed_rows`, for conversations of several turns each, joined to a row."""
    buckets = []
    for part in length_buckets(rows, num_buckets, lambda row: sum(len(turn.ids) for turn in row)):
        ids, mask = padded([[token for turn in row for token in turn.ids] for row in part], pad_id)
        learned = [
            [int(place >= turn.answer_start) for turn in row for place in range(len(turn.ids))]
            for row in part
        ]
        buckets.append(LMRows(ids, mask, None, padded(learned, 0)[0].bool()))
    return buckets


def next_token_losses(model: LanguageModel, rows: LMRows) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies, and the number of right predictions."""
    if rows.segments is None:
        hidden, _ = model(rows.ids[:, :-1], rows.mask[:, :-1])
    else:
        hidden = model.read_packed(rows.ids, rows.segments)[:, :-1]
    labels = rows.ids[:, 1:][rows.targets]
    return model.cross_entropy(hidden[rows.targets], labels, reduction="sum")


class LMObjective(Objective):
    """Next-token prediction by one model.

    Args:
        model: trained in place, with its tokenizer.
        train: rows to learn from, at any position or as a stream.
        valid: rows to validate on.
        settings: batch size and the like.
        accumulation: micro-batches of an update.
    """

    name = "lm"
    memory_saving = MemorySaving(lengths="a shorter objective.seq_len")

    def __init__(
        self,
        model: LanguageModel,
        train: RowSource | StreamRows,
        valid: RowSource,
        settings: LMSettings,
        *,
        accumulation: int = 1,
    ) -> None:
        self.model, self.settings, self.accumulation = model, settings, accumulation
        self.tokenizer = model.require_tokenizer()
        self.train_rows, self.valid_rows = train, valid
        model.requires_grad_(True)

    def trained_modules(self) -> nn.Module:
        """Return the model."""
        return self.model

    def layers(self) -> list[nn.Module]:
        """Return the layers of the model."""
        return list(self.model.layers)

    def batch(self, step: int, micro_step: int) -> list[LMRows]:
        """Return the rows of a micro-batch: a pure function of the data seed and the position."""
        size = self.settings.batch_size
        if isinstance(self.train_rows, StreamRows):
            return self._batch(self.train_rows.micro_batch(step, micro_step, size))
        first = (step * self.accumulation + micro_step) * size
        return self._batch([self.train_rows.sample(first + index, 1) for index in range(size)])

    def _batch(self, encoded: list[list[EncodedTurn]]) -> list[LMRows]:
        buckets, pad_id = self.settings.num_buckets, self.tokenizer.pad_id
        if self.settings.interactions:
            return dialogue_rows(encoded, buckets, pad_id)
        rows = [[piece.ids for piece in row] for row in encoded]
        if self.settings.packing:
            return packed_rows(rows, buckets, pad_id)
        return bucketed_rows([row[0] for row in rows], buckets, pad_id)

    def loss(self, batch: list[LMRows], step: int) -> StepOutput:
        """Return the mean cross-entropy over the targets."""
        num_targets = self.count_targets(batch)
        parts = [next_token_losses(self.model, rows) for rows in batch if len(rows.ids)]
        if not parts:
            # More processes than rows: nothing to learn here, but a graph to go backward in.
            nothing = self.model.embedding.weight.sum() * 0.0
            return StepOutput(nothing, 0, {}, 0)
        loss = torch.stack([part[0] for part in parts]).sum() / max(1, num_targets)
        correct = torch.stack([part[1] for part in parts]).sum()
        metrics = {"accuracy": correct / max(1, num_targets)}
        return StepOutput(loss, num_targets, metrics, sum(int(rows.mask.sum()) for rows in batch))

    def shard(self, batch: list[LMRows], rank: int, size: int) -> list[LMRows]:
        """Return every ``size``-th row of each bucket, so that all processes have equal work."""

        def part(rows: LMRows) -> LMRows:
            more = (None if item is None else item[rank::size] for item in rows[2:])
            return LMRows(rows.ids[rank::size], rows.mask[rank::size], *more)

        return [part(rows) for rows in batch]

    def count_targets(self, batch: list[LMRows]) -> int:
        """Return how many tokens are predicted."""
        return sum(int(rows.targets.sum()) for rows in batch)

    def validate(self) -> dict[str, float]:
        """Return loss, perplexity and accuracy on the first validation rows, always the same."""
        size, total = self.settings.batch_size, self.settings.validation_rows
        total = min(total, self.valid_rows.size(1))
        loss = correct = 0.0
        num_targets = 0
        for first in range(0, total, size):
            positions = range(first, min(first + size, total))
            batch = self._batch([self.valid_rows.sample(position, 1) for position in positions])
            for bucket in move_to_device(batch, self.model.device):
                part = next_token_losses(self.model, bucket)
                loss += float(part[0])
                correct += float(part[1])
                num_targets += int(bucket.targets.sum())
        mean = loss / num_targets
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "accuracy": correct / num_targets,
        }

    def watch(self, settings: WatchSettings) -> Watched:
        """Let the model continue the first halves of validation rows."""
        count = min(settings.sample_dialogues, self.valid_rows.size(1))
        rows = [self.valid_rows.sample(position, 1)[0].ids for position in range(count)]
        return Watched({}, continued_texts(self.model, rows, settings))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note how far training has come in a stream."""
        if isinstance(self.train_rows, StreamRows):
            self.train_rows.trained(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return where training is in a stream; rows that are read by position need no state."""
        return self.train_rows.state_dict() if isinstance(self.train_rows, StreamRows) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the stream where :meth:`state_dict` was.

        Raises:
            UserError: for the place in a stream, where no stream is read.
        """
        if isinstance(self.train_rows, StreamRows):
            if state:
                self.train_rows.load_state_dict(state)
        elif state:
            raise UserError(
                "data.streaming=false: the run in this folder read a stream, and its checkpoint "
                "says where in that it was. Resume with data.streaming=true and the same data, or "
                "train into another folder (init_from takes the weights along)."
            )

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Take each lane of a stream from the process that read it."""
        if isinstance(self.train_rows, StreamRows):
            return StreamRows.merged(states)
        return super().merge_states(states)

    def batch_state(self) -> Any:
        """Return nothing: a batch of a stream depends on its position only, too."""
        return {}

    def data_summary(self) -> dict[str, Any]:
        """Return how much was read and what was skipped; of a stream, what was trained on."""
        summary = super().data_summary()
        if isinstance(self.train_rows, StreamRows):
            summary["train"] = self.train_rows.summary().to_dict()
        return summary

    def architecture(self) -> dict[str, Any]:
        """Return the configuration that weights depend on, tokenizer included."""
        return {
            "model": lm_architecture(self.model.config),
            "vocabulary": self.tokenizer.fingerprint,
        }

    def save_model(self, directory: Path) -> None:
        """Write the model folder."""
        self.model.save_pretrained(directory)

    def load_model_weights(self, directory: Path) -> None:
        """Load the weights in place, strictly."""
        self.model.load_weights(directory)


def lm_architecture(config: Any) -> dict[str, Any]:
    """Return the part of an LMConfig that weights depend on; defaults are left out."""
    excluded = set(NOT_ARCHITECTURE)
    if config.positions == "learned":
        excluded.discard("max_seq_len")
    # Defaults are left out, so a field added later leaves old runs resumable.
    values: dict[str, Any] = config.model_dump(mode="json", exclude=excluded, exclude_defaults=True)
    return values


def row_length(model: LanguageModel, settings: LMSettings) -> int:
    """Return how many tokens a row has at most.

    Raises:
        UserError: for more than the model's ``max_seq_len``.
    """
    limit = model.config.max_seq_len
    if settings.seq_len is not None and settings.seq_len > limit:
        raise UserError(
            f"objective.seq_len={settings.seq_len} is more than model.max_seq_len={limit}: lower "
            "the one or raise the other."
        )
    return settings.seq_len or limit
