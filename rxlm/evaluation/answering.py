"""Memories of many conversations at once, and greedy answers from them.

Shapes: L layers, B conversations, N turns, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rxlm.data.conversations import Interaction
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.dialogues import DialogueBatch, Row, Rows, TurnEncoder, dialogue_batch
from rxlm.rxt.generation import Answer
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.unroll import decode_turns, encode_turns, memory_reader, scan_memory

Turns = Sequence[Interaction]

NUM_BUCKETS = 4
"""Length buckets when many turns are encoded: less padding, the same result."""


def memory_of_references(
    model: ReactiveModel, turns: TurnEncoder, dialogues: Sequence[Turns], first: int = 0
) -> ConversationState:
    """Write the given turns, reference answers included, into fresh memories.

    Args:
        model: the encoder and the writer.
        turns: turns text into tokens.
        dialogues: B lists of turns of any lengths, also empty ones.
        first: number of the first dialogue; a dialogue starts from the memory of its number's
            seed, so that the batch it is in does not matter.

    Returns:
        the B conversations after each dialogue's last turn.
    """
    count = len(dialogues)
    rows = [
        Row(turns.encode(turn), n * count + b, 0)
        for b, dialogue in enumerate(dialogues)
        for n, turn in enumerate(dialogue)
    ]
    state = start_of(model, count, first)
    if not rows:
        return state
    num_turns = max(len(dialogue) for dialogue in dialogues)
    batch = dialogue_batch(
        rows,
        (),
        num_dialogues=count,
        num_turns=num_turns,
        num_buckets=NUM_BUCKETS,
        pad_id=turns.tokenizer.pad_id,
    )
    batch = move_batch(batch, model.device)
    encoded = encode_turns(model.encoder, batch)
    # A turn that a dialogue does not have leaves its memory as it is.
    memories = scan_memory(model.memory_attention, state.slots, encoded, num_turns)
    carried = None
    if model.decoder.carries_state:
        history = decode_turns(model.decoder, batch, memory_reader(memories)).carried
        carried = history.select(range(num_turns * count, (num_turns + 1) * count))
    return state.replaced(slots=memories[:, -count:], carried=carried)


def start_of(model: ReactiveModel, count: int, first: int = 0) -> ConversationState:
    """Return ``count`` conversations before their first turn, the first with seed ``first``."""
    slots = model.initial_memory(count, seed=first)
    return ConversationState.start(slots, first, model.decoder.nothing_carried(count))


def memory_of_own_answers(
    model: ReactiveModel, dialogues: Sequence[Turns], max_answer_tokens: int, first: int = 0
) -> ConversationState:
    """Hold the conversations: the model answers each query itself, and that is written.

    Args:
        model: the whole model.
        dialogues: B lists of turns; only the queries are used.
        max_answer_tokens: longer answers are cut.
        first: as for :func:`memory_of_references`.

    Returns:
        the B conversations after each dialogue's last turn.
    """
    state = start_of(model, len(dialogues), first)
    for n in range(max((len(dialogue) for dialogue in dialogues), default=0)):
        present = [b for b, dialogue in enumerate(dialogues) if len(dialogue) > n]
        queries = [dialogues[b][n].query for b in present]
        answers = greedy_answers(model, state.select(present), queries, max_answer_tokens)
        turns: list[list[int]] = [[] for _ in dialogues]
        for b, answer in zip(present, answers, strict=True):
            turns[b] = answer.turn
        state = model.update_memory(state, turns)
    return state


def greedy_answers(
    model: ReactiveModel, state: ConversationState, queries: Sequence[str], max_answer_tokens: int
) -> list[Answer]:
    """Answer a batch of queries, each token the most likely one.

    Args:
        model: the decoder and the tokenizer.
        state: the B conversations; not changed.
        queries: B texts.
        max_answer_tokens: longer answers are cut.
    """
    generated = model.generate(
        state,
        queries,
        SamplingSettings(temperature=0.0),
        max_new_tokens=max_answer_tokens,
    )
    return generated.answers


def move_batch(batch: DialogueBatch, device: torch.device) -> DialogueBatch:
    """Return the batch with its tensors on ``device``."""

    def moved(buckets: tuple[Rows, ...]) -> tuple[Rows, ...]:
        return tuple(Rows(*(tensor.to(device) for tensor in rows)) for rows in buckets)

    return batch._replace(encode=moved(batch.encode), answer=moved(batch.answer))
