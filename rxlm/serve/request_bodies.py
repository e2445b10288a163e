"""What the bodies of requests have in common: how tokens are chosen, texts, what is not offered.

A parameter that would change the answer and that this server does not have is refused. One that
changes nothing here is taken and does nothing. What nobody knows is refused as well. Not here: the
bodies themselves (the routes).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import ThinkingMode
from rxlm.serve.http_errors import ParameterError
from rxlm.serve.interface import NotFoundError

MAX_INTEGER = 2**63 - 1
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
StopStrings = str | list[str] | None


class Body(BaseModel):
    """A request's body: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SamplingBody(Body):
    """How tokens are chosen."""

    temperature: Finite | None = None
    """0: always the most likely token. None: what the server was started with."""
    top_p: Finite | None = None
    """Choose among the most likely tokens that make up this probability."""
    top_k: Annotated[int, Field(le=2**31 - 1)] | None = None
    """Choose among the k most likely tokens."""
    min_p: Finite | None = None
    """Leave out tokens less likely than this share of the most likely one."""
    repetition_penalty: Finite | None = None
    """Above 1: tokens of the answer come less often again."""
    seed: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    """Starts a new stream of random draws; None: the conversation's own goes on."""
    thinking_mode: ThinkingMode | None = None
    """Of a model that thinks."""

    def sampling(self, default_temperature: float) -> SamplingSettings:
        """Return the settings that were asked for.

        Raises:
            UserError: for a value out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        values = {name: value for name, value in given.items() if value is not None}
        return SamplingSettings.parse({"temperature": default_temperature, **values}, "request")


def detached_seed(seed: int | None, settings: SamplingSettings, begins: bool) -> int | None:
    """Return the seed of a turn of no session, for requests that name none.

    Drawn answers differ from one request to the next, as callers of a stateless protocol expect;
    the most likely answer is the same each time.

    Args:
        seed: what was asked for.
        settings: how tokens are chosen.
        begins: whether the conversation begins with this turn.
    """
    if seed is not None:
        return seed
    if settings.temperature > 0:
        return secrets.randbelow(2**31)
    return 0 if begins else None


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    """Of answers that are sent back; not read."""
    logprobs: list[Any] | None = None
    """As ``annotations``."""


def text_of(content: str | list[TextPart] | None) -> str:
    """Return the text of a message."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def stop_strings(stop: StopStrings, most: int) -> tuple[str, ...]:
    """Return ``stop`` as a tuple.

    Raises:
        ParameterError: if there are too many, or an empty one.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > most:
        raise ParameterError("stop", f"stop has {len(texts)} strings: give {most} at most.")
    if not all(texts):
        raise ParameterError("stop", "stop holds an empty string, which is everywhere.")
    return texts


def refuse_what_is_not_offered(
    body: Body, neutral: Mapping[str, tuple[tuple[Any, ...], str]]
) -> None:
    """Refuse parameters that would change the answer.

    Args:
        body: of a request.
        neutral: by name of the parameter, the values that ask for nothing, and the reason why
            others are refused.

    Raises:
        ParameterError: for the first one that asks for something.
    """
    for name, (values, reason) in neutral.items():
        value = getattr(body, name)
        if value is not None and not any(value == harmless for harmless in values):
            raise ParameterError(
                name, f"{name} is not offered here: {reason}", "unsupported_parameter"
            )


def check_model(asked: str | None, name: str) -> None:
    """Raise ``NotFoundError`` unless ``asked`` is None or the model that is served."""
    if asked is not None and asked != name:
        raise NotFoundError(f"no such model here: this server has '{name}'.")


NO_TOOLS = (
    "the model cannot be given tools with a request; it knows those that it was trained with, or "
    "none."
)
ONLY_TEXT = "answers are plain text."
"""Reasons for refusing."""
