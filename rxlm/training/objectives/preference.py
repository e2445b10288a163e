"""Stage 6b, preference optimisation: of two answers to a query, the better one becomes likelier.

    dpo      -log sigmoid(beta * ((pi_c - pi_r) - (ref_c - ref_r)))
    simpo    -log sigmoid(beta * (pi_c / n_c - pi_r / n_r) - margin)
    loss     (1 - s) * that + s * the same with the answers exchanged  +  chosen_scale * NLL

``pi`` and ``ref`` are log-probabilities of a whole answer under the model and under a frozen copy
of it, of the chosen (c) and the rejected (r) answer; ``n`` are lengths in tokens, NLL is the mean
over the tokens of the chosen answer. (DPO: Rafailov et al. 2023, arXiv 2305.18290; label smoothing:
cDPO; SimPO, which needs no reference: Meng et al. 2024, arXiv 2405.14734.)

Both answers of a turn are read from the same memory: that of the turns *before*, written with their
chosen answers. The turn itself is written after both were scored, and a rejected answer never is,
so nothing of a pair is in the memory that it is scored from.

Shapes: B dialogues, N turns, M target tokens of a bucket, P flat memories (``n * B + b``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversation_source import ConversationList, ConversationSource
from rxlm.data.conversations import Conversation
from rxlm.data.preferences import as_rejected, has_pairs, rejected_turn, with_rejected
from rxlm.errors import UserError
from rxlm.nn.expert_routing import record_routing
from rxlm.rxt.dialogues import (
    GROUPS,
    DialogueBatch,
    Row,
    TurnEncoder,
    dialogue_batch,
    group_of,
    select_dialogues,
)
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import Answers
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objective import MemorySaving, StepOutput
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.expert_balance import with_balance
from rxlm.training.objectives.frozen_policy import (
    Component,
    FrozenPolicyObjective,
    summed_by_place,
    token_scores,
)
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.watch import Watched, WatchSettings

_PROBE = GROUPS.index("probe")


class PreferenceSettings(Config):
    """Settings of preference optimisation."""

    turns: int = Field(default=8, gt=0)
    """Turns of a dialogue window (at most)."""
    dialogues: int = Field(default=8, gt=0)
    """Dialogues in a batch."""
    variant: Literal["dpo", "simpo"] = "dpo"
    """``dpo`` measures against a frozen copy of the model, ``simpo`` against nothing."""
    beta: float = Field(default=0.1, gt=0)
    """How sharply a preference counts. SimPO compares means over tokens, not sums: 2 is usual."""
    margin: float = Field(default=0.0, ge=0)
    """By how much a chosen answer must be ahead (``simpo`` only)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round."""
    chosen_scale: float = Field(default=0.1, ge=0)
    """Weight of the chosen answers' own likelihood. Preferences alone may make both answers less
    likely, as long as the rejected one falls faster."""
    backprop_turns: int | None = Field(default=None, gt=0)
    """Cut the gradient after this many memory writes; None = through the whole window."""
    trains: tuple[Component, ...] = ("encoder", "decoder", "memory_attention")
    """The components that learn."""
    moe_aux_loss_scale: float = Field(default=0.01, ge=0)
    """Weight of what keeps experts evenly used, if the model has experts."""
    num_buckets: int = Field(default=3, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_dialogues: int = Field(default=64, gt=0)
    """Dialogues of a validation."""

    @model_validator(mode="after")
    def _check(self) -> PreferenceSettings:
        if self.margin and self.variant != "simpo":
            raise ValueError(
                f"margin={self.margin:g} with variant='{self.variant}': only simpo has one; set "
                "margin: 0, or variant: simpo"
            )
        return self


class PairScores(NamedTuple):
    """Of each pair: log-probability of the chosen and of the rejected answer, sums over tokens, and
    how many tokens those are; all ``[pairs]``."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


