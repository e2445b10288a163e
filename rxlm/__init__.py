"""rxlm: reactive conversational language models, models with a memory. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rxlm.version import __version__

if TYPE_CHECKING:
    from rxlm.rxt.models import RxTAlpha

__all__ = ["__version__", "load"]


def load(path: str | Path, device: str = "cpu") -> RxTAlpha:
    """Return the model that ``path`` means, ready to talk.

    Args:
        path: a model folder, a checkpoint, a run (its best checkpoint), a pipeline's folder (its
            last stage), or ``hf://owner/name``.
        device: where the model goes.

    Raises:
        UserError: if there is no model, or it is damaged.

    Example::

        session = rxlm.load("runs/nano").session()
        print(session.ask("Hi, I am Ann."))
    """
    from rxlm.rxt.models import RxTAlpha

    return RxTAlpha.from_pretrained(path, device=device)
