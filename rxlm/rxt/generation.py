"""Answering turns token by token, for any number of conversations at once.

One code path: a single conversation is a batch of one. Memory is read here and never written (see
:mod:`rxlm.rxt.reactive`), text does not occur (see :mod:`rxlm.rxt.alpha`).

Shapes: B conversations, T tokens of the longest prompt, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import check_ids, padded
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.answer_row import Answer, AnswerRow, choose_tokens, rows_by_settings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.decode_compile import check_compiler
from rxlm.rxt.decode_step import DecodeStep
from rxlm.rxt.model import RxTNetwork

__all__ = [
    "Answer",
    "AnswerLimits",
    "AnswerStream",
    "answer_room",
    "answer_row",
    "opened_prompt",
    "turn_limit",
    "with_answer_token",
]


class AnswerLimits(NamedTuple):
    """How long an answer may get.

    ``max_seq_len``: tokens of the whole turn, from [BOS] to [EOS] (None: the model's ``seq_len``,
    which also caps it); ``max_new_tokens``: tokens of the answer without [EOS] (None: as many as
    fit).
    """

    max_seq_len: int | None = None
    max_new_tokens: int | None = None


class AnswerStream:
    """Answers that are being written: iterate for one token a row and step.

    Each step gives a list with one id a row: [EOS] when the model ends its answer, None for rows
    that have ended (an answer cut by length ends without an id). Each step is computed when it is
    asked for, without gradients and in evaluation mode; between steps nothing of that is active.
    """

    def __init__(
        self,
        network: RxTNetwork,
        state: ConversationState,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        limits: AnswerLimits = AnswerLimits(),  # noqa: B008 (an immutable value)
        form: AnswerForm | None = None,
        *,
        compile_decode: bool = False,
    ) -> None:
        """Check the prompts; nothing is computed yet.

        Args:
            network: the model.
            state: one conversation a prompt; left unchanged.
            prompts: the ids of each row's query, ``[BOS] [Q] query``; what opens the answer is
                added if missing.
            settings: how tokens are chosen, for all rows or one a row.
            limits: where answers are cut.
            form: how a model that thinks begins and goes on; None: it answers after [A].
            compile_decode: run the steps after the prompt compiled (:mod:`rxlm.rxt.decode_step`).

        Raises:
            UserError: if the numbers of prompts, settings and conversations differ, or a prompt is
                empty, holds ids outside the vocabulary, or leaves no room for an answer; if steps
                should be compiled and there is no compiler.
        """
        if compile_decode:
            check_compiler(network.device)
        if len(prompts) != state.batch_size:
            raise UserError(
                f"{len(prompts)} prompts for {state.batch_size} conversations: give one each."
            )
        self.network = network
        self._settings_groups = rows_by_settings(settings, len(prompts))
        chosen = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
        ids = network.config.tokenizer
        self._pad_id = ids.pad_token_id
        self._rows = [
            answer_row(network, prompt, limits, form, one, seed, draws)
            for prompt, one, seed, draws in zip(
                prompts, chosen, state.seeds, state.draws, strict=True
            )
        ]
        self._start = state
        self._pending: list[int | None] | None = None
        self._compiled = compile_decode
        self._step: DecodeStep | None = None
        self._parts = tuple(network.modules())

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(row.reason is not None for row in self._rows)

    @property
    def state(self) -> ConversationState:
        """The conversations with the draws made so far; their memory is that before the turn."""
        return self._start.replaced(draws=tuple(row.draws for row in self._rows))

    @property
    def num_tokens(self) -> int:
        """Number of tokens chosen so far, over all rows, [EOS] included."""
        return sum(row.draws for row in self._rows) - sum(self._start.draws)

    @property
    def ended(self) -> tuple[bool, ...]:
        """Which answers have ended, one value a row."""
        return tuple(row.reason is not None for row in self._rows)

    def stop(self, rows: Collection[int] | None = None) -> None:
        """End the answers of ``rows`` (None: all) that have not ended; the others go on."""
        for index, row in enumerate(self._rows):
            if row.reason is None and (rows is None or index in rows):
                row.reason = "stopped"

    def answers(self) -> list[Answer]:
        """Return the answers as they are; those that have not ended count as 'stopped'."""
        return [row.answer() for row in self._rows]

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        if self.done:
            raise StopIteration
        chosen = self._choose(self._next_logits())
        step = [
            row.take(token) if row.reason is None else None
            for row, token in zip(self._rows, chosen, strict=True)
        ]
        self._pending = step
        if all(token is None for token in step):
            raise StopIteration
        return step

    @torch.inference_mode()
    def _next_logits(self) -> Tensor:
        with evaluation_mode(self.network, self._parts):
            if self._step is None or self._pending is None:
                return self._prefill()
            rows = [
                None if row.reason is not None else token
                for token, row in zip(self._pending, self._rows, strict=True)
            ]
            return self._step(rows)

    def _prefill(self) -> Tensor:
        decoder, start = self.network.decoder, self._start
        device = self.network.device
        slots = start.slots.to(device=device, dtype=self.network.memory_dtype)
        memory = decoder.read_memory(slots)
        ids, mask = padded([row.prompt for row in self._rows], self._pad_id)
        hidden, cache = decoder(
            ids.to(device),
            mask.to(device),
            memory=memory,
            # Only the first tokens of a turn start from the turns before.
            carried=None if start.carried is None else start.carried.to(device),
        )
        room = max(row.room for row in self._rows)
        self._step = DecodeStep(decoder, memory, cache, room, compiled=self._compiled)
        rows = torch.arange(len(self._rows), device=device)
        return decoder.logits(hidden[rows, mask.sum(dim=1).to(device) - 1])

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> list[int]:
        return choose_tokens(logits, self._rows, self._settings_groups)


def turn_limit(network: RxTNetwork, max_seq_len: int | None = None) -> int:
    """Return how many tokens a turn may have, ``max_seq_len`` or what the model allows.

    Raises:
        UserError: if ``max_seq_len`` is not positive.
    """
    config = network.config
    limit = min(config.decoder.seq_len, config.encoder.seq_len, config.memory_attention.seq_len)
    if max_seq_len is None:
        return limit
    if max_seq_len < 1:
        raise UserError(f"max_seq_len={max_seq_len} must be positive: use up to {limit}.")
    return min(limit, max_seq_len)


def answer_row(
    network: RxTNetwork,
    prompt: Sequence[int],
    limits: AnswerLimits,
    form: AnswerForm | None,
    settings: SamplingSettings,
    seed: int,
    draws: int,
) -> AnswerRow:
    """Return an answer that has not begun.

    Args:
        network: the model.
        prompt: ``[BOS] [Q] query``; what opens the answer is added if missing.
        limits: where it is cut.
        form: how a model that thinks begins and goes on; None: it answers after [A].
        settings: how tokens are chosen.
        seed: of the conversation's draws.
        draws: how many it has made.

    Raises:
        UserError: if the prompt is empty, holds ids outside the vocabulary, or leaves no room.
    """
    ids = network.config.tokenizer
    opened = opened_prompt(prompt, ids.answer_token_id, form)
    room = answer_room(network, opened, limits, form)
    last = None if form is None else form.opening_of(opened)
    return AnswerRow(opened, room, settings, seed, draws, ids.eos_token_id, form, last)


def with_answer_token(prompt: Sequence[int], answer_id: int) -> list[int]:
    """Return ``prompt`` ending in [A]."""
    ids = list(prompt)
    return ids if ids and ids[-1] == answer_id else [*ids, answer_id]


def opened_prompt(prompt: Sequence[int], answer_id: int, form: AnswerForm | None) -> list[int]:
    """Return ``prompt`` with what opens the answer: [A], or as ``form`` has it."""
    return with_answer_token(prompt, answer_id) if form is None else form.opened(prompt)


def answer_room(
    network: RxTNetwork, prompt: list[int], limits: AnswerLimits, form: AnswerForm | None = None
) -> int:
    """Return how many tokens may stand between ``prompt`` and [EOS].

    ``prompt`` ends in what opens the answer, unless the model chooses that itself; the one that it
    chooses needs a place as well.

    Raises:
        UserError: if there is no room for any, or the prompt is empty or of another vocabulary.
    """
    if len(prompt) < 2:
        raise UserError("a prompt is empty: give the ids of a query, '[BOS] [Q] query'.")
    check_ids(prompt, network.config.decoder.vocab_size, "a prompt")
    if form is not None and form.opening_of(prompt) is None:
        return answer_room(network, [*prompt, form.answer_id], limits) + 1
    limit = turn_limit(network, limits.max_seq_len)
    room = limit - len(prompt) - 1
    if room < 1:
        name = "max_seq_len" if limit == limits.max_seq_len else "the model's seq_len"
        raise UserError(
            f"the query has {len(prompt) - 1} tokens; with [A], one answer token and [EOS] the "
            f"turn needs {len(prompt) + 2}, but {name} is {limit}: shorten the query"
            + (" or raise max_seq_len." if name == "max_seq_len" else ".")
        )
    if limits.max_new_tokens is None:
        return room
    if limits.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={limits.max_new_tokens} must be positive.")
    return min(room, limits.max_new_tokens)
