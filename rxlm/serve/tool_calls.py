"""A model's tool call as OpenAI's API has it. Not here: tools (``rxlm.rxt.tools``)."""

from __future__ import annotations

import json
from typing import Any


def openai_call(text: str, turn_id: str) -> dict[str, Any]:
    """Return a call as ``tool_calls`` holds it; what is no JSON goes out as the arguments.

    Args:
        text: as the model wrote it.
        turn_id: of the turn it ends, without the prefix.
    """
    name, arguments = "", text
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if isinstance(call, dict):
        name = str(call.get("name", ""))
        arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
    return {
        "id": f"call_{turn_id}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
