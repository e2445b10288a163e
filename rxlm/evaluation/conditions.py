"""The controls: what a decoder is given to read in place of the conversation's memory.

What a model still gets right under a control, it did not remember.

Shapes: L layers, B conversations, N turns, S slots, D width.
"""

from __future__ import annotations

from typing import Literal, get_args

Condition = Literal["memory", "zeroed", "reset", "swapped"]

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
