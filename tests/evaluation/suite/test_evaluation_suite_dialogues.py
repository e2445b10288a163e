"""T3 with predictors of known probabilities, and with models whose losses can be told otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from rxlm.data import Conversation, DialogueGenerator, Interaction
from rxlm.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
from rxlm.evaluation.rows import loss_of
from rxlm.evaluation.suite.baseline import LanguageModelContestant
from rxlm.evaluation.suite.dialogues import (
    Measured,
    mean_loss,
    recovered_share,
    rows_of,
    run_dialogues,
    summarise_dialogues,
)
from rxlm.evaluation.suite.reactive import ReactiveContestant
from rxlm.evaluation.suite.settings import DialogueSettings
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer

GENERATOR = DialogueGenerator()
CONVERSATIONS = [GENERATOR.conversation(number, 3 + number % 3, "test") for number in range(8)]
SOURCES = {"made up": [CONVERSATIONS[:4], CONVERSATIONS[4:]]}
SETTINGS = DialogueSettings(min_tokens=1)


def measured(contestants: list[object], tokenizer: Tokenizer) -> list[Measured]:
    """Return what the test finds of contestants."""
    return run_dialogues(contestants, tokenizer, SOURCES, (0, 1))  # type: ignore[arg-type]


def test_known_probabilities(known: ModuleType, tokenizer: Tokenizer) -> None:
    """Catches a mean over the wrong tokens, and a recovered share that is upside down."""
    nats = {
        "M": math.log(3),
        "Z": math.log(5),
        "X": math.log(6),
        "F": math.log(2),
        "N": math.log(8),
    }
    items = measured([known.Known(tokenizer, nats)], tokenizer)
    rows = rows_of(items)
    assert {row["control"] for row in rows} == set(nats)
    for row in rows:
        assert row["loss"] == pytest.approx(nats[row["control"]])
        assert row["low"] == pytest.approx(row["loss"]) == row["high"]
    share = math.log(8 / 3) / math.log(8 / 2)
    assert recovered_share(items) == pytest.approx(share)
    found = {item["name"]: item for item in summarise_dialogues(items, rows, SETTINGS)}
    assert found["recovered_answer"]["passed"] is True
    assert found["turns_won_made up"]["value"] == 1.0
    assert found["Z_minus_M_answer"]["value"] == pytest.approx(math.log(5 / 3))
    assert found["F_minus_M_late"]["note"] == "no such turns"
    tokens = sum(len(tokenizer.encode(t.answer)) + 1 for c in CONVERSATIONS for t in c.interactions)
    assert {r["n"] for r in rows if (r["turn"], r["tokens"]) == (0, "answer")} == {tokens}


def test_a_useless_memory_is_not_praised(known: ModuleType, tokenizer: Tokenizer) -> None:
    """Catches a verdict that a memory passes although another conversation's does as well."""
    nats = {"M": 1.0, "Z": 1.2, "X": 1.0}
    items = measured([known.Known(tokenizer, nats)], tokenizer)
    found = {item["name"]: item for item in summarise_dialogues(items, rows_of(items), SETTINGS)}
    assert found["turns_won_made up"]["value"] == 0.0
    assert found["turns_won_made up"]["note"].startswith("not at turn 2")
    assert found["recovered_answer"]["passed"] is None
    assert found["recovered_answer"]["note"] == "baseline not given"


def test_carry_over_tokens_are_counted_apart(known: ModuleType, tokenizer: Tokenizer) -> None:
    """Catches carry-over words that were in the query, or never said before."""
    turns = (Interaction("I am Ann.", "Hello."), Interaction("Who am I?", "You are Ann."))
    pair = [Conversation(turns, id="a"), Conversation(turns, id="b")]
    items = run_dialogues([known.Known(tokenizer, {"M": 1.0})], tokenizer, {"pair": [pair]}, (0,))
    ann = tokenizer.encode("You are Ann.")
    word = [n for n in ann if "Ann".startswith(tokenizer.decode([n]).strip() or "?")]
    counts = {key: tally.tokens for key, tally in items[0].tallies.items()}
    assert counts["M", "carry-over", 1] == 0
    assert 1 <= counts["M", "carry-over", 2] <= max(1, len(ann) - len(word))


def test_losses_of_the_model_are_those_of_eval_perplexity(
    make_model: Callable[..., RxTAlpha],
) -> None:
    """Catches losses that are given to the wrong conversation, turn or token."""
    model = make_model()
    conditions = ("memory", "zeroed", "swapped")
    wanted = evaluate_perplexity(
        model, CONVERSATIONS, PerplexitySettings(conditions=conditions, batch_size=3)
    )
    items = run_dialogues(
        [ReactiveContestant(model)], model.require_tokenizer(), {"all": [CONVERSATIONS]}, (0,)
    )
    for control, condition in zip("MZX", conditions, strict=True):
        for tokens in ("answer", "carry-over"):
            for turn in (0, 1, 3, 5):
                expected = loss_of(wanted.rows, condition, tokens, turn)
                found = mean_loss(items, control, tokens, turn)
                assert found == (None if expected is None else pytest.approx(expected, rel=1e-4))


def test_losses_of_a_language_model(tokenizer: Tokenizer) -> None:
    """Catches a history that is not read, one that is read by N, and a shifted target."""
    torch.manual_seed(0)
    config = {
        "vocab_size": tokenizer.vocab_size,
        "dim": 16,
        "depth": 1,
        "num_heads": 2,
        "ff_dim": 8,
    }
    model = LanguageModel({**config, "attention": "softmax"}, tokenizer).eval()
    contestant = LanguageModelContestant(model)
    found = contestant.losses(CONVERSATIONS)
    turns = CONVERSATIONS[5].interactions
    ids = [token for turn in turns for token in contestant._ids([turn])]
    answer = [*tokenizer.encode(turns[-1].answer), tokenizer.eos_id]
    for control, row in (("F", ids), ("N", contestant._ids(turns[-1:]))):
        with torch.no_grad():
            scores = model.logits(model(torch.tensor([row]))[0])[0].log_softmax(dim=-1)
        wanted = [
            -float(scores[len(row) - len(answer) - 1 + n, token]) for n, token in enumerate(answer)
        ]
        assert found[control][5][-1] == pytest.approx(wanted, rel=1e-4)
    assert found["F"][5][0] == pytest.approx(found["N"][5][0], rel=1e-4)
    assert found["F"][5][-1] != pytest.approx(found["N"][5][-1], rel=1e-3)
    # A head of zeros predicts every token alike.
    with torch.no_grad():
        model.embedding.weight.zero_()
    even = contestant.losses(CONVERSATIONS[:2])["F"]
    flat = [loss for conversation in even for turn in conversation for loss in turn]
    assert flat == pytest.approx([math.log(tokenizer.vocab_size)] * len(flat))
