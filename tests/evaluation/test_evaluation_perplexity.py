"""Answer perplexity: against the definition, by hand, and under every control."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rxlm.data import Conversation, DialogueGenerator, Interaction
from rxlm.errors import RunError, UserError
from rxlm.evaluation.carry_over import carry_over_flags
from rxlm.evaluation.perplexity import (
    PerplexityResult,
    PerplexitySettings,
    builtin_conversations,
    evaluate_perplexity,
)
from rxlm.evaluation.rows import loss_of
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import encode_interaction, encode_system

GENERATOR = DialogueGenerator()
CONVERSATIONS = [
    GENERATOR.conversation(0, 4),
    GENERATOR.conversation(1, 2),
    Conversation(GENERATOR.conversation(2, 3).interactions, system="You are Oslo."),
    GENERATOR.conversation(3, 6),
    GENERATOR.conversation(4, 1),
]
CONDITIONS = ("memory", "zeroed", "reset", "swapped")
SETTINGS = PerplexitySettings(max_turns=5, conditions=CONDITIONS)


def memories(model: RxTAlpha, conversation: Conversation, seed: int) -> list[Tensor]:
    """Return the memory before the first turn and after each, one write after the other."""
    tokenizer = model.require_tokenizer()
    slots = [model.initial_memory(1, seed=seed)]
    turns = [
        encode_interaction(tokenizer, turn.query, turn.answer).ids
        for turn in conversation.interactions
    ]
    if conversation.system:
        turns.insert(0, encode_system(tokenizer, conversation.system))
    for ids in turns:
        slots.append(model.write_memory(slots[-1], torch.tensor([ids])))
    return slots


def read_under(
    condition: str, own: Sequence[Tensor], other: Sequence[Tensor], writes: int
) -> Tensor:
    """Return what is read after so many writes."""
    return {
        "memory": own[writes],
        "zeroed": torch.zeros_like(own[0]),
        "reset": own[0],
        "swapped": other[min(writes, len(other) - 1)],
    }[condition]


@torch.no_grad()
def naive_losses(
    model: RxTAlpha, conversations: Sequence[Conversation], condition: str
) -> dict[tuple[str, int], list[float]]:
    """Return the losses of all answer tokens by (token set, turn), one turn at a time."""
    tokenizer = model.require_tokenizer()
    found: dict[tuple[str, int], list[float]] = {}
    histories = [memories(model, item, seed) for seed, item in enumerate(conversations)]
    for number, conversation in enumerate(conversations):
        own, other = histories[number], histories[(number + 1) % len(histories)]
        flags = carry_over_flags(tokenizer, conversation.interactions, conversation.system)
        for n, turn in enumerate(conversation.interactions):
            ids, start = encode_interaction(tokenizer, turn.query, turn.answer)
            slots = read_under(condition, own, other, n + bool(conversation.system))
            hidden, _ = model.decoder(torch.tensor([ids]), memory=model.decoder.read_memory(slots))
            scores = model.decoder.logits(hidden)[0].log_softmax(dim=-1)
            for place in range(start + 1, len(ids)):
                loss = -scores[place - 1, ids[place]].item()
                keys = [("answer", 0), ("answer", n + 1)]
                if place < len(ids) - 1 and flags[n][place - start - 1]:
                    keys += [("carry-over", 0), ("carry-over", n + 1)]
                for key in keys:
                    found.setdefault(key, []).append(loss)
    return found


@pytest.mark.parametrize(
    ("init_type", "batch_size"), [("learned", 5), ("standard", 1), ("standard", 2)]
)
def test_it_is_the_turn_by_turn_definition(
    make_model: Callable[..., RxTAlpha], init_type: str, batch_size: int
) -> None:
    """Catches memories off by a turn, borrowed from the wrong one, and batches that matter."""
    model = make_model(init_type=init_type)
    settings = SETTINGS.model_copy(update={"batch_size": batch_size})
    result = evaluate_perplexity(model, CONVERSATIONS, settings)
    cut = [
        Conversation(item.interactions[:5], system=item.system, id=item.id)
        for item in CONVERSATIONS
    ]
    wanted = {
        (condition, *key): losses
        for condition in CONDITIONS
        for key, losses in naive_losses(model, cut, condition).items()
    }
    found = {(row["condition"], row["tokens"], row["turn"]): row for row in result.rows}
    assert found.keys() == wanted.keys()
    for key, losses in wanted.items():
        assert found[key]["n"] == len(losses)
        assert found[key]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert found[key]["perplexity"] == pytest.approx(math.exp(found[key]["loss"]))
    overall = [found[condition, "answer", 0]["loss"] for condition in CONDITIONS]
    assert len({round(loss, 5) for loss in overall}) == 4, "the conditions are told apart"


def test_two_tokens_by_hand(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches [A] counted, [EOS] not counted, and sums where means are meant."""
    model = make_model()
    tokenizer = model.require_tokenizer()
    (hello,) = tokenizer.encode("a")
    with torch.no_grad():
        # Without embeddings the scores are the bias: P([EOS]) = 1/2, P(a) = 1/8.
        model.encoder.embedding.weight.zero_()
        model.decoder.head_bias.fill_(-1e9)
        model.decoder.head_bias[tokenizer.eos_id] = math.log(4)
        model.decoder.head_bias[hello] = 0.0
        model.decoder.head_bias[[tokenizer.query_id, tokenizer.bos_id, tokenizer.pad_id]] = 0.0
    conversations = [Conversation((Interaction("b", "a"),)), Conversation((Interaction("c", "a"),))]
    result = evaluate_perplexity(model, conversations, PerplexitySettings())
    row = next(row for row in result.rows if row["condition"] == "memory" and row["turn"] == 0)
    assert row["n"] == 4
    assert row["loss"] == pytest.approx((math.log(8) + math.log(2)) / 2)
    assert row["perplexity"] == pytest.approx(4.0)


