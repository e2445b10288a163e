"""Run a batch of dialogues through a model: encode all turns, scan the memory, answer all turns.

The encoder does not depend on memory, so the turns of all dialogues are encoded in one batch. The
memory is then scanned turn by turn (small tensors), and with the memory before every turn at hand
all answers are predicted in one batch. Gradients flow through the whole scan; the one place where
they may be cut is ``backprop_turns`` of :func:`scan_memory`.

Shapes: L layers, B dialogues, N turns, R rows, T tokens, S slots, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.memory.attention import MemoryAttention
from rxlm.nn.attention import KeyValue
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.dialogues import DialogueBatch, Rows


class EncodedTurns(NamedTuple):
    """Encoder states of every turn: ``states`` ``[L, N * B, T, D]`` (flat turn ``n * B + b``),
    ``mask`` bool ``[N * B, T]``; turns that do not exist are all False."""

    states: Tensor
    mask: Tensor


class Answers(NamedTuple):
    """Predictions at the target tokens of one bucket: ``logits`` ``[M, V]``, ``labels`` ``[M]``,
    ``row`` ``[M]`` (row of the bucket) and the bucket's ``group`` ``[R]``, ``place`` ``[R]``."""

    logits: Tensor
    labels: Tensor
    row: Tensor
    group: Tensor
    place: Tensor


def encode_turns(encoder: RxTEncoder, batch: DialogueBatch) -> EncodedTurns:
    """Encode every turn of the batch."""
    longest = max(rows.ids.shape[1] for rows in batch.encode)
    num_flat = batch.num_turns * batch.num_dialogues
    states: Tensor | None = None
    mask = torch.zeros(num_flat, longest, dtype=torch.bool, device=batch.encode[0].ids.device)
    for rows in batch.encode:
        encoded = encoder(rows.ids, rows.mask)
        if states is None:
            shape = (encoded.shape[0], num_flat, longest, encoded.shape[-1])
            states = encoded.new_zeros(shape)
        length = rows.ids.shape[1]
        padded = torch.nn.functional.pad(encoded, (0, 0, 0, longest - length))
        states = states.index_copy(1, rows.place, padded)
        mask[rows.place, :length] = rows.mask
    assert states is not None
    return EncodedTurns(states, mask)


def scan_memory(
    memory_attention: MemoryAttention,
    slots: Tensor,
    encoded: EncodedTurns,
    num_turns: int,
    backprop_turns: int | None = None,
) -> Tensor:
    """Write all turns into memory, one after the other.

    Args:
        memory_attention: the writer.
        slots: initial memory ``[L, B, S, D]``.
        encoded: from :func:`encode_turns`.
        num_turns: N.
        backprop_turns: cut the gradient after this many writes; None = never. This is the only
            truncation of backpropagation in the package.

    Returns:
        the memory before each turn and after the last, ``[L, (N + 1) * B, S, D]``, flat index
        ``m * B + b`` after m writes.
    """
    key_value = memory_attention.project(encoded.states, encoded.mask)
    num_layers, batch_size = slots.shape[0], slots.shape[1]
    keys = key_value.key.unflatten(0, (num_layers, num_turns, batch_size))
    values = key_value.value.unflatten(0, (num_layers, num_turns, batch_size))
    masks = encoded.mask.unflatten(0, (num_turns, batch_size))
    history = [slots]
    for turn in range(num_turns):
        if backprop_turns is not None and turn and turn % backprop_turns == 0:
            slots = slots.detach()
        written = KeyValue(keys[:, turn].flatten(0, 1), values[:, turn].flatten(0, 1))
        slots = memory_attention.write(slots, written, masks[turn])
        history.append(slots)
    return torch.cat(history, dim=1)


def answer_rows(
    decoder: RxTDecoder, rows: Rows, slots: Tensor, slot_mask: Tensor | None = None
) -> Answers:
    """Predict the target tokens of one bucket.

    Args:
        decoder: the reader.
        rows: a bucket of ``DialogueBatch.answer``.
        slots: what each row reads, ``[L, R, S, D]``.
        slot_mask: bool ``[R, S]``; None = all slots.
    """
    reading = decoder.read_memory(slots, slot_mask)
    hidden, _ = decoder(rows.ids[:, :-1], rows.mask[:, :-1], memory=reading)
    row, position = rows.targets[:, 1:].nonzero(as_tuple=True)
    # Scoring the vocabulary is the largest product of a small model: only where it is needed.
    return Answers(
        logits=decoder.logits(hidden[row, position]),
        labels=rows.ids[row, position + 1],
        row=row,
        group=rows.group,
        place=rows.place,
    )


def answer_with_memory(
    decoder: RxTDecoder, batch: DialogueBatch, memories: Tensor
) -> list[Answers]:
    """Answer every row from the memory ``[L, (N + 1) * B, S, D]`` that it names."""
    return [answer_rows(decoder, rows, memories[:, rows.place]) for rows in batch.answer]


def answer_with_history(
    decoder: RxTDecoder, batch: DialogueBatch, encoded: EncodedTurns
) -> list[Answers]:
    """Answer every row from the raw encoder states of all *earlier* turns of its dialogue.

    This is the oracle that memory must match: nothing is forgotten because nothing is compressed.
    """
    num_turns, batch_size = batch.num_turns, batch.num_dialogues
    states = encoded.states.unflatten(1, (num_turns, batch_size))
    mask = encoded.mask.unflatten(0, (num_turns, batch_size))
    answers = []
    for rows in batch.answer:
        turns, dialogue = rows.place // batch_size, rows.place % batch_size
        slots = states[:, :, dialogue].transpose(1, 2).flatten(2, 3)
        earlier = torch.arange(num_turns, device=turns.device) < turns[:, None]
        visible = mask[:, dialogue].transpose(0, 1) & earlier[..., None]
        answers.append(answer_rows(decoder, rows, slots, visible.flatten(1, 2)))
    return answers


def exact_rows(answers: Answers) -> Tensor:
    """Return bool ``[R]``: rows whose every target token is the most likely one.

    Given the reference up to each token, this is the same event as greedy decoding producing the
    whole reference answer.
    """
    correct = answers.logits.argmax(dim=-1) == answers.labels
    wrong = torch.zeros(answers.group.shape[0], dtype=torch.long, device=correct.device)
    return wrong.index_add(0, answers.row, (~correct).long()) == 0
