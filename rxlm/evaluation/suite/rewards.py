"""T5: the reward of what a model says in conversations of its own, beside floors and ceiling.

The first interaction is given; then the model answers query after query, and what it said is what
it goes on from. A score is worth what it is above its floors: the same model with its memory
zeroed, the last answer again, the reference of another conversation. The reference is the ceiling.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict

from torch import Tensor

from rxlm.data.conversations import Conversation, Interaction
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.data.sources import load_conversations
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.reward import RewardSettings, mean_embeddings, rewards, update_running
from rxlm.evaluation.statistics import bootstrap
from rxlm.evaluation.suite.contestant import Contestant, Turns
from rxlm.evaluation.suite.findings import Finding, finding
from rxlm.evaluation.suite.settings import RewardTestSettings
from rxlm.tokenization import Tokenizer

TEST = "reward"
BUILTIN = "builtin"
ACTOR_NAMES = {
    "ceiling": "ceiling: the reference answer",
    "copy": "floor: the answer before, again",
    "other": "floor: the reference of another conversation",
}
GOAL_MEAN, GOAL_GAP = 3.1, 0.3
Answers = list[list[str]]
"""By step and conversation."""


class RewardRow(TypedDict):
    """Mean reward of one source, actor (a control, or of ``ACTOR_NAMES``), seed and step."""

    source: str
    actor: str
    seed: int
    step: int
    n: int
    reward: float


class Scored(NamedTuple):
    """One conversation of one actor: its reward at every step."""

    source: str
    actor: str
    seed: int
    rewards: list[float]


def reward_conversations(
    data: Path | None,
    settings: RewardTestSettings,
    seeds: Sequence[int],
    fits: Callable[[Turns], bool],
) -> dict[str, list[list[Conversation]]]:
    """Return for each source and seed another set of conversations of ``steps + 1`` turns.

    Without a data folder the sources that are files are left out.

    Raises:
        UserError: if a file is missing or damaged.
    """
    turns, count = settings.steps + 1, settings.conversations
    found: dict[str, list[list[Conversation]]] = {}
    for source in settings.sources:
        if source == BUILTIN:
            generator = DialogueGenerator(GeneratorConfig())
            usable = [generator.conversation(n, turns, "test") for n in range(count * len(seeds))]
        elif data is None:
            continue
        else:
            every = load_conversations(data / "dialogues" / f"{source}.valid.jsonl.gz")
            random.Random(0).shuffle(every)
            long = (item.window(0, turns) for item in every if len(item) >= turns)
            usable = [item for item in long if fits(item.interactions) and _complete(item)]
            usable = usable[: count * len(seeds)]
        size = len(usable) // len(seeds)
        found[source] = [usable[place * size : (place + 1) * size] for place in range(len(seeds))]
    return found


def _complete(conversation: Conversation) -> bool:
    return all(turn.query.strip() and turn.answer.strip() for turn in conversation.interactions)


def run_rewards(
    contestants: Sequence[Contestant],
    tokenizer: Tokenizer,
    embedding: Tensor,
    sources: dict[str, list[list[Conversation]]],
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Scored]:
    """Let every contestant hold every conversation under each of its controls.

    Args:
        contestants: who answers.
        tokenizer: of the reward, the same for all.
        embedding: of tokens, ``[V, D]``, the same for all.
        sources: from :func:`reward_conversations`.
        seeds: of the sets.
        progress: told before every set.
    """
    work = [
        (source, seed, part)
        for source, parts in sources.items()
        for seed, part in zip(seeds, parts, strict=True)
        if len(part) > 1
    ]
    found: list[Scored] = []
    for done, (source, seed, part) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{source}, seed {seed}")
        held: dict[str, Answers] = dict(fixed_answers(part))
        for contestant in contestants:
            for control in contestant.controls:
                held[control] = hold(contestant, control, part)
        for actor, answers in held.items():
            # Floors and ceiling answer inside the reference conversation.
            said = None if actor in ACTOR_NAMES else answers
            scores = score(answers, said, part, tokenizer, embedding)
            found += [
                Scored(source, actor, seed, [step[place] for step in scores])
                for place in range(len(part))
            ]
    if progress is not None:
        progress(len(work), len(work), "done")
    return found


def fixed_answers(part: Sequence[Conversation]) -> dict[str, Answers]:
    """Return the answers of the ceiling and of the floors that need no model."""
    steps = range(1, len(part[0]))
    references = [[item.interactions[step].answer for item in part] for step in range(len(part[0]))]
    return {
        "ceiling": [references[step] for step in steps],
        "copy": [references[step - 1] for step in steps],
        "other": [[*references[step][1:], references[step][0]] for step in steps],
    }


def hold(contestant: Contestant, control: str, part: Sequence[Conversation]) -> Answers:
    """Return what a contestant answers to the queries after the first turn, one by one."""
    histories: list[list[Interaction]] = [[item.interactions[0]] for item in part]
    found: Answers = []
    for step in range(1, len(part[0])):
        asked = [item.interactions[step] for item in part]
        held = contestant.read(histories)
        texts = contestant.answer(held, [turn.query for turn in asked], control)  # type: ignore[arg-type]
        found.append(texts)
        for history, turn, text in zip(histories, asked, texts, strict=True):
            history.append(replace(turn, answer=text))
    return found


def score(
    answers: Answers,
    said: Answers | None,
    part: Sequence[Conversation],
    tokenizer: Tokenizer,
    embedding: Tensor,
    settings: RewardSettings | None = None,
) -> list[list[float]]:
    """Return the rewards by step and conversation.

    Args:
        answers: to be scored.
        said: what the conversation goes on from; None: the reference answers.
        part: the conversations.
        tokenizer: of the reward.
        embedding: of tokens, ``[V, D]``.
        settings: weights.
    """
    settings = settings or RewardSettings()
    running: Tensor | None = None
    found = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer.encode_batch(list(texts))

    def interaction(step: int) -> list[list[int]]:
        turns = [item.interactions[step] for item in part]
        own = [turn.answer for turn in turns] if said is None or step == 0 else said[step - 1]
        queries = encode([turn.query for turn in turns])
        return [query + text for query, text in zip(queries, encode(own), strict=True)]

    for step, texts in enumerate(answers, start=1):
        before = interaction(step - 1)
        references = encode([item.interactions[step].answer for item in part])
        found.append(
            rewards(encode(texts), references, before, running, embedding, settings).tolist()
        )
        running = update_running(running, mean_embeddings(before, embedding), settings.decay)
    return found


def reward_rows(items: Sequence[Scored]) -> list[RewardRow]:
    """Return the means by source, actor, seed and step."""
    rows = []
    for source, actor, seed in dict.fromkeys((it.source, it.actor, it.seed) for it in items):
        part = [it for it in items if (it.source, it.actor, it.seed) == (source, actor, seed)]
        for step in range(len(part[0].rewards)):
            values = [item.rewards[step] for item in part]
            rows.append(
                RewardRow(
                    source=source,
                    actor=actor,
                    seed=seed,
                    step=step + 1,
                    n=len(values),
                    reward=sum(values) / len(values),
                )
            )
    return rows


def _mean(items: Sequence[Scored]) -> float | None:
    values = [value for item in items for value in item.rewards]
    return sum(values) / len(values) if values else None


def summarise_rewards(items: Sequence[Scored]) -> list[Finding]:
    """Return the mean rewards of everything that was scored, and M minus Z beside its goal."""
    found = []
    for source in dict.fromkeys(item.source for item in items):
        part = [item for item in items if item.source == source]
        for actor in dict.fromkeys(item.actor for item in part):
            own = [item for item in part if item.actor == actor]
            goal = GOAL_MEAN if actor == "M" else None
            label = f"{source}: {ACTOR_NAMES.get(actor, actor)}"
            found.append(_finding(f"{source}_{actor}", label, own, _mean, goal))
        if any(item.actor == "Z" for item in part):
            label = f"{source}: M minus Z"
            found.append(_finding(f"{source}_M_minus_Z", label, part, _memory_gain, GOAL_GAP))
    return found


def _memory_gain(items: Sequence[Scored]) -> float | None:
    own = _mean([item for item in items if item.actor == "M"])
    zeroed = _mean([item for item in items if item.actor == "Z"])
    return None if own is None or zeroed is None else own - zeroed


def _finding(
    name: str,
    label: str,
    items: Sequence[Scored],
    statistic: Callable[[Sequence[Scored]], float | None],
    goal: float | None,
) -> Finding:
    seeds = [
        value
        for seed in dict.fromkeys(item.seed for item in items)
        if (value := statistic([item for item in items if item.seed == seed])) is not None
    ]
    return finding(
        TEST,
        name,
        label,
        statistic(items),
        unit="number",
        interval=bootstrap(items, statistic),
        seeds=seeds,
        n=sum(len(item.rewards) for item in items),
        goal=goal,
    )