def test_every_condition_reads_the_same_tokens(model: RxTAlpha) -> None:
    """Catches a control that is measured on fewer tokens than the memory."""
    conversations = [item for item in CONVERSATIONS if item.system is None]
    rows = evaluate_perplexity(model, conversations, SETTINGS).rows
    counts: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        counts.setdefault((row["tokens"], row["turn"]), set()).add(row["n"])
    assert all(len(found) == 1 for found in counts.values())
    # Before the first turn there is nothing to remember.
    assert loss_of(rows, "memory", turn=1) == pytest.approx(loss_of(rows, "reset", turn=1))
    assert loss_of(rows, "memory", turn=99) is None


def test_limits_are_kept(model: RxTAlpha) -> None:
    """Catches a limit that is not applied, or applied to something else."""
    settings = PerplexitySettings(max_dialogues=2, max_turns=1, conditions=("memory",))
    result = evaluate_perplexity(model, CONVERSATIONS, settings, source="test")
    assert (result.num_dialogues, result.source) == (2, "test")
    assert {row["turn"] for row in result.rows} == {0, 1}
    tokenizer = model.require_tokenizer()
    answers = [item.interactions[0].answer for item in CONVERSATIONS[:2]]
    assert result.rows[0]["n"] == sum(len(tokenizer.encode(text)) + 1 for text in answers)
    chosen = builtin_conversations(GENERATOR, settings)
    assert [len(item) for item in chosen] == [1, 1]
    assert all("test" in item.id for item in chosen)


def long_one() -> Conversation:
    """Return a conversation with a turn that no tiny model can hold."""
    return Conversation((Interaction("Hello!", "word " * 200),), id="the-long-one")


def test_turns_that_do_not_fit_are_named_or_counted(model: RxTAlpha) -> None:
    """Catches conversations that are cut or left out without a word."""
    conversations = [CONVERSATIONS[0], long_one(), CONVERSATIONS[1]]
    with pytest.raises(UserError, match=r"conversation 2 \(the-long-one\).*seq_len is 64"):
        evaluate_perplexity(model, conversations)
    result: PerplexityResult = evaluate_perplexity(
        model, conversations, PerplexitySettings(too_long="skip")
    )
    assert (result.num_dialogues, result.num_skipped) == (2, 1)
    with pytest.raises(UserError, match="1 hold a turn that is too long"):
        evaluate_perplexity(model, conversations[:2], PerplexitySettings(too_long="skip"))


def test_a_diverged_model_is_a_failed_run(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches NaN in a report, which is not JSON."""
    model = make_model()
    with torch.no_grad():
        model.decoder.head_bias[0] = math.nan
    with pytest.raises(RunError, match="not a finite number"):
        evaluate_perplexity(model, CONVERSATIONS, SETTINGS)


def test_conditions_are_checked() -> None:
    """Catches settings that measure nothing."""
    for conditions in ((), ("memory", "memory"), ("nothing",)):
        with pytest.raises(UserError, match="conditions"):
            PerplexitySettings.parse({"conditions": conditions})
