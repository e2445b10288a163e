"""Run a batch of dialogues through a model: encode all turns, scan the memory, answer all turns.

The encoder does not depend on memory, so the turns of all dialogues are encoded in one batch. The
memory is then scanned turn by turn (small tensors), and with the memory before every turn at hand
all answers are predicted in one batch. A decoder that carries a state reads every turn
(:func:`decode_turns`), also in one batch but for the states, which follow one another. Gradients
flow through the whole scan; the one setting that cuts them is ``backprop_turns``.
``checkpoint_turns`` changes no number: what happens inside a turn is then not kept for the backward
pass but computed again, so that long windows fit into memory.

Shapes: L layers, B dialogues, N turns, R rows, T tokens, S slots, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.data.length_buckets import length_buckets
from rxlm.memory.attention import MemoryAttention
from rxlm.nn.attention import KeyValue
from rxlm.nn.checkpointing import recompute
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.nn.turn_layout import CHUNK_SIZE, TurnLayout
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.dialogues import GROUPS, DialogueBatch, Rows

Reader = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Flat memories, int64 ``[R]`` -> what those rows read: slots ``[L, R, S, D]`` and a slot mask bool
``[R, S]`` or None."""


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


class DecodedTurns(NamedTuple):
    """Every turn of a batch, read in order by a decoder that carries a state.

    ``hidden``: ``[X, D]``, all tokens and some padding; ``start``: int64 ``[N * B]``, where in it
    each flat turn begins; ``carried``: what stood before each turn and after the last, states
    ``[R, (N + 1) * B, HV, K, V]``, flat index as of the memories.
    """

    hidden: Tensor
    start: Tensor
    carried: CarriedState


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
    checkpoint_turns: bool = False,
) -> Tensor:
    """Write all turns into memory, one after the other.

    Args:
        memory_attention: the writer.
        slots: initial memory ``[L, B, S, D]``.
        encoded: from :func:`encode_turns`.
        num_turns: N.
        backprop_turns: cut the gradient after this many writes; None = never.
        checkpoint_turns: see the module.

    Returns:
        the memory before each turn and after the last, ``[L, (N + 1) * B, S, D]``, flat index
        ``m * B + b`` after m writes.
    """
    key_value = memory_attention.project_real(encoded.states, encoded.mask)
    num_layers, batch_size = slots.shape[0], slots.shape[1]
    # One split for all turns: the backward pass of a slice fills all turns with zeros.
    keys = key_value.key.unflatten(0, (num_layers, num_turns, batch_size)).unbind(1)
    values = key_value.value.unflatten(0, (num_layers, num_turns, batch_size)).unbind(1)
    masks = encoded.mask.unflatten(0, (num_turns, batch_size))
    history = [slots]
    for turn in range(num_turns):
        if backprop_turns is not None and turn and turn % backprop_turns == 0:
            slots = slots.detach()
        written = KeyValue(keys[turn].flatten(0, 1), values[turn].flatten(0, 1))
        if checkpoint_turns:
            slots = recompute(memory_attention.write, slots, written, masks[turn])
        else:
            slots = memory_attention.write(slots, written, masks[turn])
        history.append(slots)
    return torch.cat(history, dim=1)


def decode_turns(
    decoder: RxTDecoder,
    batch: DialogueBatch,
    read: Reader,
    backprop_turns: int | None = None,
    checkpoint_turns: bool = False,
) -> DecodedTurns:
    """Let a decoder that carries a state read all turns.

    Args:
        decoder: one with ``carries_state``.
        batch: its ``encode`` rows are the turns.
        read: what the decoder reads at each flat turn.
        backprop_turns: cut the gradient of the carried state as :func:`scan_memory` cuts that of
            the memory; None = never.
        checkpoint_turns: see the module.
    """
    lengths = _turn_lengths(batch)
    groups = _dialogues_alike(lengths)
    layouts = [TurnLayout.of_lengths(lengths[:, group]) for group in groups]
    flat = torch.arange(lengths.numel(), device=lengths.device).view_as(lengths)
    start = torch.zeros_like(flat)
    total = 0
    for group, layout in zip(groups, layouts, strict=True):
        own = torch.arange(layout.lengths.numel(), device=lengths.device)
        start[:, group] = layout.index_of(own, torch.zeros_like(own)).view(-1, len(group)) + total
        total += layout.mask.numel()
    ids = lengths.new_zeros(total)
    for rows in batch.encode:
        row, position = rows.mask.nonzero(as_tuple=True)
        ids[start.flatten()[rows.place[row]] + position] = rows.ids[row, position]

    def decode(
        ids: Tensor, layout: TurnLayout, slots: Tensor, slot_mask: Tensor | None
    ) -> tuple[Tensor, CarriedState]:
        return decoder.forward_turns(
            ids,
            layout,
            memory=decoder.read_memory(slots, slot_mask),
            backprop_turns=backprop_turns,
        )

    hidden: list[Tensor] = []
    carried: list[CarriedState] = []
    pieces = ids.split([layout.mask.numel() for layout in layouts])
    for group, layout, piece in zip(groups, layouts, pieces, strict=True):
        given = (piece.view_as(layout.mask), layout, *read(flat[:, group].flatten()))
        part, state = recompute(decode, *given) if checkpoint_turns else decode(*given)
        hidden.append(part.flatten(0, 1))
        carried.append(state)
    return DecodedTurns(torch.cat(hidden), start.flatten(), _in_order(carried, groups))


