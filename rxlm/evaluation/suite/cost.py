"""T4: what a turn costs, early and late in a conversation: time to the first token, speed, state.

Queries and answers have the same number of tokens at every turn; what they say changes no time. The
same turn is timed for all models in each round, so that a busy moment of the machine hits all.

``M``      the reactive model: reads the query, and after the answer updates its memory
``F``      a language model that is given the whole conversation at every turn, as over an API
``F kept`` the same when it keeps its keys and values from turn to turn: less time, more state

Shapes: B = 1 conversation, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch

from rxlm.evaluation.progress import Progress
from rxlm.evaluation.statistics import bootstrap
from rxlm.evaluation.suite.findings import Finding, finding
from rxlm.evaluation.suite.settings import CostSettings
from rxlm.lm.language_model import LanguageModel
from rxlm.lm.model import LMCache
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.decode_step import DecodeStep
from rxlm.rxt.reactive import ReactiveModel

TEST = "cost"
GOAL = 1.05
Actor = str


class TurnCost(NamedTuple):
    """Seconds of one turn, and bytes of what is kept after it."""

    prompt: float
    decode: float
    update: float
    state_bytes: int


class CostRow(TypedDict):
    """Medians of one actor at one turn; ``low`` and ``high`` are the quartiles of ``prompt_ms``."""

    actor: str
    turn: int
    prompt_ms: float
    low: float
    high: float
    tokens_per_second: float
    update_ms: float
    state_bytes: int
    rounds: list[float]
    """Every prompt latency, in ms."""


def run_cost(
    model: ReactiveModel,
    baseline: LanguageModel,
    settings: CostSettings,
    progress: Progress | None = None,
) -> list[CostRow]:
    """Time the turns of both models.

    Args:
        model: the reactive model.
        baseline: of equal size; its weights do not matter here.
        settings: how long, how often.
        progress: told before every round.
    """
    size = min(model.config.decoder.vocab_size, baseline.config.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(size, (count,), generator=generator).tolist()

    query, answer = tokens(settings.query_tokens), tokens(settings.answer_tokens)
    found: dict[tuple[Actor, int], list[TurnCost]] = {}
    with evaluation_mode(model), evaluation_mode(baseline), torch.no_grad():
        states = _states(model, [*query, *answer], settings.turns)
        for turn in range(-1, settings.rounds):
            if progress is not None and turn >= 0:
                progress(turn, settings.rounds, f"round {turn + 1}")
            for at in settings.turns:
                past = tokens((at - 1) * (len(query) + len(answer)))
                actors: dict[Actor, Callable[[], TurnCost]] = {
                    "M": lambda at=at: _reactive_turn(model, states[at], query, answer),  # type: ignore[misc]
                    "F": lambda past=past: _reading_turn(baseline, past, query, answer),  # type: ignore[misc]
                    "F kept": lambda past=past: _keeping_turn(baseline, past, query, answer),  # type: ignore[misc]
                }
                for actor, measure in actors.items():
                    cost = measure()
                    if turn >= 0:  # The first round warms up.
                        found.setdefault((actor, at), []).append(cost)
    if progress is not None:
        progress(settings.rounds, settings.rounds, "done")
    return [_row(*key, costs, len(answer)) for key, costs in found.items()]


def _states(
    model: ReactiveModel, turn: list[int], wanted: Sequence[int]
) -> dict[int, ConversationState]:
    """Return the conversation before each of the wanted turns."""
    state, found = model.new_conversation(), {}
    for number in range(1, max(wanted) + 1):
        if number in wanted:
            found[number] = state
        if number < max(wanted):
            state = model.update_memory(state, [turn])
    return found


def _reactive_turn(
    model: ReactiveModel, state: ConversationState, query: list[int], answer: list[int]
) -> TurnCost:
    decoder, device = model.decoder, model.device
    begin = _now(device)
    memory = decoder.read_memory(state.slots.to(device=device, dtype=model.memory_dtype))
    ids = torch.tensor([query], device=device)
    hidden, cache = decoder(ids, memory=memory, carried=state.carried)
    decoder.logits(hidden[:, -1]).argmax(dim=-1).tolist()
    read = _now(device)
    step = DecodeStep(decoder, memory, cache, len(answer))
    for token in answer:
        step([token]).argmax(dim=-1).tolist()
    said = _now(device)
    after = model.update_memory(state, [[*query, *answer]])
    done = _now(device)
    held = after.slots.numel() * after.slots.element_size()
    if after.carried is not None:
        held += after.carried.states.numel() * after.carried.states.element_size()
    return TurnCost(read - begin, said - read, done - said, held)


def _reading_turn(
    model: LanguageModel, past: list[int], query: list[int], answer: list[int]
) -> TurnCost:
    """Read everything again."""
    begin = _now(model.device)
    ids = torch.tensor([[*past, *query]], device=model.device)
    hidden, cache = model(ids)
    return _decoded(model, begin, hidden, cache, answer)


def _keeping_turn(
    model: LanguageModel, past: list[int], query: list[int], answer: list[int]
) -> TurnCost:
    """Read the query only; what came before was read, and kept, in earlier turns."""
    kept = model(torch.tensor([past], device=model.device))[1] if past else None
    begin = _now(model.device)
    hidden, cache = model(torch.tensor([query], device=model.device), cache=kept)
    return _decoded(model, begin, hidden, cache, answer)


def _decoded(
    model: LanguageModel,
    begin: float,
    hidden: torch.Tensor,
    cache: LMCache,
    answer: list[int],
) -> TurnCost:
    model.logits(hidden[:, -1]).argmax(dim=-1).tolist()
    read = _now(model.device)
    for token in answer:
        hidden, cache = model(torch.tensor([[token]], device=model.device), cache=cache)
        model.logits(hidden[:, -1]).argmax(dim=-1).tolist()
    said = _now(model.device)
    return TurnCost(read - begin, said - read, 0.0, cache.num_bytes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(actor: str, turn: int, costs: Sequence[TurnCost], num_tokens: int) -> CostRow:
    prompts = [1000 * cost.prompt for cost in costs]
    quartiles = statistics.quantiles(prompts, n=4, method="inclusive") if len(costs) > 1 else None
    return CostRow(
        actor=actor,
        turn=turn,
        prompt_ms=statistics.median(prompts),
        low=prompts[0] if quartiles is None else quartiles[0],
        high=prompts[0] if quartiles is None else quartiles[2],
        tokens_per_second=num_tokens / statistics.median(cost.decode for cost in costs),
        update_ms=1000 * statistics.median(cost.update for cost in costs),
        state_bytes=costs[0].state_bytes,
        rounds=prompts,
    )


def summarise_cost(rows: Sequence[CostRow]) -> list[Finding]:
    """Return how much the last turn costs compared with the first, of every actor."""
    found = []
    first, last = min(row["turn"] for row in rows), max(row["turn"] for row in rows)
    for actor in dict.fromkeys(row["actor"] for row in rows):
        early, late = (
            next(row for row in rows if (row["actor"], row["turn"]) == (actor, turn))
            for turn in (first, last)
        )
        pairs = list(zip(early["rounds"], late["rounds"], strict=True))

        def ratio(drawn: Sequence[tuple[float, float]]) -> float:
            return statistics.median(b for _, b in drawn) / statistics.median(a for a, _ in drawn)

        found.append(
            finding(
                TEST,
                f"latency_{actor.replace(' ', '_')}",
                f"{actor}: time to the first token, turn {last} over turn {first}",
                ratio(pairs),
                unit="ratio",
                interval=bootstrap(pairs, ratio),
                n=len(pairs),
                comparison="<=",
                goal=GOAL if actor == "M" else None,
            )
        )
        found.append(
            finding(
                TEST,
                f"state_{actor.replace(' ', '_')}",
                f"{actor}: bytes of state, turn {last} over turn {first}",
                late["state_bytes"] / early["state_bytes"],
                unit="ratio",
                n=len(pairs),
                comparison="<=",
                goal=1.0 if actor == "M" else None,
            )
        )
    return found
