"""Fills the tables of docs/language_models.md: the mixers, and a model's evaluation.

    rxlm eval lm runs/lm/tiny --json lm.json
    python scripts/update_language_models.py lm.json           # rewrites both blocks
    python scripts/update_language_models.py                   # the table of mixers only

No number between the markers is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from update_readme import fill

from rxlm.errors import UserError
from rxlm.evaluation.language_model import language_model_table
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.nn.mixers import MIXERS
from rxlm.storage.files import read_json, write_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "language_models.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    blocks = {"mixers": mixer_table()}
    try:
        if given:
            blocks["evaluation"] = markdown_table(language_model_table(read_json(Path(given[0]))))
        write_bytes(PAGE, fill(PAGE.read_text(encoding="utf-8"), blocks).encode("utf-8"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def mixer_table() -> str:
    """Return one row a mixer."""
    rows = [
        (f"`{name}`", mixer.summary, mixer.cost, ", ".join(mixer.positions) or "its own order")
        for name, mixer in MIXERS.items()
    ]
    header = ("`attention`", "what it is", "time", "positions it can apply")
    table = Table("", header, rows, prose=True)
    # Names stand as code, where nothing is escaped.
    return markdown_table(table).replace("\\", "")


if __name__ == "__main__":
    sys.exit(main())
