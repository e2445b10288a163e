"""Texts of Hugging Face data sets, with a stand-in for the package."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rxlm.data.data_config import DataConfig
from rxlm.data.dataset_texts import DatasetRecords, load_dataset_texts
from rxlm.data.records import DataSummary
from rxlm.data.streaming import StreamPosition, TextStream
from rxlm.errors import UserError
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer
from rxlm.training.corpus import RowSettings, open_rows
from rxlm.training.texts import iter_texts, open_texts, stream_texts


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["hello world"] * 9, TokenizerTraining(vocab_size=275))


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


def saved(package: Any, folder: Path, values: list[Any], **settings: Any) -> DataConfig:
    """Return the configuration of a saved data set that holds ``values``."""
    (folder / "dataset_dict.json").write_text("{}")
    package.rows = [{"text": value} for value in values]
    return DataConfig(text=str(folder), valid_fraction=0.5, **settings)


def read_everywhere(data: DataConfig, folder: Path, tokenizer: Tokenizer) -> list[Any]:
    """Return (documents, summary) as they are held, as a store has them, and as they stream."""
    found = []
    for cache in (None, f"{folder}-cache"):
        summary, texts = DataSummary(), []
        for split in ("train", "valid"):
            rows = open_rows(
                data.model_copy(update={"token_cache": cache}),
                split,  # type: ignore[arg-type]
                RowSettings(tokenizer, 64),
                summary if split == "train" else None,
            )
            texts += [
                tokenizer.decode(rows.sample(position, 1)[0].ids)
                for position in range(rows.size(1))
            ]
        found.append((sorted(texts), summary))
    stream = TextStream(
        DatasetRecords(str(folder)), block_records=1, on_bad_record=data.on_bad_record
    )
    texts, position = [], StreamPosition()
    while position.block.epoch == 0:
        # Resumed at each record: positions count the rows that are left out.
        text, position = next(stream.records(position))
        texts.append(text)
    block = position.block
    found.append((sorted(texts), DataSummary(block.num_records, block.num_bad)))
    return found


def test_rows_without_text_are_no_records(
    package: Any, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    """Catches an empty text that ends a stream, and is left out silently elsewhere."""
    data = saved(package, tmp_path, ["a1", "", "b2", " ", "\n", "c3", "d4", ""])
    for texts, summary in read_everywhere(data, tmp_path, tiny_tokenizer):
        assert texts == ["a1", "b2", "c3", "d4"]
        assert (summary.num_records, summary.num_bad) == (4, 0)


@pytest.mark.parametrize("bad", [None, 3, ["a"]])
def test_rows_of_something_else_are_bad_records(
    package: Any, tmp_path: Path, tiny_tokenizer: Tokenizer, bad: Any
) -> None:
    """Catches a null that ends a run although bad records are skipped, that is not counted, or
    that has no row number."""
    data = saved(package, tmp_path, ["a1", "", bad, "b2", bad, "c3"], on_bad_record="skip")
    for texts, summary in read_everywhere(data, tmp_path, tiny_tokenizer):
        assert texts == ["a1", "b2", "c3"]
        assert (summary.num_records, summary.num_bad) == (5, 2)
        assert all(": row 3: field 'text'" in text for text in summary.problems[:1])
    summary = DataSummary()
    assert list(stream_texts(data, 9, summary)) == ["a1", "c3"] and summary.num_bad == 2
    strict = data.model_copy(update={"on_bad_record": "fail"})
    for cache in (None, f"{tmp_path}-other"):
        with pytest.raises(UserError, match=r": row 3: field 'text': expected text, got"):
            open_rows(
                strict.model_copy(update={"token_cache": cache}),
                "train",
                RowSettings(tiny_tokenizer, 64),
            )
    with pytest.raises(UserError, match=r": row 3: field 'text': expected text, got"):
        list(itertools.islice(TextStream(DatasetRecords(str(tmp_path))).records(), 3))
    package.rows = [{"text": bad}]
    with pytest.raises(UserError, match=r"holds no text in field 'text'\. The first.*row 1"):
        open_texts(data)


def test_a_limit_counts_texts(package: Any, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Catches a limit of rows where they are held and of documents where they are mapped, so that
    a run reads other data with a cache."""
    values = ["a1", "", "b2", None, "c3", "d4", "e5", "f6"]
    data = saved(package, tmp_path, values, max_texts=4, on_bad_record="skip")
    held, mapped, _ = read_everywhere(data, tmp_path, tiny_tokenizer)
    assert held[0] == mapped[0] == ["a1", "b2", "c3", "d4"]
    assert len(list(iter_texts(data, "train", DataSummary()))) == 2
    assert load_dataset_texts(str(tmp_path), "skip", limit=2) == ["a1", "b2"]
    inside = data.model_copy(update={"token_cache": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"lies in the data set.*Give a folder outside"):
        open_rows(inside, "train", RowSettings(tiny_tokenizer, 64))
