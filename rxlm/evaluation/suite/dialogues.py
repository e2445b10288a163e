"""T3: how well the answers of real dialogues are predicted, turn by turn, beside every control.

Tokens of words that were said earlier, and not in the query ("carry-over"), are counted apart: that
is where a memory can show. Losses are in nats a token. Works through :mod:`.contestant`; no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from rxlm.data.conversations import Conversation
from rxlm.data.sources import load_conversations
from rxlm.evaluation.carry_over import carry_over_flags
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.rows import ALL_TURNS
from rxlm.evaluation.statistics import bootstrap
from rxlm.evaluation.suite.contestant import Contestant, Turns
from rxlm.evaluation.suite.findings import NOT_GIVEN, Finding, finding
from rxlm.evaluation.suite.settings import DialogueSettings
from rxlm.tokenization import Tokenizer

TEST = "dialogues"
TOKEN_SETS = ("answer", "carry-over")
LATE = 8
"""From this turn on memory must be as good as reading everything again."""


class Tally(NamedTuple):
    """Sum of losses and number of tokens."""

    loss: float
    tokens: int


class Measured(NamedTuple):
    """One conversation: tallies by (control, token set, turn)."""

    source: str
    seed: int
    tallies: dict[tuple[str, str, int], Tally]


class DialogueRow(TypedDict):
    """One figure: ``turn`` 0 = all turns, ``n`` tokens, ``loss`` in nats a token."""

    source: str
    tokens: str
    turn: int
    control: str
    n: int
    conversations: int
    loss: float
    low: float | None
    high: float | None
    seed_min: float
    seed_max: float


def load_sources(
    data: Path, settings: DialogueSettings, seeds: Sequence[int], fits: Callable[[Turns], bool]
) -> dict[str, list[list[Conversation]]]:
    """Return for each source and seed another set of conversations, cut to ``max_turns``.

    Args:
        data: the folder that ``RXLM_DATA`` names.
        settings: which, and how many.
        seeds: how many sets.
        fits: whether a contestant can read turns; conversations with others are left out.

    Raises:
        UserError: if a file is missing or damaged.
    """
    found = {}
    for source in settings.sources:
        every = load_conversations(data / "dialogues" / f"{source}.valid.jsonl.gz")
        random.Random(0).shuffle(every)
        cut = (item.window(0, settings.max_turns) for item in every)
        usable: list[Conversation] = []
        for item in cut:
            if len(usable) == settings.conversations * len(seeds):
                break
            if fits(item.interactions):
                usable.append(item)
        size = len(usable) // len(seeds)
        found[source] = [usable[place * size : (place + 1) * size] for place in range(len(seeds))]
    return found


def run_dialogues(
    contestants: Sequence[Contestant],
    tokenizer: Tokenizer,
    sources: dict[str, list[list[Conversation]]],
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure every conversation."""
    work = [
        (source, seed, part)
        for source, parts in sources.items()
        for seed, part in zip(seeds, parts, strict=True)
        if len(part) > 1
    ]
    found: list[Measured] = []
    for done, (source, seed, part) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{source}, seed {seed}")
        tallies: list[dict[tuple[str, str, int], Tally]] = [{} for _ in part]
        flags = [carry_over_flags(tokenizer, item.interactions, item.system) for item in part]
        for contestant in contestants:
            for control, losses in contestant.losses(part).items():
                for place, turns in enumerate(losses):
                    _add(tallies[place], control, turns, flags[place])
        found += [Measured(source, seed, tally) for tally in tallies]
    if progress is not None:
        progress(len(work), len(work), "done")
    return found


def _add(
    tallies: dict[tuple[str, str, int], Tally],
    control: str,
    turns: Sequence[Sequence[float]],
    flags: Sequence[Sequence[bool]],
) -> None:
    for number, (losses, carried) in enumerate(zip(turns, flags, strict=True), start=1):
        # The last token, [EOS], is no word.
        marked = [loss for loss, flag in zip(losses, [*carried, False], strict=True) if flag]
        for tokens, chosen in (("answer", losses), ("carry-over", marked)):
            for turn in (number, ALL_TURNS):
                before = tallies.get((control, tokens, turn), Tally(0.0, 0))
                tallies[control, tokens, turn] = Tally(
                    before.loss + sum(chosen), before.tokens + len(chosen)
                )


def mean_loss(
    items: Sequence[Measured], control: str, tokens: str = "answer", turn: int = ALL_TURNS
) -> float | None:
    """Return the mean loss of the tokens of ``items``; None if there is no token."""
    loss, count = 0.0, 0
    for item in items:
        tally = item.tallies.get((control, tokens, turn))
        if tally is not None:
            loss, count = loss + tally.loss, count + tally.tokens
    return loss / count if count else None