_MOST_GROUPS = 3
_WORTH_A_GROUP = 0.8


def _dialogues_alike(lengths: Tensor) -> list[Tensor]:
    """Share out dialogues, whose turns have ``lengths`` ``[N, B]``, into groups to be decoded.

    A dialogue is padded to the longest of its group. One group, unless several save a fifth of all
    tokens: each costs a scan of its own.
    """
    chunks = ((lengths + CHUNK_SIZE - 1) // CHUNK_SIZE).sum(dim=0)
    # Dialogues without a turn go with the shortest one: a group needs a token.
    sizes = chunks.clamp(min=int(chunks[chunks > 0].min())).tolist()
    groups = length_buckets(range(len(sizes)), _MOST_GROUPS, sizes.__getitem__)
    padded = sum(len(group) * sizes[group[-1]] for group in groups)
    if padded > _WORTH_A_GROUP * len(sizes) * max(sizes):
        groups = [list(range(len(sizes)))]
    return [torch.tensor(group, device=lengths.device) for group in groups]


def _in_order(parts: list[CarriedState], groups: list[Tensor]) -> CarriedState:
    """Join what the groups carry, ``[R, (N + 1) * Bk, ...]``, in the order of all dialogues."""
    if len(parts) == 1:
        return parts[0]
    back = torch.cat(groups).argsort()
    sizes = [(-1, len(group)) for group in groups]
    states = [part.states.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]
    started = [part.started.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]
    return CarriedState(
        torch.cat(states, dim=2).index_select(2, back).flatten(1, 2),
        torch.cat(started, dim=1).index_select(1, back).flatten(),
    )


def _turn_lengths(batch: DialogueBatch) -> Tensor:
    """Return the tokens of every turn, int64 ``[N, B]``."""
    lengths = torch.zeros(
        batch.num_turns * batch.num_dialogues, dtype=torch.long, device=batch.encode[0].ids.device
    )
    for rows in batch.encode:
        lengths[rows.place] = rows.mask.sum(dim=1)
    return lengths.unflatten(0, (batch.num_turns, batch.num_dialogues))


def answer_rows(
    decoder: RxTDecoder,
    rows: Rows,
    slots: Tensor,
    slot_mask: Tensor | None = None,
    carried: CarriedState | None = None,
) -> Answers:
    """Predict the target tokens of one bucket.

    Args:
        decoder: the reader.
        rows: a bucket of ``DialogueBatch.answer``.
        slots: what each row reads, ``[L, R, S, D]``.
        slot_mask: bool ``[R, S]``; None = all slots.
        carried: what each row starts from, if the decoder carries a state; None = nothing.
    """
    reading = decoder.read_memory(slots, slot_mask)
    hidden, _ = decoder(rows.ids[:, :-1], rows.mask[:, :-1], memory=reading, carried=carried)
    row, position = rows.targets[:, 1:].nonzero(as_tuple=True)
    # Scoring the vocabulary is the largest product of a small model: only where it is needed.
    return _answers(rows, decoder.logits(hidden[row, position]), row, position)


def _answers(rows: Rows, logits: Tensor, row: Tensor, position: Tensor) -> Answers:
    labels = rows.ids[row, position + 1]
    return Answers(logits, labels, row, rows.group, rows.place)


def answer_with_memory(
    decoder: RxTDecoder,
    batch: DialogueBatch,
    memories: Tensor,
    backprop_turns: int | None = None,
    checkpoint_turns: bool = False,
) -> list[Answers]:
    """Answer every row from the memory ``[L, (N + 1) * B, S, D]`` that it names.

    A decoder that carries a state reads the turns in order; ``backprop_turns`` and
    ``checkpoint_turns`` are those of :func:`decode_turns`.
    """
    read = memory_reader(memories)
    return _answer_all(decoder, batch, read, backprop_turns, checkpoint_turns)


def memory_reader(memories: Tensor) -> Reader:
    """Return what reads each row's own memory of ``[L, (N + 1) * B, S, D]``."""
    return lambda places: (memories[:, places], None)


def _answer_all(
    decoder: RxTDecoder,
    batch: DialogueBatch,
    read: Reader,
    backprop_turns: int | None,
    checkpoint_turns: bool,
) -> list[Answers]:
    if not batch.answer:
        return []
    if not decoder.carries_state:
        return [answer_rows(decoder, rows, *read(rows.place)) for rows in batch.answer]
    decoded = decode_turns(decoder, batch, read, backprop_turns, checkpoint_turns)
    return [_answer_in_order(decoder, rows, read, decoded) for rows in batch.answer]


def _answer_in_order(
    decoder: RxTDecoder, rows: Rows, read: Reader, decoded: DecodedTurns
) -> Answers:
    """Predict the targets of one bucket: turns have been decoded, probes are asked now."""
    row, position = rows.targets[:, 1:].nonzero(as_tuple=True)
    is_probe = rows.group == GROUPS.index("probe")
    told = ~is_probe[row]
    told_row, told_position = row[told], position[told]
    hidden = decoded.hidden[decoded.start[rows.place[told_row]] + told_position]
    answers = _answers(rows, decoder.logits(hidden), told_row, told_position)
    (probes,) = is_probe.nonzero(as_tuple=True)
    if not len(probes):
        return answers
    asked_rows = Rows(*(part[probes] for part in rows))
    carried = decoded.carried.select(asked_rows.place)
    asked = answer_rows(decoder, asked_rows, *read(asked_rows.place), carried=carried)
    return answers._replace(
        logits=torch.cat((answers.logits, asked.logits)),
        labels=torch.cat((answers.labels, asked.labels)),
        row=torch.cat((answers.row, probes[asked.row])),
    )


def answer_with_history(
    decoder: RxTDecoder,
    batch: DialogueBatch,
    encoded: EncodedTurns,
    backprop_turns: int | None = None,
    checkpoint_turns: bool = False,
) -> list[Answers]:
    """Answer every row from the raw encoder states of all *earlier* turns of its dialogue.

    This is the oracle that memory must match: nothing is forgotten because nothing is compressed.
    ``backprop_turns`` and ``checkpoint_turns`` are those of :func:`decode_turns`.
    """
    num_turns, batch_size = batch.num_turns, batch.num_dialogues
    mask = encoded.mask.unflatten(0, (num_turns, batch_size))
    states = encoded.states.flatten(1, 2)
    number = torch.arange(encoded.mask.numel(), device=mask.device).view_as(mask)

    def read(places: Tensor) -> tuple[Tensor, Tensor | None]:
        turns, dialogue = places // batch_size, places % batch_size
        earlier = torch.arange(num_turns, device=turns.device) < turns[:, None]
        visible = (mask[:, dialogue].transpose(0, 1) & earlier[..., None]).flatten(1)
        numbers = number[:, dialogue].transpose(0, 1).flatten(1)
        # Padded to the longest turn of all, a history is mostly padding: that is left out.
        count = visible.sum(dim=1)
        most = max(1, int(count.max()))
        front = visible.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = states.index_select(1, numbers.gather(1, front).flatten())
        shown = torch.arange(most, device=turns.device) < count[:, None]
        return chosen.unflatten(1, front.shape), shown

    return _answer_all(decoder, batch, read, backprop_turns, checkpoint_turns)


def exact_rows(answers: Answers) -> Tensor:
    """Return bool ``[R]``: rows whose every target token is the most likely one.

    Given the reference up to each token, this is the same event as greedy decoding producing the
    whole reference answer.
    """
    correct = answers.logits.argmax(dim=-1) == answers.labels
    wrong = torch.zeros(answers.group.shape[0], dtype=torch.long, device=correct.device)
    return wrong.index_add(0, answers.row, (~correct).long()) == 0
