"""Whether a memory is used: is it written, are its slots kept apart, is it read, does it help?

Measured at a validation on a few held-out dialogues, from memories written by the reference turns:

    write_size     rms of how much a slot changes in a turn; over layers, slots and existing turns
    slot_cosine    mean cosine between two different slots of a layer, after the last turn; near 1
                   all slots hold the same
    read_entropy   entropy of the decoder's attention over the slots / log(S); over layers, heads
                   and tokens; 1 = reads all slots alike, 0 = always a single slot
    loss_zeroed    loss of the same answers when every slot reads as zeros (and a decoder that
                   carries a state starts from none)
    memory_gain    loss_zeroed - loss on the same answers; near 0 the memory is of no use
    loss_turn_<n>  loss of the answers of turn n, counted from 1; probes are left out
    loss_<kind>    loss of the answers of a kind (chat, recall, unknown, probe)

Losses are cross-entropies in nats, means over target tokens. Not here: accuracies under controls
(:mod:`rxlm.evaluation`).

Shapes: L layers, B dialogues, N turns, R rows, T tokens, S slots, D width, H query heads, G
key/value heads, K head dimension.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rxlm.nn.attention import Attention, KeyValue
from rxlm.rxt.components import RxTDecoder
from rxlm.rxt.dialogues import GROUPS, DialogueBatch
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import (
    Answers,
    EncodedTurns,
    answer_rows,
    decode_turns,
    encode_turns,
    memory_reader,
    scan_memory,
)

_PROBE = GROUPS.index("probe")


@torch.no_grad()
def memory_use(model: ReactiveModel, batch: DialogueBatch) -> dict[str, float]:
    """Return the measures of this module.

    Args:
        model: in evaluation mode.
        batch: on the model's device; at least one answer.
    """
    decoder, count = model.decoder, batch.num_dialogues
    encoded = encode_turns(model.encoder, batch)
    initial = model.initial_memory(count, seed=batch.memory_seed)
    memories = scan_memory(model.memory_attention, initial, encoded, batch.num_turns)
    carried = None
    if decoder.carries_state:
        carried = decode_turns(decoder, batch, memory_reader(memories)).carried
    answers, zeroed = [], []
    entropy = ReadEntropy()
    for rows in batch.answer:
        slots = memories[:, rows.place]
        own = None if carried is None else carried.select(rows.place)
        with entropy.of(decoder, rows.mask[:, :-1]):
            answers.append(answer_rows(decoder, rows, slots, carried=own))
        zeroed.append(answer_rows(decoder, rows, torch.zeros_like(slots)))
    loss, without = mean_loss(answers), mean_loss(zeroed)
    measures = {**write_measures(memories, encoded, count), **entropy.result()}
    measures |= {"loss_zeroed": without, "memory_gain": without - loss}
    return {**measures, **loss_by_turn(answers, count), **loss_by_kind(answers)}


def write_measures(memories: Tensor, encoded: EncodedTurns, batch_size: int) -> dict[str, float]:
    """Return ``write_size`` and ``slot_cosine``.

    Args:
        memories: before each turn and after the last, ``[L, (N + 1) * B, S, D]``.
        encoded: the turns; those that do not exist are masked.
        batch_size: B.
    """
    change = (memories[:, batch_size:] - memories[:, :-batch_size]).float()
    exists = encoded.mask.any(dim=1)
    last = nn.functional.normalize(memories[:, -batch_size:].float(), dim=-1)
    size = last.shape[2]
    measures = {"write_size": float(change[:, exists].square().mean().sqrt())}
    if size > 1:
        # The sum of all pairs at once: |sum of unit vectors|^2 holds each pair twice, and S ones.
        lengths = last.square().sum(dim=(-1, -2))
        pairs = (last.sum(dim=2).square().sum(dim=-1) - lengths) / (size * (size - 1))
        measures["slot_cosine"] = float(pairs.mean())
    return measures


class ReadEntropy:
    """Collects the entropy of what cross-attention layers look at."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    @contextlib.contextmanager
    def of(self, decoder: RxTDecoder, token_mask: Tensor) -> Iterator[None]:
        """Listen to a decoder for the time of a block.

        Args:
            decoder: whose layers read the memory.
            token_mask: bool ``[R, T]``: which of the tokens count.
        """

        def listen(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(attention, Attention)
            x, memory, mask, phases = arguments
            weights = attention_weights(attention, x, memory, mask, phases)
            if weights.shape[-1] < 2:
                return
            each = torch.special.entr(weights).sum(dim=-1) / math.log(weights.shape[-1])
            counts = token_mask[:, None].expand_as(each)
            self._sum += float(each[counts].sum())
            self._weight += float(counts.sum())

        handles = [
            layer.cross_attention.register_forward_pre_hook(listen)
            for layer in decoder.all_layers
            if layer.reads_memory
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, float]:
        """Return ``read_entropy``; nothing if no layer read a memory of two or more slots."""
        return {"read_entropy": self._sum / self._weight} if self._weight else {}


def attention_weights(
    attention: Attention,
    x: Tensor,
    key_value: KeyValue,
    mask: Tensor | None,
    phases: Tensor | None,
) -> Tensor:
    """Return what :class:`~rxlm.nn.attention.Attention` gives each key, fp32 ``[B, H', T, P]``.

    Arguments are those of its ``forward``; H' is the larger of its head counts.
    """
    query = attention.project_queries(x, phases).float()
    key = key_value.key.float()
    num_queries, num_keys = query.shape[2], key.shape[2]
    query = query.repeat_interleave(max(1, num_keys // num_queries), dim=2)
    key = key.repeat_interleave(max(1, num_queries // num_keys), dim=2)
    scores = torch.einsum("bthk,bphk->bhtp", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def mean_loss(answers: Sequence[Answers]) -> float:
    """Return the mean cross-entropy over all target tokens."""
    losses, _ = _token_losses(answers)
    return float(losses.mean())


def loss_by_turn(answers: Sequence[Answers], batch_size: int) -> dict[str, float]:
    """Return ``loss_turn_<n>`` of the turns that were answered, probes left out.

    Args:
        answers: their ``place`` is ``n * B + b``.
        batch_size: B.
    """
    losses, owners = _token_losses(answers)
    turn = torch.where(owners["group"] == _PROBE, -1, owners["place"] // batch_size)
    return {
        f"loss_turn_{number + 1}": float(losses[turn == number].mean())
        for number in turn.unique().tolist()
        if number >= 0
    }


def loss_by_kind(answers: Sequence[Answers]) -> dict[str, float]:
    """Return ``loss_<kind>`` of the kinds of answers that there are."""
    losses, owners = _token_losses(answers)
    group = owners["group"]
    return {
        f"loss_{GROUPS[index]}": float(losses[group == index].mean())
        for index in group.unique().tolist()
    }


def _token_losses(answers: Sequence[Answers]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the loss of every target token ``[M]``, and place and group of its row ``[M]``."""
    losses = [
        nn.functional.cross_entropy(item.logits.float(), item.labels, reduction="none")
        for item in answers
    ]
    owners = {
        name: torch.cat([getattr(item, name)[item.row] for item in answers])
        for name in ("place", "group")
    }
    return torch.cat(losses), owners
