"""Text of a study: vocabularies, splits, parquet, bits per byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rxlm.data.characters import UNKNOWN_ID, CharacterVocabulary
from rxlm.errors import UserError
from rxlm.study.corpus import open_corpus
from rxlm.study.objectives import text_metrics
from rxlm.study.settings import TextTraining


def test_data_characters_share_one_mapping() -> None:
    """Catches a vocabulary that is made of the validation text, or cuts the wrong characters."""
    vocabulary = CharacterVocabulary.of_texts(["aaabbc", "b"], max_size=4)
    assert vocabulary.characters == "ab" and vocabulary.vocab_size == 4
    assert vocabulary.encode("abcz") == [2, 3, UNKNOWN_ID, UNKNOWN_ID]
    assert vocabulary.decode([2, 3, 1, 0]) == "ab<unk><pad>"
    with pytest.raises(UserError, match="empty"):
        CharacterVocabulary.of_texts([""])
    with pytest.raises(UserError, match="vocab_size=2"):
        CharacterVocabulary.of_texts(["a"], max_size=2)


def test_data_of_the_playbook_is_a_folder_of_parquet(tmp_path: Path) -> None:
    """Catches validation text that is trained on, and rows without text that end the run."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, texts in (("train", ["", "abab " * 40]), ("validation", ["abxy " * 20, " "])):
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, tmp_path / f"{name}-00000-of-00001.parquet")
    corpus = open_corpus(TextTraining(data=str(tmp_path), vocab_size=10))
    assert corpus.vocab_size == 5  # pad, unk, a, b, space
    assert corpus.unknown_rate == pytest.approx(0.4)
    assert len(corpus.train) == 200 and len(corpus.valid) == 100


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_data_custom_text(kind: str, tmp_path: Path) -> None:
    """Catches a format that only some commands read."""
    documents = [f"document number {n} says hello" for n in range(30)]
    file = tmp_path / f"mine.{kind}"
    rows = [json.dumps({"text": text}) for text in documents]
    file.write_text("\n\n".join(documents) if kind == "txt" else "\n".join(rows))
    corpus = open_corpus(TextTraining(data=str(file)))
    assert len(corpus.train) > len(corpus.valid) > 0 and corpus.unknown_rate == 0


@pytest.mark.parametrize("tokens", ["char", "bpe"])
def test_bits_per_byte_do_not_depend_on_the_tokens(tokens: str, tmp_path: Path) -> None:
    """Catches bytes that are counted in tokens: a text that is guessed uniformly costs log2(V)
    bits a token, however many bytes that is."""
    file = tmp_path / "mine.train.txt"
    file.write_text("größer und größer wird die Welt. " * 60)
    (tmp_path / "mine.valid.txt").write_text("größer wird die Welt. " * 20)
    settings = TextTraining(data=str(file), tokens=tokens, vocab_size=300)  # type: ignore[arg-type]
    corpus = open_corpus(settings)
    rows, num_bytes = corpus.validation_rows(16, 10**6)
    text = "größer wird die Welt. " * 20
    assert corpus.valid_bytes.sum() == len(
        text.encode().strip()
    ) or corpus.valid_bytes.sum() == len(text.encode())
    assert num_bytes == corpus.valid_bytes[1 : 16 * len(rows) + 1].sum()
    loss = math.log(corpus.vocab_size)
    found = text_metrics([loss] * len(rows), num_bytes, 16)
    assert found["perplexity"] == pytest.approx(corpus.vocab_size)
    expected = 16 * len(rows) * math.log2(corpus.vocab_size) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(expected)


def test_training_rows_cover_the_text_once_an_epoch() -> None:
    """Catches rows that are never read, and an order that depends on more than the seed."""
    corpus = open_corpus(TextTraining())
    count = corpus.num_rows(64)
    rows = corpus.batch(3, range(count), 64)
    assert rows.shape == (count, 65)
    assert len({tuple(row) for row in rows.tolist()}) == count
    np.testing.assert_array_equal(rows[5], corpus.batch(3, range(5, 6), 64)[0])
    assert not np.array_equal(rows, corpus.batch(4, range(count), 64))


def test_missing_variables_and_short_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a study of nothing."""
    monkeypatch.delenv("RXLM_DATA", raising=False)
    with pytest.raises(UserError, match="--data bundled"):
        open_corpus(TextTraining(data="$RXLM_DATA/text/books.train.txt.gz"))
    with pytest.raises(UserError, match="make no row"):
        open_corpus(TextTraining()).batch(0, range(1), 10**6)
