"""Stage 2, joint LM: the encoder restores hidden tokens, the decoder predicts what it reads.

Encoder and decoder learn a common vector space before there is a memory (RxT, arXiv 2510.03561,
section 4.1). The decoder is conditioned on the encoder's states of the row's own masked text, as
if they were memory slots: detached, so that only the masked LM loss teaches the encoder, and
noised, so that the decoder does not trust every detail of them.

**The decoder sees most of its answer, by design**: with ``context='same'`` the encoder read all
but the hidden 15 % of the very text that the decoder predicts, so the decoder's loss and accuracy
of this stage say little about language modelling. ``context='previous'`` shows it the earlier rows
of the window instead (turns of the dialogue, pieces of the document), which cannot leak.

Shapes: L layers, B windows, N rows of the longest window, R rows of a bucket, T tokens, D width,
M target tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation, ConversationSource
from rxlm.nn.expert_routing import record_routing
from rxlm.rxt.dialogues import (
    DialogueBatch,
    TurnEncoder,
    rows_of_dialogues,
    select_dialogues,
)
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import Answers, EncodedTurns, answer_rows, answer_with_history, encode_turns
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objective import StepOutput
from rxlm.training.objectives.expert_balance import with_balance
from rxlm.training.objectives.masked_lm import MaskReplacement, MLMHead, TokenMasker
from rxlm.training.objectives.model_objective import ModelObjective
from rxlm.training.objectives.row_windows import RowSource, batch_windows, conversation_rows
from rxlm.training.rng import derive_generator, derive_seed
from rxlm.training.watch import Watched, WatchSettings
from rxlm.training.watching.memory_use import loss_by_turn

logger = logging.getLogger(__name__)


class JointLMSettings(Config):
    """Settings of joint LM training."""

    turns: int = Field(default=4, gt=0)
    """Rows of a window (at most): turns of a dialogue, or pieces of a document."""
    dialogues: int = Field(default=16, gt=0)
    """Windows in a batch."""
    context: Literal["same", "previous"] = "same"
    """What the decoder reads: the encoder's states of the same row (masked; leaks by design), or
    of all earlier rows of the window."""
    noise_level: float = Field(default=0.2, ge=0)
    """Standard deviation of the noise on what the decoder reads, relative to each state's rms."""
    drop_probability: float = Field(default=0.0, ge=0, lt=1)
    """Probability of hiding a whole position of what the decoder reads."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Probability of hiding a token from the encoder; special tokens are never hidden."""
    mask_replacement: MaskReplacement = "mask"
    """What the encoder sees in place of hidden tokens: always [MASK], or BERT's 80/10/10 rule."""
    encoder_loss_scale: float = Field(default=1.0, ge=0)
    """Weight of the encoder's masked LM loss."""
    decoder_loss_scale: float = Field(default=1.0, ge=0)
    """Weight of the decoder's LM loss."""
    moe_aux_loss_scale: float = Field(default=0.01, ge=0)
    """Weight of what keeps experts evenly used, if the model has experts."""
    num_buckets: int = Field(default=3, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_dialogues: int = Field(default=64, gt=0)
    """Windows of a validation."""


class Whole(NamedTuple):
    """A micro-batch that was cut: its sizes, and the ``first`` dialogue of the part."""

    first: int
    num_dialogues: int
    num_turns: int
    length: int
    num_hidden: int
    num_predicted: int


class JointBatch(NamedTuple):
    """One batch.

    ``dialogues.encode`` holds what the encoder sees, with the hidden tokens as targets;
    ``labels`` the true ids of each of its buckets, ``[R, T]``; ``dialogues.answer`` what the
    decoder predicts; ``noise_seed`` seeds noise and drops; ``whole`` describes the micro-batch of
    which this is a part, None if it is whole.
    """

    dialogues: DialogueBatch
    labels: tuple[Tensor, ...]
    noise_seed: int
    whole: Whole | None = None


class Score(NamedTuple):
    """Sums over target tokens: cross-entropy, right predictions, and how many there are."""

    loss: Tensor
    correct: Tensor
    num_targets: int


class JointLMObjective(ModelObjective):
    """Masked LM of the encoder plus LM of the decoder conditioned on the encoder's states.

    The decoder predicts every token of a row after the first, the last ([EOS]) included; padding
    is never a target. With accumulation, micro-batches weigh as their targets of both kinds.
    """

    name = "joint_lm"
    answers_only = False
    """Whether the decoder predicts only the answers of turns, and not the whole rows."""

    def __init__(
        self,
        model: ReactiveModel,
        train: ConversationSource | RowSource,
        valid: ConversationSource | RowSource,
        turns: TurnEncoder,
        settings: JointLMSettings,
        *,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        config = model.config.encoder
        generator = derive_generator(seed, "mlm_head")
        super().__init__(
            model,
            turns.tokenizer,
            trains=("encoder", "decoder"),
            extra_modules={"mlm_head": MLMHead(config.embed_dim, config.vocab_size, generator)},
        )
        self.train_source, self.valid_source = train, valid
        self.turns = turns
        self.settings = settings
        self.seed, self.accumulation = seed, accumulation
        if not self._unrolls_turns():
            self.memory_saving = self.memory_saving._replace(checkpointing=("layers",))
        self._masker = TokenMasker(
            turns.tokenizer, settings.mask_probability, settings.mask_replacement
        )

    def set_gradient_checkpointing(self, *, layers: bool, turns: bool) -> None:
        """As for every stage; there are turns here only if a decoder carries a state."""
        if turns and not self._unrolls_turns():
            logger.warning(
                "gradient_checkpointing of turns has no effect in stage %s: there is no memory, "
                "and no state is carried from turn to turn",
                self.name,
            )
        super().set_gradient_checkpointing(layers=layers, turns=turns)

    def _unrolls_turns(self) -> bool:
        """Return whether the decoder goes from turn to turn with a state."""
        return self.model.decoder.carries_state and self.settings.context == "previous"

    def batch(self, step: int, micro_step: int) -> JointBatch:
        """Return the batch of a step: a pure function of seed, step and micro-step."""
        first = (step * self.accumulation + micro_step) * self.settings.dialogues
        positions = range(first, first + self.settings.dialogues)
        return self._batch(self.train_source, positions, derive_seed(self.seed, step, micro_step))

    def _batch(
        self, source: ConversationSource | RowSource, positions: range, seed: int
    ) -> JointBatch:
        windows = [self._window(source, position) for position in positions]
        batch = batch_windows(
            windows,
            answers=True,
            num_buckets=self.settings.num_buckets,
            pad_id=self.tokenizer.pad_id,
        )
        return self._masked(batch, seed)

    def _window(self, source: ConversationSource | RowSource, position: int) -> list[EncodedTurn]:
        """Return the rows at ``position``; what precedes ``answer_start`` is not predicted."""
        window = source.sample(position, self.settings.turns)
        if not isinstance(window, Conversation):
            return window
        rows = conversation_rows(self.turns, window)
        return rows if self.answers_only else [EncodedTurn(row.ids, 0) for row in rows]

    def _masked(self, batch: DialogueBatch, seed: int) -> JointBatch:
        """Hide tokens from the encoder; which ones does not depend on the buckets."""
        longest = max(rows.ids.shape[1] for rows in batch.encode)
        shape = (batch.num_turns * batch.num_dialogues, longest, 3)
        draws = torch.rand(shape, generator=derive_generator(seed, "mask"))
        seen = []
        for rows in batch.encode:
            ids, hidden = self._masker(rows.ids, draws[rows.place, : rows.ids.shape[1]])
            seen.append(rows._replace(ids=ids, targets=hidden))
        labels = tuple(rows.ids for rows in batch.encode)
        return JointBatch(batch._replace(encode=tuple(seen)), labels, derive_seed(seed, "noise"))

    def shard(self, batch: JointBatch, rank: int, size: int) -> JointBatch:
        """Return some of the windows, with the masks and the noise that they have in the whole."""
        dialogues = batch.dialogues
        share = self.share_of(dialogues.num_dialogues, rank, size)
        kept = [
            rows_of_dialogues(rows, dialogues, share.start, len(share)) for rows in dialogues.encode
        ]
        labels = [ids[keep] for ids, keep in zip(batch.labels, kept, strict=True) if keep.any()]
        num_hidden, num_predicted = _count_targets(dialogues)
        whole = Whole(
            first=share.start,
            num_dialogues=dialogues.num_dialogues,
            num_turns=dialogues.num_turns,
            length=max(rows.ids.shape[1] for rows in dialogues.encode),
            num_hidden=num_hidden,
            num_predicted=num_predicted,
        )
        part = select_dialogues(dialogues, share.start, len(share))
        return JointBatch(part, tuple(labels), batch.noise_seed, whole)

    def count_targets(self, batch: JointBatch) -> int:
        """Return the number of hidden and of predicted tokens."""
        return sum(_count_targets(batch.dialogues))

    def loss(self, batch: JointBatch, step: int) -> StepOutput:
        """Return the weighted sum of the two mean cross-entropies.

        Of a part: what it contributes to that of the whole, so that the parts' losses, weighted by
        their targets, make it up.
        """
        with record_routing() as routing:
            mlm, lm = self._scores(batch)
        num_targets, whole = mlm.num_targets + lm.num_targets, batch.whole
        if whole is None:
            total = self._total(mlm, lm)
        else:
            counts = whole.num_hidden, whole.num_predicted
            total = self._total(mlm, lm, *counts) * (sum(counts) / max(1, num_targets))
        weights = {
            f"{name}_{kind}": float(score.num_targets)
            for name, score in (("mlm", mlm), ("lm", lm))
            for kind in ("loss", "accuracy")
        }
        num_tokens = batch.dialogues.num_tokens
        total, experts = with_balance(total, routing, self.settings.moe_aux_loss_scale)
        return StepOutput(total, num_targets, {**_metrics(mlm, lm), **experts}, num_tokens, weights)

    def _total(
        self, mlm: Score, lm: Score, num_hidden: int | None = None, num_predicted: int | None = None
    ) -> Tensor:
        encoder_loss = mlm.loss / max(1, mlm.num_targets if num_hidden is None else num_hidden)
        decoder_loss = lm.loss / max(1, lm.num_targets if num_predicted is None else num_predicted)
        settings = self.settings
        return (
            settings.encoder_loss_scale * encoder_loss + settings.decoder_loss_scale * decoder_loss
        )

    def _scores(self, batch: JointBatch) -> tuple[Score, Score]:
        """Return the scores of the encoder's and the decoder's predictions."""
        encoded = encode_turns(self.model.encoder, batch.dialogues)
        context = self._noised(encoded, batch)
        return self._score_hidden(batch, encoded), _score_answers(self._answers(batch, context))

    def _score_hidden(self, batch: JointBatch, encoded: EncodedTurns) -> Score:
        hidden, labels = [], []
        for rows, true_ids in zip(batch.dialogues.encode, batch.labels, strict=True):
            row, position = rows.targets.nonzero(as_tuple=True)
            hidden.append(encoded.states[-1, rows.place[row], position])
            labels.append(true_ids[row, position])
        head = self.extra_modules["mlm_head"]
        return _score(
            head(torch.cat(hidden), self.model.encoder.embedding.weight), torch.cat(labels)
        )

    def _answers(self, batch: JointBatch, context: EncodedTurns) -> list[Answers]:
        decoder = self.model.decoder
        if self.settings.context == "previous":
            # A decoder that carries a state reads the turns as they are, nothing hidden.
            told = tuple(
                rows._replace(ids=ids)
                for rows, ids in zip(batch.dialogues.encode, batch.labels, strict=True)
            )
            return answer_with_history(
                decoder,
                batch.dialogues._replace(encode=told),
                context,
                checkpoint_turns=self.checkpoint_turns,
            )
        answers = []
        for rows in batch.dialogues.answer:
            length = rows.ids.shape[1]
            slots = context.states[:, rows.place, :length]
            answers.append(answer_rows(decoder, rows, slots, context.mask[rows.place, :length]))
        return answers

    def _noised(self, encoded: EncodedTurns, batch: JointBatch) -> EncodedTurns:
        """Return what the decoder may read of the encoder's states; no gradient goes back."""
        states, mask = encoded.states.detach(), encoded.mask
        generator = torch.Generator(device=states.device).manual_seed(batch.noise_seed)
        size = _drawn_size(batch, mask)
        if self.settings.drop_probability:
            draws = torch.rand(size, generator=generator, device=mask.device)
            mask = mask & (
                _drawn_part(draws[None], batch, mask)[0] >= self.settings.drop_probability
            )
        if self.settings.noise_level:
            shape = (states.shape[0], *size, states.shape[-1])
            noise = torch.randn(shape, generator=generator, device=states.device)
            noise = _drawn_part(noise, batch, mask)
            rms = states.float().square().mean(dim=-1, keepdim=True).sqrt()
            states = (states + self.settings.noise_level * rms * noise).to(states.dtype)
        return EncodedTurns(states, mask)

    def validate(self) -> dict[str, float]:
        """Measure held-out windows, masked and noised as in training, always in the same way."""
        total = self.settings.validation_dialogues
        mlm, lm = [], []
        for first in range(0, total, self.settings.dialogues):
            positions = range(first, min(first + self.settings.dialogues, total))
            batch = self._batch(self.valid_source, positions, derive_seed(0, "valid", first))
            scores = self._scores(self.to_device(batch))
            mlm.append(scores[0])
            lm.append(scores[1])
        all_mlm, all_lm = _summed(mlm), _summed(lm)
        metrics = {name: float(value) for name, value in _metrics(all_mlm, all_lm).items()}
        measured = {name: value for name, value in metrics.items() if not math.isnan(value)}
        return {"loss": float(self._total(all_mlm, all_lm)), **measured}

    def watch(self, settings: WatchSettings) -> Watched:
        """Measure the decoder's loss by turn (by row of a window, for documents)."""
        if not settings.memory_dialogues:
            return Watched({}, [])
        positions = range(settings.memory_dialogues)
        batch = self._batch(self.valid_source, positions, derive_seed(0, "watch"))
        batch = self.to_device(batch)
        encoded = encode_turns(self.model.encoder, batch.dialogues)
        answers = self._answers(batch, self._noised(encoded, batch))
        if not answers:
            return Watched({}, [])
        return Watched(loss_by_turn(answers, batch.dialogues.num_dialogues), [])


def _drawn_size(batch: JointBatch, mask: Tensor) -> tuple[int, int]:
    """Return for how many flat turns and tokens noise is drawn: for those of the whole."""
    whole = batch.whole
    if whole is None:
        return mask.shape[0], mask.shape[1]
    return whole.num_turns * whole.num_dialogues, whole.length


def _drawn_part(draws: Tensor, batch: JointBatch, mask: Tensor) -> Tensor:
    """Return of numbers drawn for the whole, ``[L, N * B, T, ...]``, those of this part."""
    whole, part = batch.whole, batch.dialogues
    if whole is None:
        return draws
    by_turn = draws.unflatten(1, (whole.num_turns, whole.num_dialogues))
    own = by_turn[:, : part.num_turns, whole.first : whole.first + part.num_dialogues]
    return own.flatten(1, 2)[:, :, : mask.shape[1]]


def _count_targets(batch: DialogueBatch) -> tuple[int, int]:
    """Return how many tokens the encoder restores and the decoder predicts."""
    hidden = sum(int(rows.targets.sum()) for rows in batch.encode)
    return hidden, sum(int(rows.targets[:, 1:].sum()) for rows in batch.answer)


def _score(logits: Tensor, labels: Tensor) -> Score:
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return Score(loss, (logits.argmax(dim=-1) == labels).sum(), labels.numel())


def _score_answers(answers: list[Answers]) -> Score:
    return _summed([_score(item.logits, item.labels) for item in answers])


def _summed(scores: list[Score]) -> Score:
    zero = torch.zeros(())
    return Score(
        loss=sum((item.loss for item in scores), zero),
        correct=sum((item.correct for item in scores), zero),
        num_targets=sum(item.num_targets for item in scores),
    )


def _metrics(mlm: Score, lm: Score) -> dict[str, Tensor | float]:
    metrics: dict[str, Tensor | float] = {}
    for name, score in (("mlm", mlm), ("lm", lm)):
        # Without a target 0 / 0 is NaN, which means: not measured.
        metrics[f"{name}_loss"] = score.loss.detach() / score.num_targets
        metrics[f"{name}_accuracy"] = score.correct / score.num_targets
    return metrics
