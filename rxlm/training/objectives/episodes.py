"""Episodes: dialogues whose answers a model samples itself, from the memory that it writes.

Every dialogue is held by a group of G conversations that differ in their draws only. What was said
is a value of lists and numbers (it goes through JSON as it is), and a function of the weights, the
seed and the dialogue's position: neighbours in a batch and the number of processes change nothing.
Not here: what answers are worth (``episode_rewards``), and the loss (``memory_reinforcement``).

Shapes: B dialogues, G conversations of each, C = B * G, N turns; conversation ``b * G + g``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rxlm.data.conversations import Conversation
from rxlm.evaluation.reward import mean_embeddings, update_running
from rxlm.evaluation.scoring import normalise
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.dialogues import GROUPS, DialogueBatch, Row, TurnEncoder, dialogue_batch, group_of
from rxlm.rxt.generation import Answer, AnswerLimits, answer_room, with_answer_token
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization.template import EncodedTurn
from rxlm.training.objectives.episode_rewards import (
    Compared,
    RewardSettings,
    rewards,
)
from rxlm.training.rng import derive_seed

Writes = Literal["own", "reference"]
"""What enters memory as the answer: what the model said, or what it should have said."""
_PROBE = GROUPS.index("probe")


class AskedTurn(NamedTuple):
    """A turn to be answered: the whole turn with its reference answer, and what it is."""

    reference: EncodedTurn
    text: str
    """The reference answer."""
    group: int
    """Index into :data:`~rxlm.rxt.dialogues.GROUPS`."""

    @property
    def is_question(self) -> bool:
        """Whether the answer needs a memory, as the data says."""
        return GROUPS[self.group] in ("recall", "unknown")

    @property
    def prompt(self) -> list[int]:
        """What is given to the model, up to where it begins to speak."""
        return self.reference.ids[: self.reference.answer_start]


class Dialogue(NamedTuple):
    """A dialogue as ids, and its place in the data, from which everything random is drawn."""

    position: int
    system: EncodedTurn | None
    turns: tuple[AskedTurn, ...]

    @property
    def offset(self) -> int:
        """Turns that are written before the first that is answered."""
        return int(self.system is not None)


class EpisodeBatch(NamedTuple):
    """Dialogues at consecutive positions. ``num_tokens`` are those of the reference turns."""

    dialogues: tuple[Dialogue, ...]
    num_tokens: int

    @classmethod
    def of(cls, dialogues: Sequence[Dialogue], group: int) -> EpisodeBatch:
        """Return the batch; every dialogue is held ``group`` times."""
        tokens = sum(len(turn.reference.ids) for item in dialogues for turn in item.turns)
        return cls(tuple(dialogues), tokens * group)


class Said(NamedTuple):
    """One sampled answer: its ids without special tokens, whether the model chose to end it there,
    the parts of its reward, and its tokens' log-probabilities when it was sampled (None: not known
    yet)."""

    ids: list[int]
    ended: bool
    parts: dict[str, float]
    log_probs: list[float] | None = None


class Episode(NamedTuple):
    """What a group said in one dialogue: ``said[n][g]``."""

    position: int
    said: list[list[Said]]

    def to_json(self) -> list[Any]:
        """Return what :meth:`from_json` reads."""
        return [self.position, [[list(item) for item in turn] for turn in self.said]]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Episode:
        """Return the episode that :meth:`to_json` wrote."""
        position, said = values
        return cls(position, [[Said(*item) for item in turn] for turn in said])

    def returns(self, discount: float) -> Tensor:
        """Return float64 ``[N, G]``: rewards from each turn on, later ones discounted."""
        rewards = torch.tensor(
            [[item.parts["reward"] for item in turn] for turn in self.said], dtype=torch.float64
        )
        total = torch.zeros_like(rewards[0])
        found = []
        for turn in reversed(rewards):
            total = turn + discount * total
            found.append(total)
        return torch.stack(found[::-1])


class EpisodeSettings(NamedTuple):
    """How episodes are held."""

    group: int
    sampling: SamplingSettings
    max_answer_tokens: int
    writes: Writes
    reward: RewardSettings
    seed: int
    zeroed: bool = False
    """Answer from slots of zeros (a floor)."""


def encode_dialogue(conversation: Conversation, position: int, turns: TurnEncoder) -> Dialogue:
    """Return a dialogue as ids."""
    system = turns.system(conversation.system) if conversation.system else None
    asked = tuple(
        AskedTurn(turns.encode(item), item.answer, group_of(item))
        for item in conversation.interactions
    )
    return Dialogue(position, system, asked)


@torch.no_grad()
def hold_episodes(
    model: ReactiveModel,
    dialogues: Sequence[Dialogue],
    embedding: Tensor,
    settings: EpisodeSettings,
) -> list[Episode]:
    """Let the model answer every turn of the dialogues.

    Args:
        model: with its tokenizer; sampled from in evaluation mode.
        dialogues: B of them, at consecutive positions.
        embedding: ``[V, D]``, for the cosine part of the reward.
        settings: how.
    """
    group = settings.group
    state = _beginning(model, dialogues, settings)
    speakers = [_Speaker(model, item) for item in dialogues for _ in range(group)]
    said: list[list[list[Said]]] = [[[] for _ in item.turns] for item in dialogues]
    for n in range(max(len(item.turns) for item in dialogues)):
        present = [row for row, item in enumerate(speakers) if n < len(item.dialogue.turns)]
        asked = [speakers[row].dialogue.turns[n] for row in present]
        answers, drawn = _answers(model, state.select(present), asked, settings)
        compared = [
            speakers[row].compared(turn, answer.ids)
            for row, turn, answer in zip(present, asked, answers, strict=True)
        ]
        scored = rewards([answer.ids for answer in answers], compared, embedding, settings.reward)
        # A conversation that is over keeps its memory and its draws.
        draws = list(state.draws)
        written: list[list[int]] = [[] for _ in speakers]
        for row, turn, answer, parts, count in zip(
            present, asked, answers, scored, drawn, strict=True
        ):
            ended = _chose_to_end(model, turn, answer, settings)
            said[row // group][n].append(Said(list(answer.ids), ended, parts))
            draws[row] = count
            written[row] = answer.turn if settings.writes == "own" else turn.reference.ids
            speakers[row].heard(written[row], embedding, settings.reward)
        state = model.update_memory(state.replaced(draws=tuple(draws)), written)
    return [Episode(item.position, turns) for item, turns in zip(dialogues, said, strict=True)]


def score_given(
    model: ReactiveModel,
    dialogues: Sequence[Dialogue],
    given: Sequence[Sequence[Sequence[int]]],
    embedding: Tensor,
    reward: RewardSettings,
) -> list[dict[str, float]]:
    """Return what given answers are worth, where the reference answers were said before them.

    Args:
        model: with its tokenizer.
        dialogues: B of them.
        given: ids of an answer to each turn, without special tokens: ``given[b][n]``.
        embedding: as for :func:`hold_episodes`.
        reward: what counts.
    """
    answers: list[Sequence[int]] = []
    compared: list[Compared] = []
    for dialogue, own in zip(dialogues, given, strict=True):
        speaker = _Speaker(model, dialogue)
        for turn, answer in zip(dialogue.turns, own, strict=True):
            answers.append(answer)
            compared.append(speaker.compared(turn, answer))
            speaker.heard(turn.reference.ids, embedding, reward)
    return rewards(answers, compared, embedding, reward)


def episode_tensors(
    dialogues: Sequence[Dialogue],
    episodes: Sequence[Episode],
    writes: Writes,
    *,
    num_buckets: int,
    pad_id: int,
    answer_id: int,
    eos_id: int,
) -> DialogueBatch:
    """Return what was said as a batch of C dialogues; targets are the tokens that were chosen.

    [A] was given, and so is no target; [EOS] is one if the model chose it (an answer that was cut
    ends for another reason).

    Args:
        dialogues: B of them.
        episodes: one of each.
        writes: what entered memory.
        num_buckets: length buckets.
        pad_id: filler, never read.
        answer_id: of [A].
        eos_id: of [EOS].
    """
    group = len(episodes[0].said[0])
    count = len(dialogues) * group
    encode: list[Row] = []
    answer: list[Row] = []
    ended = {}
    for b, (dialogue, episode) in enumerate(zip(dialogues, episodes, strict=True)):
        for g in range(group):
            c = b * group + g
            if dialogue.system is not None:
                encode.append(Row(dialogue.system, c, 0))
            for n, turn in enumerate(dialogue.turns):
                item = episode.said[n][g]
                place = (n + dialogue.offset) * count + c
                opened = with_answer_token(turn.prompt, answer_id)
                own = EncodedTurn([*opened, *item.ids, eos_id], len(opened))
                # What is asked but not written is not what a carried state has read.
                kind = turn.group if writes == "own" else _PROBE
                encode.append(Row(own if writes == "own" else turn.reference, place, turn.group))
                answer.append(Row(own, place, kind))
                ended[place] = item.ended
    num_turns = max(len(item.turns) + item.offset for item in dialogues)
    batch = dialogue_batch(
        encode,
        answer,
        num_dialogues=count,
        num_turns=num_turns,
        num_buckets=num_buckets,
        pad_id=pad_id,
    )
    chosen_end = torch.zeros(num_turns * count, dtype=torch.bool)
    for place, was_chosen in ended.items():
        chosen_end[place] = was_chosen
    buckets = []
    for rows in batch.answer:
        last = torch.arange(rows.ids.shape[1]) == rows.mask.sum(dim=1)[:, None] - 1
        targets = rows.targets & (~last | chosen_end[rows.place][:, None])
        buckets.append(rows._replace(targets=targets))
    return batch._replace(answer=tuple(buckets))


class _Speaker:
    """What one conversation has heard so far, for the reward."""

    def __init__(self, model: ReactiveModel, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self._model = model
        self._previous: list[int] = []
        self._earlier: Tensor | None = None

    def compared(self, turn: AskedTurn, answer: Sequence[int]) -> Compared:
        """Return what an answer is compared with."""
        is_right = False
        if turn.is_question:
            said = self._model.require_tokenizer().decode(list(answer))
            is_right = normalise(said) == normalise(turn.text)
        reference = text_ids(self._model, turn.reference.ids[turn.reference.answer_start :])
        return Compared(reference, self._previous, self._earlier, turn.is_question, is_right)

    def heard(self, written: Sequence[int], embedding: Tensor, reward: RewardSettings) -> None:
        """Take note of a turn as it entered memory."""
        if self._previous and reward.cosine and reward.earlier:
            vector = mean_embeddings([self._previous], embedding)
            earlier = None if self._earlier is None else self._earlier[None]
            self._earlier = update_running(earlier, vector, reward.decay)[0]
        self._previous = text_ids(self._model, written)


def text_ids(model: ReactiveModel, ids: Sequence[int]) -> list[int]:
    """Return ``ids`` without special tokens."""
    special = set(model.config.tokenizer.ids().values())
    return [token for token in ids if token not in special]


def _beginning(
    model: ReactiveModel, dialogues: Sequence[Dialogue], settings: EpisodeSettings
) -> ConversationState:
    count = len(dialogues)
    state = ConversationState.start(
        model.initial_memory(count, seed=dialogues[0].position),
        0,
        model.decoder.nothing_carried(count),
    ).repeat(settings.group)
    seeds = tuple(
        derive_seed(settings.seed, "episode", item.position, g)
        for item in dialogues
        for g in range(settings.group)
    )
    systems = [
        [] if item.system is None else item.system.ids
        for item in dialogues
        for _ in range(settings.group)
    ]
    return model.update_memory(replace(state, seeds=seeds), systems)


def _answers(
    model: ReactiveModel,
    state: ConversationState,
    asked: Sequence[AskedTurn],
    settings: EpisodeSettings,
) -> tuple[list[Answer], tuple[int, ...]]:
    """Return an answer a row, and how many draws each row has made by then."""
    if settings.zeroed:
        nothing = model.decoder.nothing_carried(state.batch_size)
        state = state.replaced(slots=torch.zeros_like(state.slots), carried=nothing)
    generated = model.generate(
        state,
        [turn.prompt for turn in asked],
        settings.sampling,
        max_new_tokens=settings.max_answer_tokens,
    )
    return generated.answers, generated.state.draws


def _chose_to_end(
    model: ReactiveModel, turn: AskedTurn, answer: Answer, settings: EpisodeSettings
) -> bool:
    """Return whether [EOS] was chosen, and something else could have been.

    Where the room ends, an answer ends with or without [EOS]: the same answer either way, so its
    probability is that of its tokens alone.
    """
    opened = with_answer_token(turn.prompt, model.config.tokenizer.answer_token_id)
    limits = AnswerLimits(max_new_tokens=settings.max_answer_tokens)
    return answer.reason == "eos" and len(answer.ids) < answer_room(model, opened, limits)
