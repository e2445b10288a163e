"""How long work tells its caller where it is: a plain callback, whatever draws the bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (units done, units in all, what comes next) before every unit and at the end."""
