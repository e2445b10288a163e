"""The version of the package, for those that must not import the package's front door."""

from __future__ import annotations

__version__ = "0.1.0"
