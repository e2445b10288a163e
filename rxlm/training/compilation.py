"""Training steps whose layers `torch.compile` translates; everything around them runs as it stands.

Layer by layer, not the whole step: the loops over turns and the choice of what is read stay Python,
a model of many equal layers is translated once, and checkpointing of layers, DDP and saving see the
modules that they know. Validations, samples and the counting of operations run uncompiled: shapes
come up there that training never sees.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from rxlm.errors import UserError
from rxlm.training.objective import Objective


def compile_layers(objective: Objective, backend: str = "inductor") -> None:
    """Have the layers of what is trained translated when they are first called.

    Args:
        objective: what is trained.
        backend: of `torch.compile`.

    Raises:
        UserError: when the stage has no layers to translate.
    """
    layers = objective.layers()
    if not layers:
        raise UserError(f"compile: stage {objective.name} does not offer it; set it to false.")
    for layer in layers:
        layer.compile(backend=backend)


def uncompiled() -> AbstractContextManager[object]:
    """Return a block in which compiled layers run as they stand."""
    return torch.compiler.set_stance("force_eager")
