"""What a turn did to memory, slot by slot, for people to look at.

Shapes: L layers, S slots, D width.
"""

from __future__ import annotations

import torch

from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.session_events import write_sizes
from rxlm.serve.interface import MemoryView


def memory_view(
    turn_id: str | None, before: ConversationState, after: ConversationState
) -> MemoryView:
    """Return the change between two states of one conversation."""
    old, new = before.slots[:, 0].detach().float().cpu(), after.slots[:, 0].detach().float().cpu()
    norms = torch.linalg.vector_norm(new, dim=-1)
    larger = torch.maximum(norms, torch.linalg.vector_norm(old, dim=-1))
    changed = torch.linalg.vector_norm(new - old, dim=-1)
    changes = torch.where(larger > 0, changed / larger, 0.0)
    size = write_sizes(before.slots, after.slots)[0]
    num_layers, num_slots = norms.shape
    return MemoryView(turn_id, num_layers, num_slots, norms.tolist(), changes.tolist(), size)
