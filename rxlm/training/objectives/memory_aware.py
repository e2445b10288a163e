"""Stage 5, memory-aware training: answer from memory, with gradients through all writes.

A step takes a window of several turns from each of several dialogues, encodes all turns, scans
the memory, and predicts answers from the memory that stood before them. The first phases may read
the raw encoder states of the earlier turns in place of the memory (oracle warm-up). Probe
questions ask a random intermediate memory for what it should hold; they are never written.

Shapes: L layers, B dialogues, N turns, R rows, S slots, D width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rxlm.configuration import Config
from rxlm.data.conversations import Conversation, ConversationSource
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
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import (
    Answers,
    EncodedTurns,
    answer_with_history,
    answer_with_memory,
    encode_turns,
    exact_rows,
    scan_memory,
)
from rxlm.training.objective import StepOutput
from rxlm.training.objectives.curriculum import Curriculum, Phase
from rxlm.training.objectives.expert_balance import with_balance
from rxlm.training.objectives.model_objective import ModelObjective
from rxlm.training.watch import Watched, WatchSettings
from rxlm.training.watching.memory_use import memory_use
from rxlm.training.watching.samples import held_conversations


class MemoryAwareSettings(Config):
    """Settings of memory-aware training."""

    phases: tuple[Phase, ...] = (
        Phase(turns=4, dialogues=16, reads="history", steps=500),
        Phase(turns=8, dialogues=8, steps=1300),
        Phase(turns=12, dialogues=8),
    )
    """The curriculum; the last phase lasts to the end."""
    backprop_turns: int | None = None
    """Cut the gradient after this many memory writes, that of a carried state as well; None =
    through the whole window."""
    probes: int = 2
    """Extra questions per dialogue, asked of a random intermediate memory (generated data)."""
    chat_answers: float = 0.2
    """Share of the turns without a question whose answers are predicted. The rest is only
    written: most of the signal is in the questions. Data without questions predicts all."""
    chat_weight: float = Field(default=1.0, gt=0)
    """Weight in the loss of a token of an answer that no question asked for (small talk; all of
    data without questions). What people say is mostly no matter of memory, and would be most of
    the gradient."""
    distillation: float = Field(default=0.0, ge=0)
    """Weight of the divergence, at every target, of the answers read from memory from those of the
    same model reading the history, as it is now; costs a second decoding. Not in phases that read
    the history."""
    moe_aux_loss_scale: float = Field(default=0.01, ge=0)
    """Weight of what keeps experts evenly used, if the model has experts."""
    num_buckets: int = Field(default=3, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_dialogues: int = 64
    """Dialogues of a validation."""


class MemoryAwareObjective(ModelObjective):
    """Cross-entropy of answers read from the memory of the turns before them."""

    name = "memory_aware"
    memory_saving = ModelObjective.memory_saving._replace(
        batch="dialogues of the phase, in objective.phases",
        lengths="fewer turns in objective.phases or a shorter seq_len of the model",
    )

    def __init__(
        self,
        model: ReactiveModel,
        train: ConversationSource,
        valid: ConversationSource,
        turns: TurnEncoder,
        settings: MemoryAwareSettings,
        *,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        super().__init__(model, turns.tokenizer)
        self.train_source, self.valid_source = train, valid
        self.turns = turns
        self.settings = settings
        self.seed, self.accumulation = seed, accumulation
        self.curriculum = Curriculum(settings.phases)

    def batch(self, step: int, micro_step: int) -> DialogueBatch:
        """Return the batch of a step: a pure function of seed, step and the phase."""
        _, phase = self.curriculum.phase(step)
        first = (step * self.accumulation + micro_step) * phase.dialogues
        conversations = [
            self.train_source.sample(first + offset, phase.turns)
            for offset in range(phase.dialogues)
        ]
        return self._batch(self.train_source, conversations, first, self.settings.chat_answers)

    def _batch(
        self,
        source: ConversationSource,
        conversations: list[Conversation],
        first: int,
        chat_answers: float,
    ) -> DialogueBatch:
        count = len(conversations)
        encode: list[Row] = []
        answer: list[Row] = []
        for b, conversation in enumerate(conversations):
            # By position, so that 1 x 8 and 8 x 1 dialogues train on the same answers.
            rng = random.Random(f"{self.seed}/{first + b}")
            has_questions = source.has_probes_at(first + b)
            start = 0
            if conversation.system:
                encode.append(Row(self.turns.system(conversation.system), b, 0))
                start = 1
            for n, item in enumerate(conversation.interactions, start):
                turn = self.turns.encode(item)
                row = Row(turn, n * count + b, group_of(item))
                encode.append(row)
                if not has_questions or row.group or rng.random() < chat_answers:
                    answer.append(row)
            if has_questions and self.settings.probes:
                probes = source.probe_questions(conversation, first + b, self.settings.probes)
                for after, item in probes:
                    turn = self.turns.encode(item)
                    memory = (start + after + 1) * count + b
                    answer.append(Row(turn, memory, GROUPS.index("probe")))
        longest = max(len(item.interactions) + bool(item.system) for item in conversations)
        batch = dialogue_batch(
            encode,
            answer,
            num_dialogues=count,
            num_turns=longest,
            num_buckets=self.settings.num_buckets,
            pad_id=self.turns.tokenizer.pad_id,
        )
        # By position, too: a drawn initial memory does not depend on the place in the batch.
        return batch._replace(memory_seed=first)

    def shard(self, batch: DialogueBatch, rank: int, size: int) -> DialogueBatch:
        """Return some of the dialogues."""
        share = self.share_of(batch.num_dialogues, rank, size)
        return select_dialogues(batch, share.start, len(share))

    def count_targets(self, batch: DialogueBatch) -> int:
        """Return the number of predicted tokens."""
        return sum(int(rows.targets[:, 1:].sum()) for rows in batch.answer)

    def loss(self, batch: DialogueBatch, step: int) -> StepOutput:
        """Return the mean over target tokens of the cross-entropy times the token's weight."""
        index, phase = self.curriculum.phase(step)
        with record_routing() as routing:
            encoded = encode_turns(self.model.encoder, batch)
            answers = self._answers(batch, phase, encoded)
        if not answers:
            # Small talk only, none of it drawn: nothing to learn, but a graph to go backward in.
            nothing = self.model.encoder.embedding.weight.sum() * 0.0
            return StepOutput(nothing, 0, {}, batch.num_tokens)
        logits = torch.cat([item.logits for item in answers])
        labels = torch.cat([item.labels for item in answers])
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        metrics: dict[str, Tensor | float] = {"phase": float(index)}
        with torch.no_grad():
            exact, group = _exact_and_group(answers)
            asked = group != GROUPS.index("chat") if self.train_source.has_probes else group >= 0
            num_asked = int(asked.sum())
            metrics["accuracy"] = exact[asked].float().mean() if num_asked else math.nan
            metrics["perplexity"] = losses.detach().mean().exp()
        weights = {"accuracy": num_asked}
        if self.settings.chat_weight != 1.0:
            chat = torch.cat([item.group[item.row] for item in answers]) == GROUPS.index("chat")
            losses = torch.where(chat, self.settings.chat_weight * losses, losses)
        loss = losses.mean()
        if self.settings.distillation and phase.reads == "memory":
            divergence = _divergence(logits, self._oracle_logits(batch, encoded))
            metrics["distillation"] = divergence.detach()
            loss = loss + self.settings.distillation * divergence
        loss, experts = with_balance(loss, routing, self.settings.moe_aux_loss_scale)
        metrics.update(experts)
        return StepOutput(loss, labels.numel(), metrics, batch.num_tokens, weights)

    def _answers(self, batch: DialogueBatch, phase: Phase, encoded: EncodedTurns) -> list[Answers]:
        if phase.reads == "history":
            return answer_with_history(
                self.model.decoder,
                batch,
                encoded,
                self.settings.backprop_turns,
                self.checkpoint_turns,
            )
        memories = scan_memory(
            self.model.memory_attention,
            self.model.initial_memory(batch.num_dialogues, seed=batch.memory_seed),
            encoded,
            batch.num_turns,
            self.settings.backprop_turns,
            self.checkpoint_turns,
        )
        return answer_with_memory(
            self.model.decoder,
            batch,
            memories,
            self.settings.backprop_turns,
            self.checkpoint_turns,
        )

    @torch.no_grad()
    def _oracle_logits(self, batch: DialogueBatch, encoded: EncodedTurns) -> Tensor:
        """Return what the model predicts from the history; rows are those of the answers."""
        answers = answer_with_history(self.model.decoder, batch, encoded)
        return torch.cat([item.logits for item in answers])

    def left_out(self, step: int) -> list[nn.Parameter]:
        """Return the parameters of the parts that the phase does not train."""
        _, phase = self.curriculum.phase(step)
        trained = {
            id(item) for part in phase.trains for item in getattr(self.model, part).parameters()
        }
        return [item for item in self.model.parameters() if id(item) not in trained]

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let the curriculum see the accuracy of the step."""
        self.curriculum.observe(step, metrics.get("accuracy"))

    def validate(self) -> dict[str, float]:
        """Measure held-out dialogues of the last phase's length, always read from memory."""
        phase = self.settings.phases[-1].model_copy(update={"reads": "memory"})
        total = self.settings.validation_dialogues
        losses, tokens = 0.0, 0
        exact: list[Tensor] = []
        group: list[Tensor] = []
        for first in range(0, total, phase.dialogues):
            conversations = [
                self.valid_source.sample(position, phase.turns)
                for position in range(first, min(first + phase.dialogues, total))
            ]
            batch = self._batch(self.valid_source, conversations, first, chat_answers=1.0)
            batch = self.to_device(batch)
            answers = self._answers(batch, phase, encode_turns(self.model.encoder, batch))
            for item in answers:
                losses += torch.nn.functional.cross_entropy(
                    item.logits.float(), item.labels, reduction="sum"
                ).item()
                tokens += item.labels.numel()
            exact_batch, group_batch = _exact_and_group(answers)
            exact.append(exact_batch)
            group.append(group_batch)
        return _validation_metrics(losses / tokens, torch.cat(exact), torch.cat(group))

    def watch(self, settings: WatchSettings) -> Watched:
        """Measure how the memory is used, and let the model hold conversations."""
        turns = self.settings.phases[-1].turns
        measures: dict[str, float] = {}
        if settings.memory_dialogues:
            conversations = [
                self.valid_source.sample(position, turns)
                for position in range(settings.memory_dialogues)
            ]
            batch = self._batch(self.valid_source, conversations, 0, chat_answers=1.0)
            measures = memory_use(self.model, self.to_device(batch))
        samples = held_conversations(self.model, self.valid_source, settings)
        return Watched(measures, samples)

    def each_phase(self, num_steps: int) -> Iterator[int]:
        """Enter each phase of the curriculum; yield the most steps that it may last."""
        return self.curriculum.each_phase(num_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the curriculum's state."""
        return {"curriculum": self.curriculum.state_dict()}

    def batch_state(self) -> list[int]:
        """Return the part of the state that batches depend on."""
        return self.curriculum.starts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the curriculum."""
        self.curriculum.load_state_dict(state["curriculum"])


def _divergence(logits: Tensor, oracle: Tensor) -> Tensor:
    """Return KL(oracle || read from memory), the mean over targets; both ``[M, V]``."""
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(dim=-1),
        oracle.float().log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def _exact_and_group(answers: list[Answers]) -> tuple[Tensor, Tensor]:
    exact = torch.cat([exact_rows(item) for item in answers])
    return exact, torch.cat([item.group for item in answers])


def _validation_metrics(loss: float, exact: Tensor, group: Tensor) -> dict[str, float]:
    metrics = {"loss": loss, "accuracy": exact.float().mean().item()}
    for index, name in enumerate(GROUPS):
        chosen = group == index
        if chosen.any():
            metrics[f"accuracy_{name}"] = exact[chosen].float().mean().item()
    return metrics