def rows_of(items: Sequence[Measured]) -> list[DialogueRow]:
    """Return a row for every source, control, token set and turn that has tokens."""
    rows = []
    for source in dict.fromkeys(item.source for item in items):
        part = [item for item in items if item.source == source]
        keys = dict.fromkeys(key for item in part for key in item.tallies)
        for control, tokens, turn in sorted(keys, key=lambda key: (key[1], key[2])):
            key = (control, tokens, turn)
            having = [item for item in part if item.tallies.get(key, Tally(0.0, 0)).tokens]
            loss = mean_loss(having, *key)
            if loss is None:
                continue

            def statistic(
                drawn: Sequence[Measured], key: tuple[str, str, int] = key
            ) -> float | None:
                return mean_loss(drawn, *key)

            interval = bootstrap(having, statistic, rounds=200)
            seeds = [
                value
                for seed in dict.fromkeys(item.seed for item in having)
                if (value := mean_loss([item for item in having if item.seed == seed], *key))
                is not None
            ]
            rows.append(
                DialogueRow(
                    source=source,
                    tokens=tokens,
                    turn=turn,
                    control=control,
                    n=sum(item.tallies[key].tokens for item in having),
                    conversations=len(having),
                    loss=loss,
                    low=None if interval is None else interval[0],
                    high=None if interval is None else interval[1],
                    seed_min=min(seeds),
                    seed_max=max(seeds),
                )
            )
    return rows


def recovered_share(items: Sequence[Measured], tokens: str = "answer") -> float | None:
    """Return (N - M) / (N - F) in nats: what memory gives of what reading everything again gives.

    None where N and F were not measured, or reading again helps by less than a thousandth.
    """
    losses = [mean_loss(items, control, tokens) for control in ("M", "F", "N")]
    memory, full, alone = losses
    if memory is None or full is None or alone is None or alone - full < 1e-3:
        return None
    return (alone - memory) / (alone - full)


def summarise_dialogues(
    items: Sequence[Measured], rows: Sequence[DialogueRow], settings: DialogueSettings
) -> list[Finding]:
    """Return the numbers of the test beside their goals."""
    found = []
    for source in dict.fromkeys(item.source for item in items):
        found.append(_turns_won(source, rows, settings))
    for control in ("Z", "X"):
        for tokens in TOKEN_SETS:
            name, label = f"{control}_minus_M_{tokens}", f"{control} minus M, {tokens} tokens"
            found.append(_gap(items, name, label, control, "M", tokens))
    baseline = any(key[0] == "F" for item in items for key in item.tallies)
    for tokens, goal in (("answer", 0.5), ("carry-over", 0.3)):
        value = recovered_share(items, tokens)
        note = (
            ""
            if value is not None
            else ("history does not help the baseline" if baseline else f"baseline {NOT_GIVEN}")
        )
        found.append(
            finding(
                TEST,
                f"recovered_{tokens}",
                f"recovered share (N - M) / (N - F), {tokens} tokens",
                value,
                unit="ratio",
                interval=bootstrap(
                    items,
                    lambda drawn, tokens=tokens: recovered_share(drawn, tokens),  # type: ignore[misc]
                )
                if value is not None
                else None,
                goal=goal,
                n=len(items),
                note=note,
            )
        )
    late = _gap(items, "F_minus_M_late", f"F minus M from turn {LATE} on", "F", "M", "answer", LATE)
    if late["value"] is None:
        late["note"] = "no such turns" if baseline else f"baseline {NOT_GIVEN}"
    late["goal"] = 0.0
    late["passed"] = None if late["value"] is None else late["value"] >= 0
    return [*found, late]


def _turns_won(source: str, rows: Sequence[DialogueRow], settings: DialogueSettings) -> Finding:
    """Return at how many of the turns from the second on M is better than Z and X."""
    losses = {
        (row["control"], row["turn"]): row["loss"]
        for row in rows
        if (row["source"], row["tokens"]) == (source, "answer") and row["n"] >= settings.min_tokens
    }
    turns = sorted({turn for _, turn in losses if turn >= 2})
    others = [control for control in ("Z", "X") if any(key[0] == control for key in losses)]
    won = [
        all(losses["M", turn] < losses.get((control, turn), math.inf) for control in others)
        for turn in turns
    ]
    lost = [turn for turn, better in zip(turns, won, strict=True) if not better]
    return finding(
        TEST,
        f"turns_won_{source}",
        f"{source}: turns from the second on where M is better than Z and X",
        sum(won) / len(won) if won and others else None,
        goal=1.0,
        n=len(won),
        note=f"not at turn {', '.join(map(str, lost))}" if lost else "",
    )


def _gap(
    items: Sequence[Measured],
    name: str,
    label: str,
    first: str,
    second: str,
    tokens: str,
    least: int | None = None,
) -> Finding:
    """Return how much more loss ``first`` has than ``second``, of turns from ``least`` on."""

    def value(drawn: Sequence[Measured]) -> float | None:
        sums = []
        for control in (first, second):
            loss, count = 0.0, 0
            for item in drawn:
                for (of, kind, turn), tally in item.tallies.items():
                    wanted = turn == ALL_TURNS if least is None else turn >= least
                    if (of, kind) == (control, tokens) and wanted:
                        loss, count = loss + tally.loss, count + tally.tokens
            if not count:
                return None
            sums.append(loss / count)
        return sums[0] - sums[1]

    found = value(items)
    interval = None if found is None else bootstrap(items, value, rounds=200)
    seeds = [
        gap
        for seed in dict.fromkeys(item.seed for item in items)
        if (gap := value([item for item in items if item.seed == seed])) is not None
    ]
    return finding(
        TEST, name, label, found, unit="nats", interval=interval, seeds=seeds, n=len(items)
    )
