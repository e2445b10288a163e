"""The parity page: what it names exists, and runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


def test_every_named_test_and_script_exists() -> None:
    """Catches a row that points at a test that was renamed or deleted: a promise without proof."""
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", sources, flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 50
    assert not named - defined
    for script in re.findall(r"`(benchmarks/\w+\.py)`", PAGE):
        assert (ROOT / script).exists(), script


def test_every_row_has_proof() -> None:
    """Catches a promise whose row names neither a test nor a measurement."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| promised")]
    assert len(rows) > 40
    for row in rows:
        proof = row.split("|")[2]
        assert "`test_" in proof or "`benchmarks/" in proof, row
