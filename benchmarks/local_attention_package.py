"""Finds the package ``local-attention`` (MIT), which tests and benchmarks compare with.

Two of its files are needed; its ``__init__`` imports more, with more dependencies. They are
therefore loaded by path, whether those are installed or not.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

VERSION = "1.11.2"
"""What our ``compat='local-attention'`` reproduces."""


def load() -> ModuleType | None:
    """Return the module with the package's ``LocalAttention``; None if it is not installed."""
    # A script of this folder has the package's name.
    folder = Path(__file__).resolve().parent
    paths = [path for path in sys.path if Path(path).resolve() != folder]
    spec = importlib.machinery.PathFinder.find_spec("local_attention", paths)
    if spec is None or not spec.submodule_search_locations:
        return None
    if importlib.metadata.version("local-attention") != VERSION:
        return None
    name = "local_attention"
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == name}
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.local_attention")
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[key]
        sys.modules.update(before)
