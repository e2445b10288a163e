"""What every request passes before the application sees it: four small ASGI layers.

``ErrorGuard`` (outermost) answers what nobody expected, and sets the headers that browsers obey;
``HostGuard`` refuses foreign names and foreign pages; ``KeyGuard`` asks for the key;
``BodyGuard`` takes in the body, as far as it is allowed to. Not here: routes, errors that the
application knows (``http_errors``).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rxlm.serve.http_errors import CallerLeftError, error_response

logger = logging.getLogger(__name__)

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads itself and talks to its own server; nothing else."""
SECURITY_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


CALLER_LEFT = 499
"""Status, for the metrics only, of an answer that nobody waited for (as nginx has it)."""


class ErrorGuard:
    """Log what escaped, under an id, and answer with that id and nothing else."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except CallerLeftError:
            if not has_begun:
                await Response(status_code=CALLER_LEFT)(scope, receive, send_with_headers)
        except Exception:  # the edge of the program: everything becomes an answer here
            logger.exception("%s %s failed (%s)", scope["method"], scope["path"], request_id)
            if has_begun:
                # Too late for a status. The connection is cut, so that no half looks whole.
                raise
            answer = error_response(
                500,
                f"the server failed; its log has the reason under {request_id}.",
                code="internal_error",
            )
            await answer(scope, receive, send_with_headers)


class HostGuard:
    """Refuse requests for another host's name, and those that another site's page sends."""

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]
    ) -> None:
        self.app = app
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = None
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "").lower()
            origin = headers.get("origin")
            if self.hosts is not None and _without_port(host) not in self.hosts:
                refusal = "this server does not answer to that Host: see --allowed-host."
            elif origin is not None and not self._may_call(origin.lower(), host):
                refusal = "pages of that origin may not call this server: see --allow-origin."
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await error_response(403, refusal, code="forbidden")(scope, receive, send)

    def _may_call(self, origin: str, host: str) -> bool:
        return origin in self.origins or origin in (f"http://{host}", f"https://{host}")


class KeyGuard:
    """Ask for the key, except for what ``open_paths`` names."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self.app = app
        self._key = key.encode()
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in self.open_paths or self._is_right(scope):
            await self.app(scope, receive, send)
            return
        answer = error_response(
            401,
            "the key is missing or wrong: send the header 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # The time this takes does not tell how much of a wrong key is right.
        is_same = hmac.compare_digest(key.strip(), self._key)
        return is_same and scheme.lower() == b"bearer"


class BodyGuard:
    """Take in the body before the application runs: not too large, and not for ever."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        body: bytes | None = None
        if not (declared.isdecimal() and int(declared[:20]) > self.max_bytes):
            try:
                body = await asyncio.wait_for(self._take_in(receive), self.timeout_seconds)
            except asyncio.TimeoutError:
                answer = error_response(
                    408,
                    f"the body did not arrive within {self.timeout_seconds:g} seconds.",
                    code="body_too_slow",
                    headers={"Connection": "close"},
                )
                await answer(scope, receive, send)
                return
            except ConnectionResetError:
                return
        if body is None:
            answer = error_response(
                413,
                f"the body is larger than {self.max_bytes} bytes.",
                code="body_too_large",
                headers={"Connection": "close"},
            )
            await answer(scope, receive, send)
            return
        is_given = False

        async def receive_again() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    async def _take_in(self, receive: Receive) -> bytes | None:
        """Return the body; None if it is too large.

        Raises:
            ConnectionResetError: if the caller left.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdecimal() else host
