"""Many conversations held by one model: ``set_batch_mode`` and ``batch_interact``.

A thin shell over conversations as values (:mod:`rxlm.rxt.reactive`): what a row says and remembers
is what a single conversation would, whatever its neighbours do. How a turn is kept when its reader
leaves is in :mod:`rxlm.rxt.held`, what rows are given in :mod:`rxlm.rxt.batch_rows`, text in
:mod:`rxlm.rxt.batch_text`.

Shapes: B conversations, T tokens of the longest query, A tokens of the longest answer, N turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.rxt.batch_rows import PerRow, row_ids, seeds_of_rows, settings_of_rows
from rxlm.rxt.batch_text import MEMORY_UPDATE_BEGINS, MEMORY_UPDATED, BatchTextModel
from rxlm.rxt.config import RxTConfig
from rxlm.rxt.conversation import ConversationState, check_carried, check_slots
from rxlm.rxt.generation import Answer, AnswerLimits, answer_room, opened_prompt
from rxlm.rxt.held import EarlyStop, MemoryUpdate, OpenTurn, check_choice
from rxlm.rxt.held_batch import HeldBatch
from rxlm.tokenization import Tokenizer


class BatchAnswers(NamedTuple):
    """What :meth:`BatchModel.batch_interactions` returns.

    ``ids``: int64 ``[B, A]`` (``[N, B, A]`` for N turns), right-padded with [PAD];
    ``mask``: bool, same shape, True at real ids. A row without a query has none.
    """

    ids: Tensor
    mask: Tensor


class BatchModel(BatchTextModel):
    """A model that may hold B conversations at once (batch mode)."""

    def __init__(
        self, config: RxTConfig | dict[str, Any], tokenizer: Tokenizer | None = None
    ) -> None:
        """Build a model with fresh weights, not in batch mode."""
        super().__init__(config, tokenizer)
        self._batch: HeldBatch | None = None

    @property
    def batch_size(self) -> int | None:
        """Number of conversations in batch mode; None when the model holds a single one."""
        return None if self._batch is None else self._batch.batch_size

    def set_batch_mode(
        self,
        use: bool,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
        state: ConversationState | None = None,
    ) -> None:
        """Hold a batch of conversations in place of the single one, or the single one again.

        The single conversation is put aside unchanged and comes back with ``use=False``, which
        forgets the batch (``export_conversation`` before it keeps it). Asking for the size that
        the batch has changes nothing; a larger one adds conversations after those that there are.

        Args:
            use: whether the model is in batch mode afterwards.
            batch_size: B; needed to begin a batch, unless ``state`` says it.
            seed: new row b starts and draws as a single conversation with ``seed + b``; None: 0.
            state: go on with these conversations; replaces a batch that there is.

        Raises:
            UserError: if the size is missing, not positive or smaller than that of the batch, or
                an argument would have no effect. Nothing changes then.
        """
        if not use:
            if batch_size is not None or seed is not None or state is not None:
                raise UserError(
                    "set_batch_mode(False) takes no batch_size, seed or state: the single "
                    "conversation comes back as it was."
                )
            if self._batch is not None:
                self._batch.close()
            self._batch = None
        elif state is not None:
            if seed is not None or batch_size not in (None, state.batch_size):
                raise UserError(
                    f"state holds {state.batch_size} conversations with seeds of their own: leave "
                    f"batch_size={batch_size} and seed={seed} out."
                )
            self._begin_batch(self._fitting(state))
        else:
            self._set_batch_size(batch_size, seed)

    def _set_batch_size(self, batch_size: int | None, seed: int | None) -> None:
        current = self.batch_size
        if batch_size is None and current is None:
            raise UserError(
                "set_batch_mode(True) needs the number of conversations: batch_size=8, or "
                "state=model.export_conversation().repeat(8) for copies of the present one."
            )
        wanted = current if batch_size is None else batch_size
        assert wanted is not None
        if wanted < 1:
            raise UserError(f"batch_size={wanted} must be positive.")
        if current is not None and wanted < current:
            raise UserError(
                f"batch_size={wanted} would forget {current - wanted} of {current} conversations: "
                "say which go on with set_batch_mode(True, "
                f"state=model.export_conversation().select({list(range(wanted))}))."
            )
        if wanted == current:
            if seed is not None:
                raise UserError(
                    f"seed={seed} has no effect: the batch has {current} conversations already. "
                    "Start them anew with reset_stm_state(seed=...)."
                )
            return
        fresh = self.new_conversation(wanted, seed=seed or 0)
        if self._batch is not None:
            kept = self._batch.state
            fresh = fresh.with_rows(range(kept.batch_size), kept)
        self._begin_batch(fresh)

    def _begin_batch(self, state: ConversationState) -> None:
        if self._batch is not None:
            self._batch.close()
        self._batch = HeldBatch(self, state)

    def _fitting(self, state: ConversationState) -> ConversationState:
        """Return ``state`` as this model holds it; raise ``UserError`` if it is another model's."""
        check_slots(state.slots, self.memory_shape, dtype=self.memory_dtype)
        if state.carried is None:
            # Without a carried state layers start afresh; rows can then be exchanged one by one.
            state = state.replaced(carried=self.decoder.nothing_carried(state.batch_size))
        else:
            check_carried(state.carried, self.decoder.carried_shape, state.batch_size)
        return state.detach().to(self.device, self.memory_dtype)

    def _require_batch(self, method: str) -> HeldBatch:
        if self._batch is None:
            raise UserError(
                f"{method}() answers a batch of held conversations, but the model holds a single "
                "one: call set_batch_mode(True, batch_size=B) first."
            )
        return self._batch

    def _require_single(self, method: str) -> None:
        if self._batch is not None:
            raise UserError(
                f"{method}() is for a single conversation, but the model holds a batch of "
                f"{self.batch_size}: use batch_{method}(), or set_batch_mode(False)."
            )

    def batch_interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        temperature: PerRow[float] = 1.0,
        top_k: PerRow[int | None] = None,
        top_p: PerRow[float | None] = None,
        min_p: PerRow[float | None] = None,
        repetition_penalty: PerRow[float] = 1.0,
        seed: PerRow[int | None] = None,
        memory_update: MemoryUpdate = "inline",
        on_early_stop: EarlyStop = "commit",
    ) -> Iterator[Tensor]:
        """Answer one query a row, token by token; then write the turns into the rows' memories.

        Every row gets what :meth:`~rxlm.rxt.alpha.RxTAlpha.interact` would give it alone; a
        model that thinks answers 'fast'.

        Args:
            input_ids: queries ``[B, T]``, from :meth:`tokenize_batch`.
            attention_mask: which ids are real, same shape (padding on either side); None = all. A
                row without any sits this turn out: its conversation stays as it is, bit for bit.
            max_seq_len: tokens of a whole turn at which answers are cut (capped by the model's
                ``seq_len``); None: as ``interact`` does unless it is told.
            temperature: for all rows, or one value a row, as the next five; see
                :class:`~rxlm.ops.sampling.SamplingSettings`.
            top_k: see there.
            top_p: see there.
            min_p: see there.
            repetition_penalty: see there.
            seed: start new streams of draws: s means ``s + b`` for row b; a sequence names each
                row's. None: go on with the conversation's.
            memory_update: 'inline' or 'background', as in ``interact``.
            on_early_stop: as in ``interact``, row by row: with 'discard' the answers that have
                ended are committed, and the turns of the others dropped.

        Returns:
            iterator of int64 ``[B]`` on the CPU: an id for each row whose answer goes on ([EOS]
            included if the model ended it) and [PAD] for the others; then B times -1, then
            (inline) B times -2.

        Raises:
            UserError: at once, if the model is not in batch mode, the number of rows is not B, no
                row has a query or one does not fit; nothing is changed.
        """
        check_choice("memory_update", memory_update, get_args(MemoryUpdate))
        check_choice("on_early_stop", on_early_stop, get_args(EarlyStop))
        batch = self._require_batch("batch_interact")
        values = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        settings = settings_of_rows(values, batch.batch_size, "batch_interact")
        seeds = seeds_of_rows(seed, batch.batch_size)
        limits = AnswerLimits(self.turn_length if max_seq_len is None else max_seq_len)
        prompts = self._batch_prompts(input_ids, attention_mask, limits)

        def answers() -> Iterator[Tensor]:
            if self._batch is not batch:
                raise UserError(
                    "the batch was ended or replaced before this answer was read: call "
                    "batch_interact() again."
                )
            turn = batch.begin(prompts, settings, limits, on_early_stop=on_early_stop, seeds=seeds)
            with batch.reading(turn):
                for step in batch.steps(turn):
                    yield self._step_tensor(turn, step, batch.batch_size)
                if memory_update == "background":
                    batch.commit_in_background(turn)
                    yield torch.full((batch.batch_size,), MEMORY_UPDATE_BEGINS)
                    return
                yield torch.full((batch.batch_size,), MEMORY_UPDATE_BEGINS)
                batch.commit(turn)
                yield torch.full((batch.batch_size,), MEMORY_UPDATED)

        return answers()

    def batch_interactions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        temperature: PerRow[float] = 1.0,
        top_k: PerRow[int | None] = None,
        top_p: PerRow[float | None] = None,
        min_p: PerRow[float | None] = None,
        repetition_penalty: PerRow[float] = 1.0,
        seed: PerRow[int | None] = None,
        return_interactions_with_queries: bool = False,
    ) -> BatchAnswers:
        """Answer one query a row, or N turns of them one after the other, and return the answers.

        Arguments are those of :meth:`batch_interact`, but for these:

        Args:
            input_ids: queries ``[B, T]``, or of N turns ``[N, B, T]`` from
                :meth:`tokenize_dialogues`.
            attention_mask: same shape; None = all ids are real.
            max_seq_len: see there.
            temperature: see there.
            top_k: see there.
            top_p: see there.
            min_p: see there.
            repetition_penalty: see there.
            seed: see there; new streams begin with a row's first query of this call.
            return_interactions_with_queries: return whole turns, ``[BOS] ... [A] answer [EOS]``,
                as they enter memory, in place of answers (which end in [EOS] if the model ended
                them).

        Returns:
            ids and mask, ``[B, A]`` or ``[N, B, A]``.

        Raises:
            UserError: as :meth:`batch_interact`, for every turn before the first is answered.
        """
        batch = self._require_batch("batch_interactions")
        values = _sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        settings = settings_of_rows(values, batch.batch_size, "batch_interactions")
        seeds = seeds_of_rows(seed, batch.batch_size)
        limits = AnswerLimits(self.turn_length if max_seq_len is None else max_seq_len)
        one_turn = input_ids.dim() < 3
        all_ids = input_ids[None] if one_turn else input_ids
        all_masks = [None] * len(all_ids) if attention_mask is None else attention_mask
        if attention_mask is not None:
            all_masks = attention_mask[None] if one_turn else attention_mask
            if all_masks.shape != all_ids.shape:
                raise UserError(
                    f"attention_mask has shape {list(attention_mask.shape)}, input_ids "
                    f"{list(input_ids.shape)}: they must be equal."
                )
        turns = [
            self._batch_prompts(ids, mask, limits)
            for ids, mask in zip(all_ids, all_masks, strict=True)
        ]
        if not turns:
            raise UserError("input_ids holds no turns (N = 0): give at least one.")
        rows: list[list[int]] = []
        for prompts in turns:
            turn = batch.begin(prompts, settings, limits, seeds=seeds)
            seeds = [
                None if prompt else given for prompt, given in zip(prompts, seeds, strict=True)
            ]
            with batch.reading(turn), evaluation_mode(self):
                for _ in batch.steps(turn):
                    pass
            said = dict(zip(turn.rows, batch.commit(turn).answers, strict=True))
            rows += [
                self._answer_ids(said.get(row), return_interactions_with_queries)
                for row in range(batch.batch_size)
            ]
        ids, mask = padded(rows, self.config.tokenizer.pad_token_id)
        if one_turn:
            return BatchAnswers(ids, mask)
        shape = (len(turns), batch.batch_size, -1)
        return BatchAnswers(ids.view(shape), mask.view(shape))

    def stop_answers(self, rows: Sequence[int]) -> None:
        """End the answers of ``rows`` that :meth:`batch_interact` is giving; the others go on.

        What was said so far enters memory as the whole answer. Rows that have ended, or had no
        query, are left alone.
        """
        self._require_batch("stop_answers").stop(rows)

    def _batch_prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None, limits: AnswerLimits
    ) -> list[list[int]]:
        """Return each row's query with [A], empty for rows without one; all of them fit."""
        batch_size = self._require_batch("batch_interact").batch_size
        ids, form = self.config.tokenizer, self.answer_form()
        rows = row_ids(input_ids, attention_mask, batch_size, ids.pad_token_id)
        if not any(rows):
            raise UserError("no row has a query: give at least one, or leave the turn out.")
        prompts = [opened_prompt(row, ids.answer_token_id, form) if row else [] for row in rows]
        for row, prompt in enumerate(prompts):
            if prompt:
                try:
                    answer_room(self, prompt, limits, form)
                except UserError as error:
                    raise UserError(f"row {row}: {error}") from error
        return prompts

    def _step_tensor(self, turn: OpenTurn, step: list[int | None], batch_size: int) -> Tensor:
        ids = [self.config.tokenizer.pad_token_id] * batch_size
        for row, token in zip(turn.rows, step, strict=True):
            if token is not None:
                ids[row] = token
        return torch.tensor(ids)

    def _answer_ids(self, answer: Answer | None, whole_turn: bool) -> list[int]:
        if answer is None:
            return []
        if whole_turn:
            return answer.turn
        end = [self.config.tokenizer.eos_token_id] if answer.reason == "eos" else []
        return [*answer.ids, *end]


def _sampling(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, repetition_penalty: Any
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
