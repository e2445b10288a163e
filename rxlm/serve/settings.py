"""What an operator chooses about the HTTP side: limits, the key, who may call. No torch.

Limits of the conversations themselves (how many run, how long a query may be) are those of the
service (``interface.ServeLimits``).
"""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, SecretStr

from rxlm.configuration import Config

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ServerSettings(Config):
    """How the HTTP server treats those who call it."""

    api_key: SecretStr | None = None
    """What callers have to send as ``Authorization: Bearer KEY``. None: anybody may call."""
    allowed_hosts: tuple[str, ...] | None = LOOPBACK_NAMES
    """Names that a request's Host header may have (without the port). A page of another site that
    made its own name point to this machine (DNS rebinding) is refused by this. None: any."""
    allowed_origins: tuple[str, ...] = ()
    """Other sites (``https://example.org``) whose pages may call from a browser (CORS)."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """Size of a request's body; a larger one is refused while it is still coming in."""
    body_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    """How long a body may take to arrive."""
    max_messages: Annotated[int, Field(ge=1)] = 512
    """Messages in one request."""
    max_stop_strings: Annotated[int, Field(ge=1)] = 4
    """Strings in ``stop``."""
    answer_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long an answer may take, from the request to its last byte: a reader who does not read is
    let go then."""
    keep_alive_seconds: Annotated[float, Field(gt=0)] = 15.0
    """How often a stream without news sends a comment, so that nobody takes it for dead."""
    default_temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of requests that name none. 0: always the most likely answer."""


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
