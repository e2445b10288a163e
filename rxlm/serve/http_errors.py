"""Errors as OpenAI's API has them: a status and ``{"error": {message, type, param, code}}``.

Messages of :class:`~rxlm.errors.UserError` are written for the caller and are passed on. Other
errors are logged and not shown (``guards.ErrorGuard``): they may name files of this machine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rxlm.errors import UserError
from rxlm.serve.interface import (
    BusyError,
    ClosedError,
    NotFoundError,
    QueueFullError,
    StateDamagedError,
    TooManySessionsError,
    TurnCancelledError,
    TurnTimeoutError,
)

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2
"""What a caller who found the queue full is told to wait."""
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
"""``type`` of an error by its status; others: a client's ``invalid_request_error``, or
``server_error``."""
MAX_PROBLEMS = 5
"""Problems of one request that are listed."""


class ParameterError(UserError):
    """A parameter of a request that cannot be used; ``param`` is its name."""

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ConflictError(UserError):
    """What is asked for contradicts what is kept."""


class CallerLeftError(ConnectionError):
    """Whoever asked has left, or does not read: there is nobody to answer."""


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the body of an error with ``status``."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as a response."""
    body = error_body(status, message, code=code, param=param)
    return JSONResponse(body, status, headers=None if headers is None else dict(headers))


def known_error(error: Exception) -> tuple[int, dict[str, Any]] | None:
    """Return status and body for an error that the caller may know of; None for any other."""
    if isinstance(error, ParameterError):
        return 400, error_body(400, str(error), code=error.code, param=error.param)
    for cls, status, code in (
        (NotFoundError, 404, "not_found"),
        (BusyError, 409, "busy"),
        (ConflictError, 409, "conflict"),
        (TooManySessionsError, 429, "too_many_sessions"),
        (QueueFullError, 429, "queue_full"),
        (TurnCancelledError, 409, "cancelled"),
        (TurnTimeoutError, 503, "timeout"),
        (ClosedError, 503, "closing"),
        (UserError, 400, "invalid_value"),
    ):
        if isinstance(error, cls):
            return status, error_body(status, str(error), code=code)
    if isinstance(error, StateDamagedError):
        # Its message names the file.
        message = (
            "the stored memory of this turn is missing or damaged, so nothing can follow it. "
            "Earlier turns may still be usable: undo, or fork an earlier one."
        )
        return 410, error_body(410, message, code="state_damaged")
    return None


def install_handlers(app: FastAPI) -> None:
    """Make ``app`` answer with these errors."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        found = known_error(error)
        if found is None:
            raise error
        status, body = found
        if isinstance(error, StateDamagedError):
            logger.error("%s", error)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
        return JSONResponse(body, status, headers=headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = _describe(error)
        return error_response(400, message, code="invalid_request", param=param)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = {
            404: "there is nothing at this address.",
            405: "this address does not take that method.",
        }.get(error.status_code, str(error.detail))
        return error_response(error.status_code, message, headers=error.headers)

    for cls in (
        UserError, QueueFullError, ClosedError, StateDamagedError, TurnCancelledError,
        TurnTimeoutError,
    ):  # fmt: skip
        app.add_exception_handler(cls, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _describe(error: RequestValidationError) -> tuple[str, str | None]:
    """Return a message and the first parameter that it is about; values are not repeated."""
    lines: list[str] = []
    param = None
    for item in error.errors()[:MAX_PROBLEMS]:
        path = ".".join(str(part)[:80] for part in item["loc"][1:])
        param = param or path or None
        if item["type"] == "extra_forbidden":
            lines.append(f"'{path}' is not a parameter that this server knows")
        elif item["type"] == "json_invalid":
            lines.append("the body is not valid JSON")
        else:
            what = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {what}" if path else what)
    more = len(error.errors()) - len(lines)
    if more > 0:
        lines.append(f"and {more} more")
    return "; ".join(lines) + ".", param
