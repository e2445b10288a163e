"""Stage 4, memory pretraining: memory attention learns to write, before anything reads it.

Encoder and decoder are frozen. A dialogue window is written turn by turn, and after each turn the
slots are compared (cosine) with a target: a weighted sum of the slots before the turn and of the
turn's encoder states, aligned to the slots (RxT, arXiv 2510.03561, section 4.3). Targets are
constants: no gradient moves them towards the slots.

The number of slots and the number of tokens are independent. What is aligned is normalised to
rms 1, the size in which memory attention writes, so that the weights mean what they say.

Shapes: L layers, B dialogues, N turns, F = N * B flat turns (``n * B + b``), S slots, T tokens,
D width, H query heads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversations import ConversationSource
from rxlm.memory.attention import MemoryAttention
from rxlm.rxt.dialogues import DialogueBatch, TurnEncoder, select_dialogues
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import EncodedTurns, encode_turns, scan_memory
from rxlm.training.objective import StepOutput
from rxlm.training.objectives.model_objective import ModelObjective
from rxlm.training.objectives.row_windows import batch_windows, conversation_rows
from rxlm.training.watch import Watched, WatchSettings
from rxlm.training.watching.memory_use import write_measures

Alignment = Literal["content", "position"]


class MemoryPretrainingSettings(Config):
    """Settings of memory pretraining."""

    turns: int = Field(default=6, gt=0)
    """Turns of a dialogue window (at most)."""
    dialogues: int = Field(default=16, gt=0)
    """Dialogues in a batch."""
    alignment: Alignment = "content"
    """Which encoder state a slot is compared with: of the token that the slot attends to most, or
    (the RxLM reference's rule, for any number of slots) of the token at the slot's position when
    the tokens of the turn are stretched over the slots."""
    new_weight_first: float = Field(default=0.9, ge=0, le=1)
    """Weight of the encoder states in the target of the first turn; the old slots get the rest."""
    new_weight_later: float = Field(default=0.25, ge=0, le=1)
    """The same for all later turns: slots keep most of what they hold."""
    stm_diff_factor: float = Field(default=0.0, ge=0)
    """Weight of the mean squared change of the slots, which grows as sqrt(turn + 1)."""
    backprop_turns: int | None = Field(default=None, gt=0)
    """Cut the gradient after this many memory writes; None = through the whole window."""
    num_buckets: int = Field(default=3, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_dialogues: int = Field(default=64, gt=0)
    """Dialogues of a validation."""


class WriteScore(NamedTuple):
    """Means over layers, slots and existing turns, and the number of those turns.

    ``loss``: what is minimised; ``cosine`` to the target; ``write_size``: rms of the change of a
    slot in a turn.
    """

    loss: Tensor
    cosine: Tensor
    write_size: Tensor
    num_turns: int


class MemoryPretrainingObjective(ModelObjective):
    """One minus the cosine between the written slots and their targets."""

    name = "memory_pretraining"

    def __init__(
        self,
        model: ReactiveModel,
        train: ConversationSource,
        valid: ConversationSource,
        turns: TurnEncoder,
        settings: MemoryPretrainingSettings,
        *,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        super().__init__(model, turns.tokenizer, trains=("memory_attention",))
        self.train_source, self.valid_source = train, valid
        self.turns = turns
        self.settings = settings
        self.seed, self.accumulation = seed, accumulation

    def batch(self, step: int, micro_step: int) -> DialogueBatch:
        """Return the batch of a step: a pure function of the data, step and micro-step."""
        first = (step * self.accumulation + micro_step) * self.settings.dialogues
        return self._batch(self.train_source, range(first, first + self.settings.dialogues))

    def _batch(self, source: ConversationSource, positions: range) -> DialogueBatch:
        windows = [
            conversation_rows(self.turns, source.sample(position, self.settings.turns))
            for position in positions
        ]
        batch = batch_windows(
            windows,
            answers=False,
            num_buckets=self.settings.num_buckets,
            pad_id=self.tokenizer.pad_id,
        )
        return batch._replace(memory_seed=positions.start)

    def shard(self, batch: DialogueBatch, rank: int, size: int) -> DialogueBatch:
        """Return some of the dialogues."""
        share = self.share_of(batch.num_dialogues, rank, size)
        return select_dialogues(batch, share.start, len(share))

    def count_targets(self, batch: DialogueBatch) -> int:
        """Return the number of turns."""
        return sum(len(rows.ids) for rows in batch.encode)

    def loss(self, batch: DialogueBatch, step: int) -> StepOutput:
        """Return the mean over layers, slots and the turns that exist."""
        score = self._score(batch)
        metrics: dict[str, Tensor | float] = {
            "cosine": score.cosine.detach(),
            "write_size": score.write_size.detach(),
        }
        return StepOutput(score.loss, score.num_turns, metrics, batch.num_tokens)

    def _score(self, batch: DialogueBatch) -> WriteScore:
        with torch.no_grad():
            encoded = encode_turns(self.model.encoder, batch)
        memories = scan_memory(
            self.model.memory_attention,
            self.model.initial_memory(batch.num_dialogues, seed=batch.memory_seed),
            encoded,
            batch.num_turns,
            self.settings.backprop_turns,
            self.checkpoint_turns,
        )
        # Flat memories m * B + b: all but the last turn's are "before", all but the first "after".
        before = memories[:, : -batch.num_dialogues].detach()
        after = memories[:, batch.num_dialogues :]
        target = self._target(before, encoded, batch)
        cosine = torch.nn.functional.cosine_similarity(after.float(), target.float(), dim=-1)
        change = (after - before).float().square().mean(dim=-1)
        exists = encoded.mask.any(dim=1)
        growth = (_turn_numbers(batch, before.device) + 1).sqrt()[:, None]
        penalty = self.settings.stm_diff_factor * growth * change
        loss = 1.0 - cosine + penalty
        return WriteScore(
            loss=loss[:, exists].mean(),
            cosine=cosine[:, exists].mean(),
            write_size=change[:, exists].mean().sqrt(),
            num_turns=sum(rows.ids.shape[0] for rows in batch.encode),
        )

    @torch.no_grad()
    def _target(self, before: Tensor, encoded: EncodedTurns, batch: DialogueBatch) -> Tensor:
        """Return what the slots should be after each turn, ``[L, F, S, D]``, up to a factor."""
        memory_attention = self.model.memory_attention
        if self.settings.alignment == "content":
            aligned = align_by_content(memory_attention, before, encoded)
        else:
            aligned = align_by_position(encoded, before.shape[2])
        is_first = _turn_numbers(batch, before.device) == 0
        new_weight = torch.where(
            is_first, self.settings.new_weight_first, self.settings.new_weight_later
        )[:, None, None]
        return (1.0 - new_weight) * before + new_weight * memory_attention.source_norm(aligned)

    def validate(self) -> dict[str, float]:
        """Measure held-out dialogues."""
        total = self.settings.validation_dialogues
        scores = []
        for first in range(0, total, self.settings.dialogues):
            positions = range(first, min(first + self.settings.dialogues, total))
            scores.append(self._score(self.to_device(self._batch(self.valid_source, positions))))
        num_turns = sum(score.num_turns for score in scores)
        return {
            name: sum(float(getattr(score, name)) * score.num_turns for score in scores) / num_turns
            for name in ("loss", "cosine", "write_size")
        }

    def watch(self, settings: WatchSettings) -> Watched:
        """Measure whether the slots are kept apart (``write_size`` is measured anyway)."""
        if not settings.memory_dialogues:
            return Watched({}, [])
        batch = self.to_device(self._batch(self.valid_source, range(settings.memory_dialogues)))
        count = batch.num_dialogues
        encoded = encode_turns(self.model.encoder, batch)
        initial = self.model.initial_memory(count, seed=batch.memory_seed)
        memories = scan_memory(self.model.memory_attention, initial, encoded, batch.num_turns)
        measures = write_measures(memories, encoded, count)
        del measures["write_size"]
        return Watched(measures, [])


def align_by_content(
    memory_attention: MemoryAttention, slots: Tensor, encoded: EncodedTurns
) -> Tensor:
    """Return for each slot the state of the token that it attends to most, over all heads.

    Args:
        memory_attention: whose attention is meant.
        slots: memory before each turn, ``[L, F, S, D]``.
        encoded: the turns, ``[L, F, T, D]``.

    Returns:
        ``[L, F, S, D]``; arbitrary for turns that do not exist.
    """
    weights = memory_attention.write_weights(slots, encoded.states, encoded.mask).mean(dim=2)
    token = weights.argmax(dim=-1)
    return encoded.states.gather(2, token[..., None].expand(-1, -1, -1, slots.shape[-1]))


def align_by_position(encoded: EncodedTurns, num_slots: int) -> Tensor:
    """Stretch the real tokens of each turn linearly over the slots.

    Args:
        encoded: the turns, ``[L, F, T, D]``, padded on the right.
        num_slots: S. As many slots as real tokens take one token each.

    Returns:
        ``[L, F, S, D]``; arbitrary for turns that do not exist.
    """
    states, lengths = encoded.states, encoded.mask.sum(dim=1).clamp(min=1)
    steps = torch.arange(num_slots, device=states.device) / max(1, num_slots - 1)
    position = steps * (lengths[:, None] - 1)
    lower = position.floor().long()
    upper = torch.minimum(lower + 1, lengths[:, None] - 1)
    flat = torch.arange(states.shape[1], device=states.device)[:, None]
    fraction = (position - lower)[..., None].to(states.dtype)
    return torch.lerp(states[:, flat, lower], states[:, flat, upper], fraction)


def _turn_numbers(batch: DialogueBatch, device: torch.device) -> Tensor:
    """Return the turn of each flat index, ``[F]``."""
    return torch.arange(batch.num_turns, device=device).repeat_interleave(batch.num_dialogues)
