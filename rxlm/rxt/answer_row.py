"""One answer while it is written, and the choice of the next token of several.

The same for a batch that begins and ends together (:mod:`rxlm.rxt.generation`) and for one that
answers join and leave (:mod:`rxlm.rxt.answer_batch`). Not here: scores, memory, text.

Shapes: B answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.ops.padding import padded
from rxlm.ops.sampling import SamplingSettings, sample, uniform_draw
from rxlm.rxt.answer_form import AnswerForm

StopReason = Literal["eos", "length", "stopped"]
"""How an answer ended: by the model, cut by length, or by the reader."""


class Answer(NamedTuple):
    """One finished answer.

    ``ids``: the answer, without [A] and [EOS] (of a model that thinks: all that it said after the
    token that opened it, which is among them if the model chose it); ``reason``: the model ended
    it ('eos'), it was cut ('length'), or the reader stopped ('stopped'); ``turn``: the whole turn
    as it enters memory, ``[BOS] ... [A] answer [EOS]``, whatever the reason.
    """

    ids: list[int]
    reason: StopReason
    turn: list[int]


@dataclass(eq=False, slots=True)
class AnswerRow:
    """One answer that is being written.

    ``prompt``: with what opens the answer; ``room``: tokens that fit before [EOS]; ``seed`` and
    ``draws``: of the next random draw; ``last``: the special token that came last, in a ``form``;
    ``ids``: what was said; ``reason``: None while it goes on.
    """

    prompt: list[int]
    room: int
    settings: SamplingSettings
    seed: int
    draws: int
    eos_id: int
    form: AnswerForm | None = None
    last: int | None = None
    ids: list[int] = field(default_factory=list)
    reason: StopReason | None = None

    def take(self, token: int) -> int | None:
        """Go on by the token that was chosen; return it, or None if it cut the answer."""
        self.draws += 1
        if token == self.eos_id:
            self.reason = "eos"
            return token
        if len(self.ids) == self.room:
            # The place of this token is [EOS]'s.
            self.reason = "length"
            return None
        self.ids.append(token)
        if self.form is not None:
            self.last = self.form.after(self.last, token)
        return token

    def answer(self) -> Answer:
        """Return the answer as it is; one that has not ended counts as 'stopped'."""
        turn = [*self.prompt, *self.ids, self.eos_id]
        return Answer(list(self.ids), self.reason or "stopped", turn)


def choose_tokens(
    logits: Tensor,
    rows: Sequence[AnswerRow],
    groups: Mapping[SamplingSettings, Sequence[int]],
) -> list[int]:
    """Choose the next token of each answer; those that have ended get one that means nothing.

    Args:
        logits: ``[B, V]``.
        rows: the B answers; left unchanged.
        groups: which of them share which settings, see :func:`rows_by_settings`.

    Raises:
        RunError: if the scores of an answer are not finite.
    """
    forms: dict[AnswerForm | None, list[int]] = {}
    for index, row in enumerate(rows):
        forms.setdefault(row.form, []).append(index)
    for form, members in forms.items():
        if form is None:
            continue
        last = [rows[index].last for index in members]
        if len(forms) == 1:
            logits = form.restrict(logits, last)
        else:
            place = torch.tensor(members, device=logits.device)
            restricted = form.restrict(logits.index_select(0, place), last)
            logits = logits.index_copy(0, place, restricted)
    if len(groups) == 1:
        ((settings, members_alike),) = groups.items()
        return _choose_alike(logits, settings, [rows[index] for index in members_alike])
    chosen = [0 for _ in rows]
    for settings, members_alike in groups.items():
        place = torch.tensor(members_alike, device=logits.device)
        alike = [rows[index] for index in members_alike]
        tokens = _choose_alike(logits.index_select(0, place), settings, alike)
        for index, token in zip(members_alike, tokens, strict=True):
            chosen[index] = token
    return chosen


def _choose_alike(
    logits: Tensor, settings: SamplingSettings, rows: Sequence[AnswerRow]
) -> list[int]:
    """Choose a token for each of ``rows``, which share their settings."""
    uniforms = None
    if settings.temperature > 0:
        uniforms = [uniform_draw(row.seed, row.draws) for row in rows]
    previous = None
    if settings.repetition_penalty != 1.0:
        previous = padded([row.ids for row in rows], -1)[0].to(logits.device)
    return sample(logits, settings, uniforms, previous).tolist()


def rows_by_settings(
    settings: SamplingSettings | Sequence[SamplingSettings], batch_size: int
) -> dict[SamplingSettings, list[int]]:
    """Return which of the rows share which settings.

    Raises:
        UserError: if there are several settings, but not one a row.
    """
    if isinstance(settings, SamplingSettings):
        return {settings: list(range(batch_size))}
    if len(settings) != batch_size:
        raise UserError(
            f"{len(settings)} sampling settings for {batch_size} conversations: give one for all, "
            "or one each."
        )
    groups: dict[SamplingSettings, list[int]] = {}
    for row, chosen in enumerate(settings):
        groups.setdefault(chosen, []).append(row)
    return groups
