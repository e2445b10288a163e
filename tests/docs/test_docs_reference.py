"""The script that makes ``docs/api`` and ``docs/cli.md``, and that its pages are of today."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("api_reference")


@pytest.fixture(scope="module")
def pages(script: ModuleType) -> dict[str, str]:
    made: dict[str, str] = script.reference()
    return made


@pytest.fixture
def made_once(
    script: ModuleType, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    monkeypatch.setattr(script, "reference", lambda: dict(pages))
    yield script


def test_the_pages_are_of_today(made_once: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A docstring, signature, setting or command that was changed, and the reference was not."""
    assert made_once.main(["--check"]) == 0, capsys.readouterr().out


def test_what_is_out_of_date_is_named_and_put_right(
    made_once: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A check that passes whatever is there; pages of names that are gone and stay for ever."""
    shutil.copytree(DOCS / "api", tmp_path / "api")
    shutil.copy(DOCS / "cli.md", tmp_path)
    (tmp_path / "cli.md").write_text("old", encoding="utf-8")
    (tmp_path / "api" / "gone.md").write_text("old", encoding="utf-8")
    arguments = ["--docs", str(tmp_path)]
    assert made_once.main([*arguments, "--check"]) == 1
    assert "api/gone.md, cli.md" in capsys.readouterr().out
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == "old"
    assert made_once.main(arguments) == 0
    assert made_once.main([*arguments, "--check"]) == 0
    assert not (tmp_path / "api" / "gone.md").exists()


def test_every_name_is_listed_once_and_explained(pages: dict[str, str]) -> None:
    """A public name without a docstring; one that two pages describe, and only one is corrected."""
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md#\w+\) \| (.*) \|$", pages["api/index.md"], re.M)
    assert len(rows) > 150
    assert not [name for name, _, text in rows if not text]
    headings = [
        f"{page} {name}"
        for page, text in pages.items()
        for name in re.findall(r"^### (\w+)$", text, re.M)
    ]
    assert len(headings) == len(set(headings)) == len(rows)


def test_the_pages_hold_what_people_look_up(pages: dict[str, str]) -> None:
    """A page that comes out empty: inherited methods, fields, defaults and meanings left out."""
    models = pages["api/models.md"]
    assert "#### RxTAlpha.interact" in models and "#### RxTAlpha.batch_interact" in models
    assert "| `embed_dim` | `PositiveInt` | `512` | Width D of token embeddings," in models
    assert "- `temperature`: 0 = greedy" in models
    assert "named_parameters" not in models  # of torch, not ours
    assert "| `--dry-run` |" in pages["cli.md"] and "## rxlm pipeline run" in pages["cli.md"]


def test_docstrings_become_markdown(script: ModuleType) -> None:
    """Sections, lists, roles and examples that arrive as they are typed in the source."""
    text = script.markdown(
        """Return :func:`~rxlm.ops.sampling.sample` of ``x``.

        Args:
            x: scores, ``[B, V]``,
                in any type.
            y: other.

        Returns:
            ids,
            one a row.

        Raises:
            UserError: if not.

        Example::

            sample(x)
        """
    )
    assert text.startswith("Return `sample` of `x`.")
    assert "- `x`: scores, `[B, V]`, in any type.\n- `y`: other." in text
    assert "**Returns:** ids, one a row." in text
    assert "- `UserError`: if not." in text
    assert "Example:\n\n```py\nsample(x)\n```" in text
