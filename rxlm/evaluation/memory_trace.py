"""What a turn did with the memory: how much each slot was written, which slots each token read.

Everything is computed from values (two memories, the ids of a turn); the model is not changed and
keeps nothing. Not here: how it is shown (``memory_view``).

Shapes: L layers, B conversations, T tokens, S slots, D width, N turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.data.conversations import Interaction
from rxlm.errors import UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization.template import render_parts


class TurnTrace(NamedTuple):
    """One turn of one conversation, seen from the memory.

    ``written``: how much each slot changed, ``[L, S]``, see :func:`slot_changes`; ``read``: how
    much each token that the model said reads each slot, ``[L, A, S]``, mean over heads, or None
    where the decoder does not read by attention; ``tokens``: those A tokens as text, [A] first:
    what is read there decides the first token of the answer; ``query``, ``answer``: what was said.
    """

    query: str
    answer: str
    tokens: list[str]
    written: Tensor
    read: Tensor | None


def slot_changes(before: Tensor, after: Tensor) -> Tensor:
    """Return how much each slot changed: the norm of the change over the larger of the two norms.

    0: not at all; 1: about altogether; up to 2: turned round.

    Args:
        before: ``[..., S, D]``.
        after: likewise.

    Returns:
        ``[..., S]``, fp32.
    """
    before, after = before.float(), after.float()
    larger = torch.maximum(before.norm(dim=-1), after.norm(dim=-1))
    change = (after - before).norm(dim=-1)
    return torch.where(larger > 0, change / larger.clamp(min=1e-30), torch.zeros_like(change))


@torch.no_grad()
def trace_turn(
    model: ReactiveModel,
    before: ConversationState,
    after: ConversationState,
    interaction: Interaction,
) -> TurnTrace:
    """Return what a finished turn did.

    Args:
        model: that held the conversation.
        before: the conversation before the turn, a single one.
        after: after its memory update.
        interaction: what was said.

    Raises:
        UserError: if the states hold several conversations.
    """
    if before.batch_size != 1 or after.batch_size != 1:
        raise UserError(
            f"{before.batch_size} and {after.batch_size} conversations: give states of one."
        )
    tokenizer = model.require_tokenizer()
    turn = render_parts(tokenizer, interaction.parts()).turn
    said = turn.ids[turn.answer_start : -1]
    read = None
    if not model.config.decoder.skip_memory_cross_attention:
        device = model.device
        slots = before.slots.to(device=device, dtype=model.memory_dtype)
        with evaluation_mode(model):
            weights = model.decoder.slot_weights(
                torch.tensor([turn.ids], device=device),
                memory=model.decoder.read_memory(slots),
                carried=None if before.carried is None else before.carried.to(device),
            )
        read = weights[:, 0, turn.answer_start : -1].float().cpu()
    return TurnTrace(
        interaction.query,
        interaction.answer,
        [tokenizer.token_bytes(token).decode("utf-8", "replace") or "[A]" for token in said],
        slot_changes(before.slots[:, 0], after.slots[:, 0]).cpu(),
        read,
    )


def trace_conversation(
    model: ReactiveModel,
    interactions: Sequence[Interaction],
    *,
    system: str | None = None,
    seed: int = 0,
) -> list[TurnTrace]:
    """Return what each turn of a given conversation does, its answers written as they are.

    Args:
        model: with its tokenizer.
        interactions: the turns.
        system: a system prompt, written first.
        seed: of the initial memory.

    Raises:
        UserError: if a turn is longer than the model's ``seq_len``.
    """
    tokenizer, limit = model.require_tokenizer(), turn_limit(model)
    state = model.new_conversation(seed=seed, system=system)
    traces = []
    for number, interaction in enumerate(interactions, start=1):
        ids = render_parts(tokenizer, interaction.parts()).ids
        if len(ids) > limit:
            raise UserError(
                f"turn {number} has {len(ids)} tokens but the model's seq_len is {limit}: shorten "
                "it, or show another conversation."
            )
        after = model.update_memory(state, [ids])
        traces.append(trace_turn(model, state, after, interaction))
        state = after
    return traces


@torch.no_grad()
def write_map(model: ReactiveModel, dialogues: Sequence[Sequence[Interaction]]) -> Tensor:
    """Return the mean write size of each slot at each turn of dialogues of equal length.

    Returns:
        ``[N, L, S]``.
    """
    tokenizer = model.require_tokenizer()
    state = model.new_conversation(len(dialogues))
    changes = []
    for turns in zip(*dialogues, strict=True):
        ids = [render_parts(tokenizer, turn.parts()).ids for turn in turns]
        after = model.update_memory(state, ids)
        changes.append(slot_changes(state.slots, after.slots).mean(dim=1).cpu())
        state = after
    return torch.stack(changes)
