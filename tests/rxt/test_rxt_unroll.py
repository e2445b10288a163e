"""All turns in one batch against the slow loop that the model's definition gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.data import Conversation, DialogueGenerator, Interaction, conversation_texts
from rxlm.rxt.dialogues import DialogueBatch, TurnEncoder, whole_dialogues
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.unroll import (
    Answers,
    EncodedTurns,
    answer_with_history,
    answer_with_memory,
    encode_turns,
    exact_rows,
    scan_memory,
)
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

VARIANTS = ("simple", "self", "interlayer", "self-interlayer", "grouped-self-interlayer")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    conversations = (DialogueGenerator().conversation(index, 8) for index in range(20))
    return train_tokenizer(conversation_texts(conversations), TokenizerTraining(vocab_size=320))


@pytest.fixture(scope="module")
def turns(tokenizer: Tokenizer) -> TurnEncoder:
    return TurnEncoder(tokenizer, 96)


def network(tokenizer: Tokenizer, **memory: Any) -> RxTNetwork:
    sizes = {"num_layers": 2, "embed_dim": 16, "att_heads": 2, "stm_size": 6, "seq_len": 96}
    kinds = {"self_att_type": "gqa", "cross_att_type": "mha", "tie_embeddings": True}
    component = {**sizes, **kinds, "vocab_size": tokenizer.vocab_size, "ff_dim": 32}
    config = {
        "encoder": component,
        "decoder": component,
        "memory_attention": {**sizes, "variant": "simple", "att_type": "mha", **memory},
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return RxTNetwork(config)


def dialogue(index: int, num_turns: int, system: str | None = None) -> Conversation:
    made = DialogueGenerator().conversation(index, num_turns)
    return Conversation(made.interactions, system=system)


def unrolled(model: RxTNetwork, batch: DialogueBatch) -> list[Answers]:
    encoded = encode_turns(model.encoder, batch)
    start = model.initial_memory(batch.num_dialogues)
    memories = scan_memory(model.memory_attention, start, encoded, batch.num_turns)
    return answer_with_memory(model.decoder, batch, memories)


def logits_by_row(answers: list[Answers]) -> dict[int, Tensor]:
    """Return the logits at the targets of each row, by its place."""
    return {
        place: item.logits[item.row == row]
        for item in answers
        for row, place in enumerate(item.place.tolist())
    }


def total_loss(answers: list[Answers]) -> Tensor:
    logits = torch.cat([item.logits for item in answers])
    return torch.nn.functional.cross_entropy(logits, torch.cat([item.labels for item in answers]))


def naive_logits(model: RxTNetwork, turns: TurnEncoder, conversation: Conversation) -> list[Tensor]:
    """Talk one turn after the other, a batch of one, no padding, as the paper defines it."""
    slots, logits = model.initial_memory(1), []
    if conversation.system:
        slots = model.write_memory(slots, torch.tensor([turns.system(conversation.system).ids]))
    for item in conversation.interactions:
        turn = turns.interaction(item.query, item.answer)
        ids = torch.tensor([turn.ids])
        hidden, _ = model.decoder(ids[:, :-1], memory=model.decoder.read_memory(slots))
        logits.append(model.decoder.logits(hidden[0, turn.answer_start - 1 :]))
        slots = model.write_memory(slots, ids)
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_equals_the_turn_by_turn_loop(
    variant: str, tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """Ragged dialogues that disturb each other, a memory off by one turn, padding that leaks."""
    options = {"num_groups": 2} if variant.startswith("grouped") else {}
    model = network(tokenizer, variant=variant, interlayer_att_type="mha", **options)
    dialogues = [dialogue(0, 5), dialogue(1, 1), dialogue(2, 3, system="You are brief.")]
    batch = whole_dialogues(dialogues, turns, num_buckets=3)
    found = logits_by_row(unrolled(model, batch))
    for b, item in enumerate(dialogues):
        first = 1 if item.system else 0
        for n, wanted in enumerate(naive_logits(model, turns, item), start=first):
            torch.testing.assert_close(found.pop(n * len(dialogues) + b), wanted, atol=2e-5, rtol=0)
    assert not found


def test_turns_that_do_not_exist_leave_the_memory_alone(
    tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """A short dialogue whose memory decays while longer ones go on."""
    model = network(tokenizer)
    batch = whole_dialogues([dialogue(0, 2), dialogue(1, 4)], turns)
    encoded = encode_turns(model.encoder, batch)
    memories = scan_memory(model.memory_attention, model.initial_memory(2), encoded, 4)
    of_first = memories.unflatten(1, (5, 2))[:, :, 0]
    assert not torch.equal(of_first[:, 1], of_first[:, 2])
    assert torch.equal(of_first[:, 2], of_first[:, 3])
    assert torch.equal(of_first[:, 2], of_first[:, 4])


@pytest.mark.parametrize("reads", ["memory", "history"])
def test_buckets_change_no_loss_and_no_gradient(
    reads: str, tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """A result that depends on which rows happen to be padded together."""
    model = network(tokenizer)
    outcomes = []
    for num_buckets in (1, 4):
        batch = whole_dialogues([dialogue(0, 4), dialogue(1, 3)], turns, num_buckets=num_buckets)
        if reads == "memory":
            answers = unrolled(model, batch)
        else:
            encoded = encode_turns(model.encoder, batch)
            answers = answer_with_history(model.decoder, batch, encoded)
        loss = total_loss(answers)
        model.zero_grad()
        loss.backward()
        gradients = [item.grad.clone() for item in model.parameters() if item.grad is not None]
        outcomes.append((loss.detach(), gradients))
    (loss_1, gradients_1), (loss_4, gradients_4) = outcomes
    torch.testing.assert_close(loss_1, loss_4, atol=1e-6, rtol=0)
    for one, four in zip(gradients_1, gradients_4, strict=True):
        torch.testing.assert_close(one, four, atol=1e-5, rtol=1e-4)


def test_the_ids_under_padding_are_never_read(tokenizer: Tokenizer, turns: TurnEncoder) -> None:
    """A mask that is forgotten somewhere, which a constant [PAD] would hide."""
    model = network(tokenizer)
    batch = whole_dialogues([dialogue(0, 3), dialogue(1, 2)], turns, num_buckets=1)

    def littered(rows: Any) -> Any:
        noise = torch.randint_like(rows.ids, 11, tokenizer.vocab_size)
        return rows._replace(ids=torch.where(rows.mask, rows.ids, noise))

    other = batch._replace(
        encode=tuple(map(littered, batch.encode)), answer=tuple(map(littered, batch.answer))
    )
    assert not torch.equal(batch.encode[0].ids, other.encode[0].ids)
    for one, two in zip(unrolled(model, batch), unrolled(model, other), strict=True):
        torch.testing.assert_close(one.logits, two.logits, atol=1e-6, rtol=0)
        assert torch.equal(one.labels, two.labels)


def turn_gradients(
    model: RxTNetwork, batch: DialogueBatch, turn: int, reads: str, cut: int | None = None
) -> list[float]:
    """Return the size of d (loss of the answer of ``turn``) / d (encoder states of each turn)."""
    encoded = encode_turns(model.encoder, batch)
    states = encoded.states.detach().requires_grad_()
    encoded = EncodedTurns(states, encoded.mask)
    if reads == "history":
        answers = answer_with_history(model.decoder, batch, encoded)
    else:
        start = model.initial_memory(1)
        memories = scan_memory(model.memory_attention, start, encoded, batch.num_turns, cut)
        answers = answer_with_memory(model.decoder, batch, memories)
    chosen = [
        torch.nn.functional.cross_entropy(
            item.logits[item.place[item.row] == turn], item.labels[item.place[item.row] == turn]
        )
        for item in answers
        if (item.place == turn).any()
    ]
    (gradient,) = torch.autograd.grad(sum(chosen), states)
    return gradient.abs().amax(dim=(0, 2, 3)).tolist()


def test_the_gradient_reaches_the_first_turn_of_eight(
    tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """Truncated backpropagation: the last answer would teach nothing about the first write."""
    batch = whole_dialogues([dialogue(0, 8)], turns)
    sizes = turn_gradients(network(tokenizer), batch, 7, "memory")
    assert all(size > 0 for size in sizes[:7])
    assert sizes[7] == 0, "an answer may not be read from its own turn"


def test_the_gradient_is_cut_where_the_setting_says(
    tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """A cut that is off by one turn, or that changes the forward result."""
    model = network(tokenizer)
    batch = whole_dialogues([dialogue(0, 8)], turns)
    sizes = turn_gradients(model, batch, 7, "memory", cut=4)
    assert sizes[:4] == [0, 0, 0, 0]
    assert all(size > 0 for size in sizes[4:7])
    encoded = encode_turns(model.encoder, batch)
    start = model.initial_memory(1)
    whole = scan_memory(model.memory_attention, start, encoded, 8)
    assert torch.equal(whole, scan_memory(model.memory_attention, start, encoded, 8, 4))


@pytest.mark.parametrize("turn", [0, 2, 4])
def test_history_never_shows_the_current_or_a_later_turn(
    turn: int, tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """An oracle that reads the answer itself, or forgets an earlier turn."""
    model = network(tokenizer)
    batch = whole_dialogues([dialogue(0, 5)], turns)
    encoded = encode_turns(model.encoder, batch)
    assert encoded.mask.any(dim=1).all()
    if turn == 0:  # nothing to read: no gradient path at all, but finite logits
        answers = answer_with_history(model.decoder, batch, encoded)
        assert all(item.logits.isfinite().all() for item in answers)
    sizes = turn_gradients(model, batch, turn, "history")
    assert all(size > 0 for size in sizes[:turn])
    assert sizes[turn:] == [0] * (5 - turn)


def test_history_is_of_the_own_dialogue(tokenizer: Tokenizer, turns: TurnEncoder) -> None:
    """Rows that read the turns of their neighbour in the batch."""
    model = network(tokenizer)
    together = [dialogue(0, 3), dialogue(1, 4)]
    batch = whole_dialogues(together, turns)
    encoded = encode_turns(model.encoder, batch)
    found = logits_by_row(answer_with_history(model.decoder, batch, encoded))
    for b, item in enumerate(together):
        single = whole_dialogues([item], turns)
        encoded = encode_turns(model.encoder, single)
        wanted = logits_by_row(answer_with_history(model.decoder, single, encoded))
        for n, logits in wanted.items():
            torch.testing.assert_close(found[n * 2 + b], logits, atol=2e-5, rtol=0)


def test_memory_of_another_conversation_gives_other_answers(
    tokenizer: Tokenizer, turns: TurnEncoder
) -> None:
    """A decoder that ignores memory, for which every equality above would hold."""
    model = network(tokenizer)
    last = Interaction("what is it?", "it is blue.")
    answers = []
    for index in (0, 1):
        told = dialogue(index, 1).interactions
        batch = whole_dialogues([Conversation((*told, last))], turns, num_buckets=1)
        answers.append(logits_by_row(unrolled(model, batch))[1])
    assert (answers[0] - answers[1]).abs().max() > 1e-4


def test_a_row_is_exact_only_if_every_token_is() -> None:
    """An accuracy that counts tokens, or gives one row the mistakes of another."""
    labels = torch.tensor([1, 2, 3, 0, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 0, 0, 1]), 4).float()
    answers = Answers(
        logits=logits,
        labels=labels,
        row=torch.tensor([0, 0, 1, 1, 2]),
        group=torch.zeros(3, dtype=torch.long),
        place=torch.arange(3),
    )
    assert exact_rows(answers).tolist() == [True, False, True]
