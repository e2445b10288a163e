"""T6: are the slots used? Delete some, compare them, and read them with a linear probe.

The probe tells which side is at fault: what a linear map finds in the slots was written, so a
decoder that does not say it cannot read; what it does not find was perhaps never written.

Shapes: L layers, B conversations, S slots, D width, C classes, P features.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from rxlm.data.conversations import Conversation
from rxlm.data.facts import FACT_KINDS
from rxlm.data.generator import DialogueGenerator, GeneratorConfig
from rxlm.errors import UserError
from rxlm.evaluation.memory_trace import write_map
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.recall_plan import SEED_STRIDE
from rxlm.evaluation.scoring import score_answer
from rxlm.evaluation.statistics import Estimate, estimate
from rxlm.evaluation.suite.findings import Finding, finding, of_estimate
from rxlm.evaluation.suite.reactive import ReactiveContestant
from rxlm.evaluation.suite.settings import SlotsSettings
from rxlm.rxt.conversation import ConversationState

TEST = "slots"
MAX_SINGLE = 32
"""Slots that are deleted one at a time, spread over all of them."""
RIDGE = 0.01
"""Penalty of the probe, relative to the mean variance of what it reads."""
COLLAPSE = 0.95
"""Mean cosine of slots above which they hold the same."""
MAP_TURNS, MAP_DIALOGUES = 12, 32
"""Turns and dialogues of the heat map."""
CLEAR = 0.1
"""A difference of accuracies that is worth a verdict."""


class DeletedRow(TypedDict):
    """Answers with slots deleted: ``slot`` None: ``deleted`` random ones, else this one."""

    seed: int
    deleted: int
    slot: int | None
    n: int
    right: int


class ProbeRow(TypedDict):
    """Right answers of ``n``: by a linear probe on ``features``, and what stands beside it."""

    seed: int
    features: str
    n: int
    right: int


class SlotsResult(NamedTuple):
    """Everything that the test found; ``cosine``: mean and largest of each layer; ``written``:
    write sizes ``[N, L, S]``."""

    deleted: list[DeletedRow]
    probe: list[ProbeRow]
    cosine: list[dict[str, float]]
    written: list[list[list[float]]]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return self._asdict()


def run_slots(
    contestant: ReactiveContestant,
    settings: SlotsSettings,
    seeds: Sequence[int],
    generator: GeneratorConfig | None = None,
    progress: Progress | None = None,
) -> SlotsResult:
    """Run all parts.

    Raises:
        UserError: for a kind of fact that does not exist.
    """
    source = DialogueGenerator(generator)
    show = progress or (lambda done, total, doing: None)
    parts = 2 * len(seeds) + 1
    deleted: list[DeletedRow] = []
    probe: list[ProbeRow] = []
    cosines: list[Tensor] = []
    for number, seed in enumerate(seeds):
        show(2 * number, parts, f"deleting slots, seed {seed}")
        rows, slots = _delete(contestant, source, settings, seed)
        deleted += rows
        cosines.append(slots)
        show(2 * number + 1, parts, f"probe, seed {seed}")
        probe += _probe(contestant, source, settings, seed)
    show(parts - 1, parts, "heat map")
    dialogues = [
        source.conversation(number, MAP_TURNS, "test").interactions
        for number in range(MAP_DIALOGUES)
    ]
    written = write_map(contestant.model, dialogues).tolist()
    show(parts, parts, "done")
    return SlotsResult(deleted, probe, slot_cosines(torch.cat(cosines, dim=1)), written)


def slot_cosines(slots: Tensor) -> list[dict[str, float]]:
    """Return mean and largest cosine of two slots of a layer, over conversations.

    Args:
        slots: ``[L, B, S, D]``.
    """
    unit = torch.nn.functional.normalize(slots.float(), dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    num_slots = slots.shape[2]
    if num_slots < 2:
        return [{"mean": 0.0, "largest": 0.0} for _ in slots]
    other = ~torch.eye(num_slots, dtype=torch.bool, device=slots.device)
    pairs = cosine[..., other]
    return [
        {"mean": float(layer.mean()), "largest": float(layer.amax(dim=-1).mean())}
        for layer in pairs
    ]


def _delete(
    contestant: ReactiveContestant, source: DialogueGenerator, settings: SlotsSettings, seed: int
) -> tuple[list[DeletedRow], Tensor]:
    """Return the answers with slots deleted, and the slots."""
    dialogues = [
        source.probe(
            seed * SEED_STRIDE + number,
            distance=settings.distance,
            num_facts=settings.facts,
            unseen="pairs",
        )
        for number in range(settings.dialogues)
    ]
    held = contestant.read([item.interactions[:-1] for item in dialogues])
    num_slots = held.slots.shape[2]
    order = list(range(num_slots))
    random.Random(seed).shuffle(order)
    plan: list[tuple[int | None, list[int]]] = [(None, [])]
    step = max(1, num_slots // MAX_SINGLE)
    plan += [(slot, [slot]) for slot in range(0, num_slots, step)]
    shares = (0.125, 0.25, 0.5, 0.75, 0.875)
    counts = sorted({round(share * num_slots) for share in shares} - {0, num_slots})
    plan += [(None, order[:count]) for count in counts]
    rows = []
    for slot, gone in plan:
        right = _num_right(contestant, without_slots(held, gone), dialogues)
        rows.append(
            DeletedRow(seed=seed, deleted=len(gone), slot=slot, n=len(dialogues), right=right)
        )
    return rows, held.slots


def without_slots(state: ConversationState, gone: Sequence[int]) -> ConversationState:
    """Return conversations whose memories lack the slots ``gone`` (of all layers).

    A reader attends to whatever slots there are, so a deleted one takes no part at all; one of
    zeros would still draw attention.
    """
    kept = [slot for slot in range(state.slots.shape[2]) if slot not in set(gone)]
    index = torch.tensor(kept, device=state.slots.device)
    return state.replaced(slots=state.slots.index_select(2, index))


def _num_right(
    contestant: ReactiveContestant, state: ConversationState, dialogues: Sequence[Conversation]
) -> int:
    asked = [item.interactions[-1] for item in dialogues]
    texts = contestant.answer(state, [turn.query for turn in asked], "M")
    return sum(score_answer(text, turn).exact for text, turn in zip(texts, asked, strict=True))


def _probe(
    contestant: ReactiveContestant, source: DialogueGenerator, settings: SlotsSettings, seed: int
) -> list[ProbeRow]:
    names = [kind.name for kind in FACT_KINDS]
    if settings.probe_kind not in names:
        raise UserError(f"probe_kind={settings.probe_kind!r}: expected one of {', '.join(names)}.")
    place = names.index(settings.probe_kind)
    count = settings.probe_train + settings.probe_test
    # Kinds take turns over the numbers, so every so many-th dialogue asks for the kind.
    dialogues = [
        source.probe(
            seed * SEED_STRIDE + number * len(names) + place,
            distance=settings.distance,
            num_facts=settings.facts,
        )
        for number in range(count)
    ]
    held = contestant.read([item.interactions[:-1] for item in dialogues])
    values = [item.interactions[-1].value or "" for item in dialogues]
    test = range(settings.probe_train, count)
    told = [values[number] for number in test]
    rows = []
    for features, matrix in slot_features(held.slots).items():
        guessed = ridge_probe(
            matrix[: settings.probe_train], values[: settings.probe_train], matrix[test.start :]
        )
        right = sum(guess == value for guess, value in zip(guessed, told, strict=True))
        rows.append(ProbeRow(seed=seed, features=features, n=len(told), right=right))
    texts = contestant.answer(
        held.select(test), [dialogues[number].interactions[-1].query for number in test], "M"
    )
    said = sum(
        score_answer(text, dialogues[number].interactions[-1]).value
        for text, number in zip(texts, test, strict=True)
    )
    rows.append(ProbeRow(seed=seed, features="decoder", n=len(told), right=said))
    common = Counter(values[: settings.probe_train]).most_common(1)[0][0]
    most = sum(value == common for value in told)
    rows.append(ProbeRow(seed=seed, features="most frequent", n=len(told), right=most))
    return rows


def slot_features(slots: Tensor) -> dict[str, Tensor]:
    """Return what a probe reads of memories ``[L, B, S, D]``, fp64 ``[B, P]``.

    ``all slots``: every number, each slot for itself; ``pooled``: mean and largest over the slots,
    for a fact that is held now in this slot, now in that.
    """
    by_dialogue = slots.detach().cpu().double().transpose(0, 1)
    pooled = torch.cat((by_dialogue.mean(dim=2), by_dialogue.amax(dim=2)), dim=-1)
    return {"all slots": by_dialogue.flatten(1), "pooled": pooled.flatten(1)}


def ridge_probe(train: Tensor, classes: Sequence[str], test: Tensor) -> list[str]:
    """Return the class of each row of ``test`` by ridge regression on one-hot classes.

    Closed form in the rows (there are fewer of them than of features), so nothing is drawn.

    Args:
        train: ``[B, P]``.
        classes: B names.
        test: ``[B', P]``.
    """
    names = sorted(set(classes))
    targets = torch.zeros(len(classes), len(names), dtype=train.dtype)
    targets[torch.arange(len(classes)), torch.tensor([names.index(name) for name in classes])] = 1
    mean = train.mean(dim=0)
    scale = train.std(dim=0).clamp(min=1e-6)
    rows, others = (train - mean) / scale, (test - mean) / scale
    gram = rows @ rows.T / rows.shape[1]
    penalty = RIDGE * torch.eye(len(rows), dtype=train.dtype) * gram.diagonal().mean()
    weights = torch.linalg.solve(gram + penalty, targets - targets.mean(dim=0))
    scores = others @ rows.T / rows.shape[1] @ weights + targets.mean(dim=0)
    return [names[index] for index in scores.argmax(dim=1).tolist()]


def deleted_share(rows: Sequence[DeletedRow]) -> Estimate:
    """Return the share of right answers of rows (at least one)."""
    return estimate([(row["seed"], row["right"], row["n"]) for row in rows])


def probe_share(rows: Sequence[ProbeRow], features: str) -> Estimate:
    """Return the share of right answers of one reader."""
    return estimate([(r["seed"], r["right"], r["n"]) for r in rows if r["features"] == features])


def verdict(probe: float, decoder: float, floor: float) -> str:
    """Say which side is at fault.

    Args:
        probe: accuracy of the better probe.
        decoder: accuracy of the decoder.
        floor: accuracy of the most frequent value.
    """
    if decoder >= 1 - CLEAR:
        return "neither is at fault: the decoder says what was told"
    if probe >= decoder + CLEAR:
        return "the read is at fault: the value is in the slots, the decoder does not say it"
    if probe <= floor + CLEAR and decoder <= floor + CLEAR:
        return "the write is at fault, as far as a linear probe can tell: neither finds the value"
    return "not told: the probe finds no more than the decoder says (it may be too weak)"


def summarise_slots(result: SlotsResult) -> list[Finding]:
    """Return the numbers of the test."""
    found = []
    none = [row for row in result.deleted if row["deleted"] == 0]
    full = deleted_share(none)
    found.append(of_estimate(TEST, "all_slots", "right answers with all slots", full))
    singles = [row for row in result.deleted if row["slot"] is not None]
    by_slot = {
        slot: deleted_share([row for row in singles if row["slot"] == slot])
        for slot in dict.fromkeys(row["slot"] for row in singles)
    }
    worst = min(by_slot, key=lambda slot: by_slot[slot].mean)
    label = f"right answers without the slot that is missed most ({worst})"
    found.append(of_estimate(TEST, "worst_slot", label, by_slot[worst]))
    for count in sorted({row["deleted"] for row in result.deleted if row["slot"] is None} - {0}):
        part = [r for r in result.deleted if r["slot"] is None and r["deleted"] == count]
        label = f"right answers without {count} random slots"
        found.append(of_estimate(TEST, f"without_{count}", label, deleted_share(part)))
    mean = sum(layer["mean"] for layer in result.cosine) / len(result.cosine)
    found.append(
        finding(
            TEST,
            "cosine",
            "mean cosine of two slots (above 0.95 they hold the same)",
            mean,
            unit="ratio",
            comparison="<=",
            goal=COLLAPSE,
            n=full.n,
        )
    )
    readers = [row["features"] for row in result.probe]
    for features in dict.fromkeys(readers):
        share = probe_share(result.probe, features)
        kind = "" if features in ("decoder", "most frequent") else "linear probe on "
        found.append(of_estimate(TEST, f"probe_{features}", f"value told: {kind}{features}", share))
    best = max(probe_share(result.probe, item).mean for item in ("all slots", "pooled"))
    decoder = probe_share(result.probe, "decoder").mean
    floor = probe_share(result.probe, "most frequent").mean
    label = "probe minus decoder"
    gap = best - decoder
    found.append(finding(TEST, "fault", label, gap, note=verdict(best, decoder, floor)))
    return found
