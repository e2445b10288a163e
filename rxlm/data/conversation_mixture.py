"""Conversations of several sources in given ratios, read by position like any source.

Which source is read where is in ``mixture``; what a source is, in ``conversation_source``.
"""

from __future__ import annotations

from collections.abc import Sequence

from rxlm.data.conversations import Conversation, ConversationSource, Interaction
from rxlm.data.mixture import Mixture
from rxlm.errors import UserError


class MixedConversations:
    """Several sources as one endless one; a source that is read through begins anew.

    Args:
        sources: at least one.
        weights: how often each is read, relative to the others.
        seed: of the order.
        name: for logs and reports.
    """

    def __init__(
        self,
        sources: Sequence[ConversationSource],
        weights: Sequence[float],
        seed: int = 0,
        name: str = "mixture",
    ) -> None:
        if len(sources) != len(weights):
            raise UserError(f"{len(sources)} sources and {len(weights)} weights: give one each.")
        self.sources = tuple(sources)
        self.name = name
        self.size: int | None = None
        self.has_probes = any(source.has_probes for source in sources)
        self._mixture = Mixture(weights, seed)

    def sample(self, position: int, num_turns: int) -> Conversation:
        """Return the conversation at ``position``, of at most ``num_turns`` turns."""
        source, place = self._mixture.locate(position)
        return self.sources[source].sample(place, num_turns)

    def has_probes_at(self, position: int) -> bool:
        """Return whether the source of ``position`` can ask anything."""
        source, place = self._mixture.locate(position)
        return self.sources[source].has_probes_at(place)

    def probe_questions(
        self, conversation: Conversation, position: int, count: int
    ) -> list[tuple[int, Interaction]]:
        """Return questions of the source that ``conversation``, at ``position``, is from."""
        source, place = self._mixture.locate(position)
        return self.sources[source].probe_questions(conversation, place, count)