class PreferenceObjective(FrozenPolicyObjective):
    """Preferences over answers that share a memory."""

    name = "preference"
    memory_saving = MemorySaving(
        "objective.dialogues",
        "a smaller objective.turns or a shorter seq_len of the model",
        ("turns",),
    )

    def __init__(
        self,
        model: ReactiveModel,
        train: ConversationSource,
        valid: ConversationSource,
        turns: TurnEncoder,
        settings: PreferenceSettings,
        *,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        for source in (train, valid):
            check_pairs(source, turns)
        # What the stage before measured, measured in the same way.
        self._answering = MemoryAwareObjective(
            model,
            train,
            valid,
            turns,
            MemoryAwareSettings(
                phases=(Phase(turns=settings.turns, dialogues=settings.dialogues),),
                validation_dialogues=settings.validation_dialogues,
            ),
            seed=seed,
        )
        super().__init__(
            model,
            turns.tokenizer,
            trains=settings.trains,
            needs_reference=settings.variant == "dpo",
        )
        self.train_source, self.valid_source = train, valid
        self.turns, self.settings = turns, settings
        self.accumulation = accumulation

    def batch(self, step: int, micro_step: int) -> DialogueBatch:
        """Return the batch of a step: a pure function of the data and the step."""
        count = self.settings.dialogues
        first = (step * self.accumulation + micro_step) * count
        return self._batch(self.train_source, first, count)

    def _batch(self, source: ConversationSource, first: int, count: int) -> DialogueBatch:
        conversations = [
            with_rejected(source.sample(position, self.settings.turns))
            for position in range(first, first + count)
        ]
        return self.pairs_of(conversations)._replace(memory_seed=first)

    def pairs_of(self, conversations: list[Conversation]) -> DialogueBatch:
        """Return dialogues of which every turn is written, and every pair is scored.

        Rejected answers are rows of the group 'probe': asked, and never written.
        """
        count = len(conversations)
        encode: list[Row] = []
        answer: list[Row] = []
        for b, conversation in enumerate(conversations):
            start = 0
            if conversation.system:
                encode.append(Row(self.turns.system(conversation.system), b, 0))
                start = 1
            for n, item in enumerate(conversation.interactions, start):
                chosen = _after_opening(self.turns.encode(item))
                row = Row(chosen, n * count + b, group_of(item))
                encode.append(row)
                if item.rejected is not None:
                    rejected = _after_opening(self.turns.encode(rejected_turn(item)))
                    answer += [row, Row(rejected, row.place, _PROBE)]
        longest = max(len(item.interactions) + bool(item.system) for item in conversations)
        return dialogue_batch(
            encode,
            answer,
            num_dialogues=count,
            num_turns=longest,
            num_buckets=self.settings.num_buckets,
            pad_id=self.turns.tokenizer.pad_id,
        )

    def shard(self, batch: DialogueBatch, rank: int, size: int) -> DialogueBatch:
        """Return some of the dialogues."""
        share = self.share_of(batch.num_dialogues, rank, size)
        return select_dialogues(batch, share.start, len(share))

    def count_targets(self, batch: DialogueBatch) -> int:
        """Return the number of pairs."""
        return sum(int((rows.group == _PROBE).sum()) for rows in batch.answer)

    def loss(self, batch: DialogueBatch, step: int) -> StepOutput:
        """Return the mean loss over pairs."""
        count = self.count_targets(batch)
        if not count:
            nothing = self.model.encoder.embedding.weight.sum() * 0.0
            return StepOutput(nothing, 0, {}, batch.num_tokens)
        with record_routing() as routing:
            scores = self.pair_scores(self.model, batch)
        reference = self.reference_scores(batch)
        margins = preference_margins(scores, reference, self.settings)
        loss = preference_loss(margins, self.settings.label_smoothing).mean()
        likelihood = (scores.chosen / scores.chosen_length).mean()
        loss = loss - self.settings.chosen_scale * likelihood
        loss, experts = with_balance(loss, routing, self.settings.moe_aux_loss_scale)
        metrics = {
            **pair_metrics(scores, reference, margins, self.settings),
            **experts,
        }
        return StepOutput(loss, count, metrics, batch.num_tokens)

    def reference_scores(self, batch: DialogueBatch) -> PairScores | None:
        """Return what the frozen copy thinks, from memories of its own; None without one."""
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.pair_scores(self.reference, batch)

    def pair_scores(self, network: RxTNetwork, batch: DialogueBatch) -> PairScores:
        """Return the scores of all pairs of a batch, in the order of their places.

        Args:
            network: the model or the reference; it writes the memories that it reads.
            batch: from :meth:`pairs_of`, on its device.
        """
        answers = self.answers(network, batch, self.settings.backprop_turns)
        num_places = batch.num_turns * batch.num_dialogues
        sums = {
            is_rejected: _summed(answers, is_rejected, num_places) for is_rejected in (False, True)
        }
        (chosen, chosen_length), (rejected, rejected_length) = sums[False], sums[True]
        (places,) = (rejected_length > 0).nonzero(as_tuple=True)
        return PairScores(
            chosen[places], rejected[places], chosen_length[places], rejected_length[places]
        )

    def validate(self) -> dict[str, float]:
        """Measure held-out pairs, and what memory-aware training measures."""
        count = self.settings.dialogues
        total = self.settings.validation_dialogues
        found: list[dict[str, Tensor]] = []
        numbers: list[int] = []
        for first in range(0, total, count):
            size = min(count, total - first)
            batch = self.to_device(self._batch(self.valid_source, first, size))
            if not self.count_targets(batch):
                continue
            scores = self.pair_scores(self.model, batch)
            reference = self.reference_scores(batch)
            margins = preference_margins(scores, reference, self.settings)
            measured = pair_metrics(scores, reference, margins, self.settings)
            loss = preference_loss(margins, self.settings.label_smoothing).mean()
            found.append({**measured, "preference_loss": loss})
            numbers.append(len(margins))
        weights = torch.tensor(numbers, dtype=torch.float64)
        means = {
            name: float(
                (torch.stack([item[name] for item in found]).double().cpu() * weights).sum()
                / weights.sum()
            )
            for name in (found[0] if found else ())
        }
        return {**means, **self._answering.validate()}

    def watch(self, settings: WatchSettings) -> Watched:
        """Measure how the memory is used, and let the model hold conversations."""
        return self._answering.watch(settings)


def check_pairs(source: ConversationSource, turns: TurnEncoder) -> None:
    """Refuse conversations without pairs, and rejected answers that do not fit.

    Raises:
        UserError: says what to write into the file.
    """
    if not isinstance(source, ConversationList):
        return
    if not has_pairs(source.conversations):
        raise UserError(
            f"{source.name}: no turn has a rejected answer, so there is nothing to prefer. Write "
            'turns such as {"query": "...", "answer": "better", "rejected": "worse"} (built-in '
            "dialogues make their own)."
        )
    worse = [as_rejected(item) for item in source.conversations]
    turns.check_lengths(worse, f"{source.name}: rejected answers")


def preference_margins(
    scores: PairScores, reference: PairScores | None, settings: PreferenceSettings
) -> Tensor:
    """Return by how much each chosen answer is ahead, as the loss sees it: ``[pairs]``."""
    if settings.variant == "simpo":
        chosen = scores.chosen / scores.chosen_length
        rejected = scores.rejected / scores.rejected_length
        return settings.beta * (chosen - rejected) - settings.margin
    assert reference is not None, "dpo keeps a frozen copy"
    ahead = scores.chosen - scores.rejected
    return settings.beta * (ahead - (reference.chosen - reference.rejected))


def preference_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each pair ``[pairs]``: log(2) where neither answer is ahead."""
    right = torch.nn.functional.softplus(-margins)
    if not label_smoothing:
        return right
    wrong = torch.nn.functional.softplus(margins)
    return (1.0 - label_smoothing) * right + label_smoothing * wrong


@torch.no_grad()
def pair_metrics(
    scores: PairScores,
    reference: PairScores | None,
    margins: Tensor,
    settings: PreferenceSettings,
) -> dict[str, Tensor]:
    """Return means over pairs.

    ``preference_accuracy``: the chosen answer is likelier than the rejected one (by the token, with
    simpo); ``margin``: see :func:`preference_margins`; ``chosen_log_prob``,
    ``rejected_log_prob``: of whole answers; ``chosen_gain``, ``rejected_gain``: how much they have
    risen over the reference.
    """
    chosen, rejected = scores.chosen, scores.rejected
    if settings.variant == "simpo":
        chosen, rejected = chosen / scores.chosen_length, rejected / scores.rejected_length
    metrics = {
        "preference_accuracy": (chosen > rejected).float().mean(),
        "margin": margins.mean(),
        "chosen_log_prob": scores.chosen.mean(),
        "rejected_log_prob": scores.rejected.mean(),
    }
    if reference is not None:
        metrics["chosen_gain"] = (scores.chosen - reference.chosen).mean()
        metrics["rejected_gain"] = (scores.rejected - reference.rejected).mean()
    return metrics


def _after_opening(turn: EncodedTurn) -> EncodedTurn:
    """Return a turn whose targets begin after [A], which is not the model's choice."""
    return turn._replace(answer_start=turn.answer_start + 1)


def _summed(answers: list[Answers], is_rejected: bool, num_places: int) -> tuple[Tensor, Tensor]:
    """Return log-probability and tokens of the answers at each place ``[P]``; 0 where none is."""
    total = torch.zeros(num_places, device=answers[0].logits.device)
    length = torch.zeros_like(total)
    for item in answers:
        scores = token_scores(item)
        kept = (item.group == _PROBE)[item.row] == is_rejected
        total = total + summed_by_place(scores.chosen[kept], scores.place[kept], num_places)
        ones = torch.ones_like(scores.chosen[kept])
        length = length + summed_by_place(ones, scores.place[kept], num_places)
    return total, length
