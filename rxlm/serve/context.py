"""What every route needs: the service, the settings, and the turns that are being answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rxlm.serve.http_errors import ParameterError
from rxlm.serve.interface import TurnHandle
from rxlm.serve.settings import ServerSettings
from rxlm.serve.turn_stream import EventStream, RunningTurns

if TYPE_CHECKING:
    from rxlm.serve.service import ConversationService


@dataclass(frozen=True)
class Context:
    """One application's parts."""

    service: ConversationService
    settings: ServerSettings
    running: RunningTurns = field(default_factory=RunningTurns)

    def stream(self, turn: TurnHandle, content: AsyncIterator[bytes]) -> EventStream:
        """Return the response that streams ``content``, the events of ``turn``."""
        return EventStream(content, turn, self.running, self.settings.answer_timeout_seconds)

    def check_count(self, param: str, messages: Sequence[Any]) -> None:
        """Raise ``ParameterError`` for too many messages."""
        if len(messages) > self.settings.max_messages:
            raise ParameterError(
                param,
                f"{param} holds {len(messages)} messages: send {self.settings.max_messages} at "
                "most, or use a session, which remembers the others.",
            )
