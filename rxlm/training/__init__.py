"""Training: one Trainer, many objectives. This file only says where things are; no torch at import.

* ``objective.py``: what a training stage is (:class:`Objective`, :class:`StepOutput`)
* ``settings.py``: how a stage is trained (:class:`TrainSettings`)
* ``run_folder.py``: the folder that a run writes (:class:`RunFolder`)
* ``trainer.py``: the loop (:class:`Trainer`, :class:`TrainResult`); ``update.py`` is one step of it
* ``checkpoint.py``: checkpoint folders that survive a kill at any instant
* ``recipe.py``: YAML recipes and ``a.b=c`` overrides

The names below can be imported from here; each loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Objective": "rxlm.training.objective",
    "StepOutput": "rxlm.training.objective",
    "TrainSettings": "rxlm.training.settings",
    "RunFolder": "rxlm.training.run_folder",
    "Trainer": "rxlm.training.trainer",
    "TrainResult": "rxlm.training.trainer",
    "find_best": "rxlm.training.checkpoint",
    "find_latest": "rxlm.training.checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module that owns ``name`` when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
