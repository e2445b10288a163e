"""Errors that a person reads. Everything else that escapes is a defect of ours.

``UserError`` says that what was given cannot be used (the CLI exits with status 2); ``RunError``
says that a run that was started correctly failed (status 1). Both carry one complete message: the
value, what was expected, and what to do about it.
"""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot be used: a bad value, file, recipe, or state. CLI exit status 2."""


class RunError(RuntimeError):
    """A run that failed although its input was fine: disk full, diverged, ... CLI exit status 1."""
