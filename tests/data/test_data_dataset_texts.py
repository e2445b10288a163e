"""Texts of Hugging Face data sets, with a stand-in for the package."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rxlm.data.conversation_source import DataConfig
from rxlm.data.dataset_texts import load_dataset_texts
from rxlm.errors import UserError
from rxlm.training.texts import open_texts


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module ``datasets`` that gives what a test puts into it, and remembers its arguments."""
    module = types.ModuleType("datasets")
    module.rows = [{"text": f"document {number}"} for number in range(10)]  # type: ignore[attr-defined]
    module.calls = []  # type: ignore[attr-defined]

    def load_dataset(*names: str, **options: Any) -> Any:
        module.calls.append((names, options))
        if isinstance(module.rows, Exception):
            raise module.rows
        return iter(module.rows)

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.load_from_disk = lambda path: {"train": module.rows}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_data_sets_are_streamed(package: Any) -> None:
    """Catches a configuration that is lost, a whole download, and a limit read too late."""
    texts = load_dataset_texts("hf://allenai/c4/en", split="validation", limit=3)
    assert texts == ["document 0", "document 1", "document 2"]
    (names, options), *_ = package.calls
    assert names == ("allenai/c4", "en")
    assert options == {"split": "validation", "streaming": True}


def test_offline_says_what_to_do(package: Any) -> None:
    """Catches a traceback of a library where there is no network."""
    package.rows = ConnectionError("Couldn't reach the Hub")
    with pytest.raises(UserError, match=r"ConnectionError.*needs the network.*local file"):
        load_dataset_texts("hf://allenai/c4/en")


def test_missing_package_field_split(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches errors that do not name the setting to change."""
    with pytest.raises(UserError, match=r"no field 'content', but text.*data\.text_field"):
        load_dataset_texts("hf://a/b", field="content")
    package.rows = [{"text": " "}]
    with pytest.raises(UserError, match="holds no text"):
        load_dataset_texts("hf://a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'reactive-lm\[data\]'"):
        load_dataset_texts("hf://a/b")


def test_saved_data_sets_are_split(package: Any, tmp_path: Path) -> None:
    """Catches a folder of `save_to_disk` taken for a folder of text files, and documents that are
    both trained and validated on."""
    (tmp_path / "dataset_dict.json").write_text("{}")
    data = DataConfig(text=str(tmp_path), valid_fraction=0.2)
    train, valid = open_texts(data), open_texts(data, "valid")
    assert len(train) == 8
    assert len(valid) == 2
    assert not set(train) & set(valid)
    with pytest.raises(UserError, match=r"no split.*data\.text_split"):
        load_dataset_texts(str(tmp_path), split="test")
