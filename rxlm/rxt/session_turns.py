"""One interaction of a session: what the model is given, the events of its answer, what was said.

Not here: the session (its turns, undo, files) and what follows a tool call (``session``).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping

from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.generation import Answer, AnswerLimits, answer_room, opened_prompt
from rxlm.rxt.held import HeldConversation, MemoryUpdate, OpenTurn
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.session_events import DELTAS, Event, MemoryUpdated, Stats, TurnEnd, write_size
from rxlm.tokenization import PartStream, encode_given, parse_parts, parse_sections


def checked_prompt(
    model: ReactiveModel,
    given: Mapping[str, str | None],
    form: AnswerForm | None,
    max_seq_len: int | None,
) -> list[int]:
    """Return the ids of what a turn begins with.

    Args:
        model: with a tokenizer.
        given: query or tool result, and perhaps internal context.
        form: of the answer.
        max_seq_len: tokens of the whole turn; None: the model's.

    Raises:
        UserError: if the parts do not make a turn, or leave no room for an answer.
    """
    ids = encode_given(model.require_tokenizer(), given)
    prompt = opened_prompt(ids, model.config.tokenizer.answer_token_id, form)
    answer_room(model, prompt, AnswerLimits(max_seq_len), form)
    return prompt


def turn_events(
    held: HeldConversation,
    turn: OpenTurn,
    prompt: list[int],
    form: AnswerForm | None,
    memory_update: MemoryUpdate,
) -> Generator[Event, None, TurnEnd]:
    """Yield the events of a turn that was begun, and write it into memory; returns its end."""
    opening = "answer" if form is None else form.part_of(form.opening_of(prompt))
    parts = PartStream(held.model.require_tokenizer(), opening)
    tokens = held.tokens(turn)
    seconds = 0.0
    while True:
        started = time.perf_counter()
        token = next(tokens, None)
        seconds += time.perf_counter() - started
        for section in parts.flush() if token is None else parts.push(token):
            yield DELTAS[section.name](section.text)
        if token is None:
            break
    answer = turn.stream.answers()[0]
    num_tokens = turn.stream.num_tokens
    memory_seconds = None
    said = parts_of_turn(held.model, answer)
    end = TurnEnd(answer.reason, said["answer"], said.get("think"), said.get("tool_call"))
    if memory_update == "background":
        held.commit_in_background(turn)
        yield end
    else:
        yield end
        written = held.commit(turn)
        memory_seconds = written.seconds
        yield MemoryUpdated(write_size(written))
    yield Stats(num_tokens, seconds, num_tokens / max(seconds, 1e-9), memory_seconds)
    return end


def parts_of_turn(model: ReactiveModel, answer: Answer) -> dict[str, str]:
    """Return the parts of a finished turn; what a model without a form says is all answer."""
    tokenizer = model.require_tokenizer()
    if model.thinks:
        return {"answer": "", **parse_parts(tokenizer, answer.turn)}
    (first, *_) = parse_sections(tokenizer, answer.turn)
    internal = {"internal": first.text} if first.name == "internal" else {}
    return {**internal, "answer": tokenizer.decode(answer.ids)}
