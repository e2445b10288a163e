"""Stage 6a, memory reinforcement: sampled answers over whole dialogues, and what they are worth.

    loss = 1 / answers * sum over tokens of
             - min(r A, clip(r, 1 - c, 1 + c) A) + kl_scale KL(policy | reference) - entropy_scale H

Each of several dialogues is held by a group of conversations, which sample their answers turn by
turn from the memory that they write. ``A`` says how much better an answer was than those of its
group to the same turn (GRPO: Shao et al. 2024, arXiv 2402.03300), ``r`` is the ratio of a token's
probability to what it was when it was sampled (PPO: Schulman et al. 2017, arXiv 1707.06347). With
one update for each sampling ``r`` is 1, and its gradient is the policy gradient. The probabilities
are computed again through all memory writes of the dialogue, so that a good answer teaches what to
store many turns earlier. A token's KL and entropy are exact, over the whole vocabulary.

Shapes: B dialogues, G conversations of each, C = B * G, N turns, P = N * C places (``n * C + c``),
M target tokens of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rxlm.configuration import Config
from rxlm.data.conversation_source import ConversationSource
from rxlm.nn.expert_routing import record_routing
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.dialogues import DialogueBatch, TurnEncoder
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import Answers
from rxlm.training.objective import StepOutput
from rxlm.training.objectives.curriculum import Curriculum, Phase, TurnsPhase
from rxlm.training.objectives.episode_rewards import RewardSettings
from rxlm.training.objectives.episode_scores import (
    SaidByPlace,
    clipped_gain,
    episode_metrics,
    places_of,
    said_by_place,
)
from rxlm.training.objectives.episodes import (
    Dialogue,
    Episode,
    EpisodeBatch,
    EpisodeSettings,
    Writes,
    encode_dialogue,
    episode_tensors,
    hold_episodes,
)
from rxlm.training.objectives.expert_balance import with_balance
from rxlm.training.objectives.frozen_policy import (
    Component,
    FrozenPolicyObjective,
    TokenScores,
    token_scores,
)
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.reward_floors import reward_floors
from rxlm.training.watch import Watched, WatchSettings


class MemoryReinforcementSettings(Config):
    """Settings of memory reinforcement."""

    phases: tuple[TurnsPhase, ...] = (
        TurnsPhase(turns=4, dialogues=4, steps=200),
        TurnsPhase(turns=8, dialogues=4, steps=300),
        TurnsPhase(turns=12, dialogues=4),
    )
    """The curriculum; the last phase lasts to the end. ``advance_accuracy`` is that of the sampled
    answers to questions."""
    group: int = Field(default=8, ge=2)
    """Conversations that each dialogue is held by; an answer is compared with the others'."""
    reward: RewardSettings = RewardSettings()
    """What an answer is worth."""
    writes: Writes = "own"
    """What enters memory as the answer: the model's ``own``, or the ``reference`` answer."""
    temperature: float = Field(default=1.0, gt=0)
    """At which answers are sampled; the policy that is improved is the one at this temperature."""
    max_answer_tokens: int = Field(default=32, gt=0)
    """Longer answers are cut."""
    discount: float = Field(default=0.0, ge=0, le=1)
    """How much of a later turn's reward an answer is credited with, for each turn between. What the
    model says enters its memory (``writes: own``), so it has consequences; they are also noise."""
    normalise_advantage: bool = True
    """Whether advantages are divided by the spread of their group."""
    horizon: int | None = Field(default=None, gt=0)
    """Cut the gradient after this many memory writes; None = through the whole episode."""
    inner_epochs: int = Field(default=1, gt=0)
    """Updates made with the same sampled episodes."""
    clip: float = Field(default=0.2, gt=0)
    """How far the ratio of probabilities may move before an answer stops counting; of use with
    ``inner_epochs`` above 1 only."""
    kl_scale: float = Field(default=0.05, ge=0)
    """Weight of the divergence from the model that the stage began with (nats, summed over the
    tokens of an answer)."""
    entropy_scale: float = Field(default=0.0, ge=0)
    """Weight of the bonus for undecided answers (nats, summed likewise)."""
    trains: tuple[Component, ...] = ("encoder", "decoder", "memory_attention")
    """The components that learn."""
    moe_aux_loss_scale: float = Field(default=0.01, ge=0)
    """Weight of what keeps experts evenly used, if the model has experts."""
    num_buckets: int = Field(default=3, gt=0)
    """Length buckets of a batch: less padding, same result."""
    validation_dialogues: int = Field(default=32, gt=0)
    """Dialogues of a validation, each held with the most likely tokens, and once more with tokens
    drawn as in training."""

    @model_validator(mode="after")
    def _check(self) -> MemoryReinforcementSettings:
        if not self.phases:
            raise ValueError("phases is empty: give at least one, such as {turns: 8, dialogues: 4}")
        if self.discount and self.writes == "reference":
            raise ValueError(
                f"discount={self.discount:g} with writes='reference': what the model says has no "
                "consequences when the reference answers are written. Set discount: 0, or writes: "
                "own"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the model is kept."""
        return self.kl_scale > 0 or self.reward.cosine > 0


class MemoryReinforcementObjective(FrozenPolicyObjective):
    """Policy gradient over episodes.

    The episodes that inner epochs train on are the only thing that one step leaves to the next.
    They are a value (:class:`~rxlm.training.objectives.episodes.Episode`) in the state of the
    objective, by the position of their dialogue.
    """

    name = "memory_reinforcement"

    def __init__(
        self,
        model: ReactiveModel,
        train: ConversationSource,
        valid: ConversationSource,
        turns: TurnEncoder,
        settings: MemoryReinforcementSettings,
        *,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        longest = settings.phases[-1]
        # What the stage before measured, measured in the same way.
        self._answering = MemoryAwareObjective(
            model,
            train,
            valid,
            turns,
            MemoryAwareSettings(
                phases=(Phase(turns=longest.turns, dialogues=longest.dialogues),),
                validation_dialogues=settings.validation_dialogues,
            ),
            seed=seed,
        )
        super().__init__(
            model,
            turns.tokenizer,
            trains=settings.trains,
            needs_reference=settings.needs_reference,
        )
        self.train_source, self.valid_source = train, valid
        self.turns, self.settings = turns, settings
        self.seed, self.accumulation = seed, accumulation
        self.curriculum = Curriculum(settings.phases)
        self._sampling = -1
        self._episodes: dict[int, Episode] = {}

    def batch(self, step: int, micro_step: int) -> EpisodeBatch:
        """Return the dialogues of a step: a pure function of seed, step and the phase.

        Steps that train on the same episodes have the same dialogues, those of the phase in which
        they were sampled.
        """
        sampling = step // self.settings.inner_epochs
        _, phase = self.curriculum.phase(sampling * self.settings.inner_epochs)
        first = (sampling * self.accumulation + micro_step) * phase.dialogues
        return self._dialogues(self.train_source, first, phase.dialogues, phase.turns)

    def _dialogues(
        self, source: ConversationSource, first: int, count: int, turns: int
    ) -> EpisodeBatch:
        dialogues = [
            encode_dialogue(source.sample(position, turns), position, self.turns)
            for position in range(first, first + count)
        ]
        return EpisodeBatch.of(dialogues, self.settings.group)

    def shard(self, batch: EpisodeBatch, rank: int, size: int) -> EpisodeBatch:
        """Return some of the dialogues; a group is never divided."""
        share = self.share_of(len(batch.dialogues), rank, size)
        dialogues = batch.dialogues[share.start : share.stop]
        return EpisodeBatch.of(dialogues, self.settings.group)

    def count_targets(self, batch: EpisodeBatch) -> int:
        """Return the number of answers."""
        return self.settings.group * sum(len(item.turns) for item in batch.dialogues)

    def loss(self, batch: EpisodeBatch, step: int) -> StepOutput:
        """Return the mean loss over answers, sampling them first if this step does."""
        settings, dialogues = self.settings, batch.dialogues
        episodes = self._episodes_of(dialogues, step)
        tensors = self.to_device(self._tensors(dialogues, episodes))
        with record_routing() as routing:
            answers = self.answers(self.model, tensors, settings.horizon, settings.group)
        scores = [token_scores(item, settings.temperature) for item in answers]
        if any(item.said[0][0].log_probs is None for item in episodes):
            episodes = self._remember(dialogues, episodes, answers, scores)
        terms = self._terms(
            tensors,
            said_by_place(dialogues, episodes, settings.discount, settings.normalise_advantage),
            answers,
            scores,
        )
        count = self.count_targets(batch)
        loss = settings.kl_scale * terms["kl"] - terms["gain"]
        loss = (loss - settings.entropy_scale * terms["entropy"]) / count
        loss, experts = with_balance(loss, routing, settings.moe_aux_loss_scale)
        metrics, weights = episode_metrics(dialogues, episodes)
        num_tokens = sum(len(item.chosen) for item in scores)
        for name in ("kl", "entropy", "clip_fraction"):
            metrics[name] = terms[name].detach() / num_tokens
            weights[name] = num_tokens
        metrics["phase"] = float(self.curriculum.phase(step)[0])
        return StepOutput(loss, count, {**metrics, **experts}, tensors.num_tokens, weights)

    def _episodes_of(self, dialogues: Sequence[Dialogue], step: int) -> list[Episode]:
        """Return what was said in these dialogues, sampled now unless an earlier step did."""
        sampling = step // self.settings.inner_epochs
        if sampling != self._sampling:
            self._sampling, self._episodes = sampling, {}
        if any(item.position not in self._episodes for item in dialogues):
            held = hold_episodes(self.model, dialogues, self._embedding(), self._episode_settings())
            self._episodes |= {item.position: item for item in held}
        return [self._episodes[item.position] for item in dialogues]

    def _episode_settings(self) -> EpisodeSettings:
        chosen = self.settings
        return EpisodeSettings(
            group=chosen.group,
            sampling=SamplingSettings(temperature=chosen.temperature),
            max_answer_tokens=chosen.max_answer_tokens,
            writes=chosen.writes,
            reward=chosen.reward,
            seed=self.seed,
        )

    def _embedding(self) -> Tensor:
        """Return the token embedding of the reward: a frozen one, so that the reward is fixed."""
        network = self.model if self.reference is None else self.reference
        return network.encoder.embedding.weight.detach()

    def _tensors(self, dialogues: Sequence[Dialogue], episodes: Sequence[Episode]) -> DialogueBatch:
        ids = self.model.config.tokenizer
        batch = episode_tensors(
            dialogues,
            episodes,
            self.settings.writes,
            num_buckets=self.settings.num_buckets,
            pad_id=ids.pad_token_id,
            answer_id=ids.answer_token_id,
            eos_id=ids.eos_token_id,
        )
        return batch._replace(memory_seed=dialogues[0].position)

    def _remember(
        self,
        dialogues: Sequence[Dialogue],
        episodes: Sequence[Episode],
        answers: Sequence[Answers],
        scores: Sequence[TokenScores],
    ) -> list[Episode]:
        """Keep the log-probabilities of the first pass, which is made with the sampling weights."""
        found: dict[int, list[float]] = {}
        for item, score in zip(answers, scores, strict=True):
            counts = torch.bincount(item.row, minlength=len(item.place)).tolist()
            rows = score.chosen.detach().split(counts)
            found |= {
                place: row.tolist() for place, row in zip(item.place.tolist(), rows, strict=True)
            }
        places = places_of(dialogues, self.settings.group)
        remembered = [
            item._replace(
                said=[
                    [said._replace(log_probs=found[places[b][n][g]]) for g, said in enumerate(turn)]
                    for n, turn in enumerate(item.said)
                ]
            )
            for b, item in enumerate(episodes)
        ]
        self._episodes |= {item.position: item for item in remembered}
        return remembered

    def _terms(
        self,
        tensors: DialogueBatch,
        said: SaidByPlace,
        answers: Sequence[Answers],
        scores: Sequence[TokenScores],
    ) -> dict[str, Tensor]:
        """Return sums over target tokens: gain (to be raised), kl, entropy, clip_fraction."""
        before: list[TokenScores | None] = [None] * len(scores)
        if self.reference is not None and self.settings.kl_scale:
            with torch.no_grad():
                known = self.answers(self.reference, tensors, copies=self.settings.group)
            before = [token_scores(item, self.settings.temperature) for item in known]
        sums = dict.fromkeys(
            ("gain", "kl", "entropy", "clip_fraction"), scores[0].chosen.new_zeros(())
        )
        for item, score, reference in zip(answers, scores, before, strict=True):
            places = item.place.tolist()
            old = score.chosen.new_tensor(
                [value for place in places for value in said.log_probs[place]]
            )
            advantage = score.chosen.new_tensor(said.advantages)[score.place]
            gain, clipped = clipped_gain(score.chosen, old, advantage, self.settings.clip)
            probabilities = score.log_probs.exp()
            terms = {
                "gain": gain.sum(),
                "entropy": -(probabilities * score.log_probs).sum(),
                "clip_fraction": clipped.float().sum(),
            }
            if reference is not None:
                terms["kl"] = (probabilities * (score.log_probs - reference.log_probs)).sum()
            sums |= {name: sums[name] + value for name, value in terms.items()}
        return sums

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let the curriculum see the accuracy of the step."""
        self.curriculum.observe(step, metrics.get("accuracy"))

    def validate(self) -> dict[str, float]:
        """Measure held-out dialogues of the last phase's length.

        ``loss`` and ``accuracy...`` are those of memory-aware training: the reference answers, from
        memories that they were written to. ``reward...`` is of the model's own most likely answers,
        which enter its memory; beside it stand its floors (see
        :mod:`rxlm.training.objectives.reward_floors`). ``sampled_reward`` is of answers that are
        drawn as in training: what the stage raises.
        """
        longest, count = self.settings.phases[-1], self.settings.validation_dialogues
        settings = self._episode_settings()._replace(
            group=1, sampling=SamplingSettings(temperature=0.0), writes="own"
        )
        dialogues: list[Dialogue] = []
        episodes: list[Episode] = []
        drawn: list[Episode] = []
        # Not the draws of training, nor those of another seed.
        sampled = settings._replace(
            sampling=SamplingSettings(temperature=self.settings.temperature), seed=0
        )
        for first in range(0, count, longest.dialogues):
            size = min(longest.dialogues, count - first)
            part = self._dialogues(self.valid_source, first, size, longest.turns).dialogues
            dialogues += part
            episodes += hold_episodes(self.model, part, self._embedding(), settings)
            drawn += hold_episodes(self.model, part, self._embedding(), sampled)
        measured, _ = episode_metrics(dialogues, episodes)
        random, _ = episode_metrics(dialogues, drawn)
        floors = reward_floors(self.model, dialogues, self._embedding(), settings)
        own = {
            "own_accuracy": measured.pop("accuracy"),
            **measured,
            "sampled_reward": random["reward"],
            "sampled_accuracy": random["accuracy"],
        }
        values = {**own, **floors, **self._answering.validate()}
        return {name: float(value) for name, value in values.items() if not math.isnan(value)}

    def watch(self, settings: WatchSettings) -> Watched:
        """Measure how the memory is used, and let the model hold conversations."""
        return self._answering.watch(settings)

    def each_phase(self, num_steps: int) -> Iterator[int]:
        """Enter each phase of the curriculum; yield the most steps that it may last."""
        return self.curriculum.each_phase(num_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the curriculum's state, and the episodes that later steps still train on."""
        state: dict[str, Any] = {"curriculum": self.curriculum.state_dict()}
        if self.settings.inner_epochs > 1:
            state["sampling"] = self._sampling
            state["episodes"] = [item.to_json() for item in self._episodes.values()]
        return state

    def batch_state(self) -> list[int]:
        """Return the part of the state that batches depend on."""
        return self.curriculum.starts

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state of all processes: each has held some of the dialogues."""
        if "episodes" not in states[0]:
            return states[0]
        episodes = sorted(
            (item for state in states for item in state["episodes"]), key=lambda item: item[0]
        )
        return {**states[0], "episodes": episodes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the curriculum, and with the episodes that were sampled last."""
        self.curriculum.load_state_dict(state["curriculum"])
        episodes = [Episode.from_json(item) for item in state.get("episodes", ())]
        self._sampling = state.get("sampling", -1)
        self._episodes = {item.position: item for item in episodes}
