"""A batch of conversations that go on together: turns of some rows, one after the other.

Each row is what a single held conversation would be: rows without a query this turn keep their
state bit for bit, rows end when they like, and any of them can be stopped or started anew while the
others go on. Not here: tensors of ids and text (:mod:`rxlm.rxt.batched`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rxlm.errors import UserError
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerLimits, AnswerStream
from rxlm.rxt.held import EarlyStop, HeldConversations, OpenTurn


class HeldBatch(HeldConversations):
    """The current states of B conversations, and the turn that is under way."""

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[SamplingSettings],
        limits: AnswerLimits,
        *,
        on_early_stop: EarlyStop = "commit",
        seeds: Sequence[int | None] | None = None,
    ) -> OpenTurn:
        """Start a turn; one that is still being read ends here, as if its reader had left.

        Args:
            prompts: the query of each of the B rows; an empty one: the row sits this turn out.
            settings: how the tokens of each row are chosen.
            limits: where answers are cut.
            on_early_stop: what becomes of answers that have not ended when the reader leaves.
            seeds: start a new stream of draws for these rows; None: go on with a row's own.

        Raises:
            UserError: if no row has a query, or one leaves no room for an answer; nothing changes
                then.
        """
        self._end_open_turn()
        rows = tuple(row for row, prompt in enumerate(prompts) if prompt)
        before = self._state
        start = before if len(rows) == before.batch_size else before.select(rows)
        if seeds is not None:
            given = [seeds[row] for row in rows]
            start = start.replaced(
                seeds=tuple(
                    old if new is None else new for old, new in zip(start.seeds, given, strict=True)
                ),
                draws=tuple(
                    count if new is None else 0
                    for count, new in zip(start.draws, given, strict=True)
                ),
            )
        stream = AnswerStream(
            self.model,
            start,
            [prompts[row] for row in rows],
            [settings[row] for row in rows],
            limits,
            # Of a model that thinks: answer at once.
            self.model.answer_form(),
        )
        self._open = OpenTurn(before, stream, "", on_early_stop, rows)
        return self._open

    def close(self) -> None:
        """Drop a turn that is not committed; whoever still reads it gets an error."""
        self.replace(self._state)

    def stop(self, rows: Sequence[int]) -> None:
        """End the answers of ``rows`` that are being read; what was said enters memory."""
        self._end_answers(self._checked_rows(rows))

    def start_anew(self, rows: Sequence[int], fresh: ConversationState) -> None:
        """Go on with ``fresh`` in place of the conversations ``rows``; the others are not touched.

        An answer of these rows that is being read ends, and does not enter memory.
        """
        chosen = self._checked_rows(rows)
        if self._is_read:
            assert self._open is not None
            self._open.dropped.update(chosen)
            self._end_answers(chosen)
        else:
            self.settle()
        self._state = self._state.with_rows(chosen, fresh)

    @property
    def _is_read(self) -> bool:
        """Whether a turn is under way whose answers have not all ended."""
        return self._open is not None and not (self._open.left or self._open.stream.done)

    def _end_answers(self, rows: Sequence[int]) -> None:
        if self._is_read:
            assert self._open is not None
            taking_part = enumerate(self._open.rows)
            self._open.stream.stop({place for place, row in taking_part if row in rows})

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        return checked_rows(rows, self.batch_size)

    def _check(self, state: ConversationState) -> None:
        held = self.batch_size
        if state.batch_size != held:
            raise UserError(
                f"the state holds {state.batch_size} conversations but the batch holds {held}: "
                "give one each (state.repeat() copies, state.select() chooses), or begin a batch "
                "of another size with set_batch_mode(True, state=state)."
            )


def checked_rows(rows: Sequence[int], batch_size: int) -> list[int]:
    """Return ``rows`` as a list; raise ``UserError`` unless they are different rows of a batch."""
    chosen = [int(row) for row in rows]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"rows={chosen}: give at least one row, each of them once.")
    outside = [row for row in chosen if not 0 <= row < batch_size]
    if outside:
        raise UserError(
            f"rows={chosen}: row {outside[0]} is outside the batch of {batch_size} conversations; "
            f"rows count from 0 to {batch_size - 1}."
        )
    return chosen
