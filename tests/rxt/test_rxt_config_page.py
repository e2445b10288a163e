"""The page docs/configuration.md against the code it describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rxlm.rxt.config import (
    MemoryAttentionConfig,
    RxTComponentConfig,
    RxTConfig,
    TokenizerConfig,
)

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def rows(heading: str) -> dict[str, list[str]]:
    """Return default, values and meaning by field name, from one section of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"`{heading}`\n")[1].split("\n## ")[0]
    cells = (line.strip("| ").split(" | ") for line in section.splitlines() if "| `" in line)
    return {row[0].strip("`"): row[1:] for row in cells if len(row) == 4}


@pytest.mark.parametrize(
    "config", [RxTComponentConfig, MemoryAttentionConfig, TokenizerConfig, RxTConfig]
)
def test_page_lists_every_field(config: type[Any]) -> None:
    """Catches a field without documentation, and one whose documented facts are outdated."""
    table = rows(config.__name__)
    assert list(table) == list(config.model_fields)
    properties = config.model_json_schema()["properties"]
    for name, field in config.model_fields.items():
        default, values, meaning = table[name]
        assert meaning == " ".join((field.description or "").split()), name
        if config is not RxTConfig:
            assert default == f"`{json.dumps(field.default)}`", name
        for choice in re.findall(r"'enum': (\[[^\]]*\])", str(properties[name])):
            for value in re.findall(r"'([^']*)'", choice):
                assert f"`{value}`" in values, name


def test_examples_of_the_page_run() -> None:
    """Catches an example that a reader copies and that fails."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
