"""The parity page: what it names exists, and runs; what it says of defaults is so."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rxlm.configuration import Config
from rxlm.rxt.config import MemoryAttentionConfig, RxTComponentConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
MIGRATING = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
NO_PROOF = ("missing", "left out")


class Row(NamedTuple):
    """A row of a table: its cells by the heading of their column, and the section it is in."""

    section: str
    cells: dict[str, str]


def rows_of(page: str) -> list[Row]:
    section, header, rows = "", [], []
    for line in page.splitlines():
        if line.startswith("#"):
            section, header = line.lstrip("# "), []
        if not line.startswith("| "):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        else:
            assert len(cells) == len(header), line
            rows.append(Row(section, dict(zip(header, cells, strict=True))))
    return rows


ROWS = rows_of(PAGE)


def test_every_named_test_and_script_exists() -> None:
    """Catches a row that points at a test that was renamed or deleted: a promise without proof."""
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", sources, flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 150
    assert not sorted(named - defined)
    for script in re.findall(r"`(benchmarks/\w+\.py)`", PAGE):
        assert (ROOT / script).exists(), script


def test_every_row_has_proof() -> None:
    """Catches a promise whose row names neither a test nor a measurement, nor what is not there."""
    assert len(ROWS) > 150
    for _, cells in ROWS:
        proof = cells["test"]
        if "`test_" in proof or "`benchmarks/" in proof:
            assert proof not in NO_PROOF and not cells.get("status", "").startswith(NO_PROOF), cells
        elif "status" in cells:  # a checklist: the status says so, with the reason
            assert not proof and re.match(r"(missing|left out): \w+", cells["status"]), cells
        else:
            assert proof in NO_PROOF and cells["difference and why"], cells


def test_every_name_of_ours_exists() -> None:
    """Catches a row that points at a class or function that was renamed or moved."""
    names = set(re.findall(r"`(rxlm(?:\.\w+)+)`", PAGE + MIGRATING))
    assert len(names) > 20
    missing = []
    for name in sorted(names):
        words = name.split(".")
        for split in range(len(words), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(words[:split]))
                break
            except ModuleNotFoundError:
                continue
        for word in words[split:]:
            value = getattr(value, word, None)
        if value is None:
            missing.append(name)
    assert not missing


@pytest.mark.parametrize(
    ("section", "schema"),
    [
        ("Fields of a component", RxTComponentConfig),
        ("Fields of memory attention", MemoryAttentionConfig),
    ],
)
def test_fields_of_the_reference_are_ours_with_the_stated_defaults(
    section: str, schema: type[Config]
) -> None:
    """Catches a field of the reference that we do not accept, and a default that is another than
    the page says."""
    rows = [row.cells for row in ROWS if row.section == section]
    stated: dict[str, str] = {}
    for cells in rows:
        theirs = dict(re.findall(r"`(\w+)=([^`]+)`", cells["reference"]))
        ours = dict(re.findall(r"`(\w+)=([^`]+)`", cells["ours"]))
        assert theirs and set(ours) <= set(theirs), cells
        assert ours or cells["ours"] == "same", cells
        stated |= {**theirs, **ours}
    assert len(stated) > 25
    for name, default in stated.items():
        assert name in schema.model_fields, name
        value = yaml.safe_load(default)
        actual = schema.model_fields[name].default
        assert actual == (float(value) if isinstance(actual, float) else value), name
