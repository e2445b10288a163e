"""Rows of every kind of corpus: the same ones wherever the tokens are, and resumable."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import rxlm.training.corpus as corpus_module
from rxlm.data.data_config import DataConfig
from rxlm.data.order import sample_index
from rxlm.data.records import DataSummary
from rxlm.errors import RunError, UserError
from rxlm.lm import LanguageModel
from rxlm.tokenization import Tokenizer
from rxlm.training.corpus import (
    RowSettings,
    check_long_enough,
    open_rows,
    open_stream,
    token_cache,
)
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.objectives.language_modeling import LMObjective, LMSettings
from rxlm.training.objectives.packed_rows import PackedRows, pack_lengths
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.texts import Split, iter_texts, open_texts
from rxlm.training.trainer import Trainer

SPLITS: tuple[Split, ...] = ("train", "valid")
TEXTS = [f"Text number {number}: " + "word and " * (number % 13) for number in range(61)]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_rows_are_consecutive_pieces_of_documents(tiny_tokenizer: Tokenizer) -> None:
    """Catches another order or another cut than runs had before rows were mapped from files."""
    rows = TextRows(TEXTS, tiny_tokenizer, 16, seed=5)
    pieces: list[list[list[int]]] = []
    for ids in tiny_tokenizer.encode_batch(TEXTS):
        cut = [ids[start : start + 14] for start in range(0, len(ids), 14)]
        document = [[tiny_tokenizer.bos_id, *part] for part in cut]
        document[-1].append(tiny_tokenizer.eos_id)
        pieces.append(document)
    for num_rows in (1, 3):
        windows = [
            document[start : start + num_rows]
            for document in pieces
            for start in range(0, len(document), num_rows)
        ]
        assert rows.size(num_rows) == len(windows)
        for position in range(2 * len(windows)):
            wanted = windows[sample_index(5, position, len(windows))]
            assert [row.ids for row in rows.sample(position, num_rows)] == wanted
    assert list(rows.rows()) == [row for document in pieces for row in document]
    assert rows.row_lengths().tolist() == [len(row) for document in pieces for row in document]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_mapped_rows_are_those_in_memory(
    tmp_path: Path, corpus: str, tiny_tokenizer: Tokenizer, split: Any
) -> None:
    """Catches a run whose data changes with the place of its tokens, or a hold-out that leaks."""
    settings = RowSettings(tiny_tokenizer, 16)
    data = DataConfig(text=corpus, max_texts=50)
    memory = open_rows(data, split, settings)
    cached = data.model_copy(update={"token_cache": str(tmp_path / "cache")})
    summary = DataSummary()
    mapped = open_rows(cached, split, settings, summary)
    assert summary.num_records == 61
    size = memory.size(1)
    assert mapped.size(1) == size > 1
    for position in range(size):
        assert mapped.sample(position, 1) == memory.sample(position, 1)


def test_packed_rows_hold_every_piece_once(tiny_tokenizer: Tokenizer) -> None:
    """Catches pieces lost, doubled or cut by packing, rows that are too long or half empty."""
    rows = TextRows(TEXTS, tiny_tokenizer, 40)
    packed = PackedRows(rows)
    seen: Counter[tuple[int, ...]] = Counter()
    for position in range(packed.size(1)):
        pieces = packed.sample(position)
        assert sum(len(piece.ids) for piece in pieces) <= 40
        seen.update(tuple(piece.ids) for piece in pieces)
    assert seen == Counter(tuple(row) for row in rows.rows())
    assert packed.fill > 0.85 and packed.size(1) < rows.size(1)
    assert pack_lengths([5, 9, 4, 1, 10], 10) == [[4], [1, 3], [0, 2]]


def make(rows: Any, valid: Any, tokenizer: Tokenizer, accumulation: int = 1, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {"dim": 8, "depth": 1, "num_heads": 2, "ff_dim": 8, "max_seq_len": 40}
        model = LanguageModel(
            {**config, "vocab_size": tokenizer.vocab_size, "attention": "gated_deltanet"}, tokenizer
        )
    settings = LMSettings(**{"batch_size": 3, "validation_rows": 4, **more})
    return LMObjective(model, rows, valid, settings, accumulation=accumulation)


def test_packed_loss_is_that_of_the_pieces(tiny_tokenizer: Tokenizer) -> None:
    """Catches a target across two documents, and a packed update that learns something else."""
    rows = TextRows(TEXTS, tiny_tokenizer, 40)
    packed = PackedRows(rows)
    objective = make(packed, packed, tiny_tokenizer, packing=True, batch_size=4, num_buckets=2)
    objective.model.double()
    batch = objective.batch(0, 0)
    output = objective.loss(batch, 0)
    output.loss.backward()
    packed_gradient = objective.model.embedding.weight.grad.clone()
    objective.model.zero_grad()
    total, count = 0.0, 0
    for position in range(4):
        for piece in packed.sample(position):
            ids = torch.tensor([piece.ids])
            hidden = objective.model(ids[:, :-1])[0]
            loss, _ = objective.model.cross_entropy(hidden[0], ids[0, 1:], reduction="sum")
            total, count = total + loss, count + len(piece.ids) - 1
    (total / count).backward()  # type: ignore[attr-defined]
    assert output.num_targets == count == objective.count_targets(batch)
    torch.testing.assert_close(output.loss, total / count, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(objective.model.embedding.weight.grad, packed_gradient)
    parts = [objective.shard(batch, rank, 2) for rank in range(2)]
    assert sum(objective.count_targets(part) for part in parts) == count


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_is_read_by_position(
    corpus: str, tiny_tokenizer: Tokenizer, packing: bool
) -> None:
    """Catches micro-batches that depend on how far was read ahead, lanes that read the same
    documents, validation documents that are trained on, and a state that resumes elsewhere."""
    data = DataConfig(text=corpus, streaming=True, stream_block=7)
    settings = RowSettings(tiny_tokenizer, 40, packing)
    rows, valid = open_stream(data, settings, 2, 10)
    epoch = [[rows.micro_batch(step, lane, 3) for lane in range(2)] for step in range(20)]
    assert rows.micro_batch(4, 1, 3) == epoch[4][1], "an earlier one, asked for again"
    rows.trained(6)
    state = json.loads(json.dumps(rows.state_dict()))
    fresh, _ = open_stream(data, settings, 2, 10)
    fresh.load_state_dict(state)
    for step in (6, 9, 19):
        assert [fresh.micro_batch(step, lane, 3) for lane in range(2)] == epoch[step]
    # As two processes see it: each reads its own lane; together they know where training is.
    parts = []
    for lane in range(2):
        own, _ = open_stream(data, settings, 2, 10)
        for step in range(6):
            own.micro_batch(step, lane, 3)
        own.trained(6)
        parts.append(own.state_dict())
    assert rows.merged(parts) == state

    def documents(batches: list[Any]) -> set[str]:
        pieces = [piece.ids for batch in batches for row in batch for piece in row]
        texts = [tiny_tokenizer.decode(ids) for ids in pieces]
        return {text.split(":")[0] for text in texts if text.startswith("Text number")}

    lanes = [documents([step[lane] for step in epoch[:3]]) for lane in range(2)]
    assert not lanes[0] & lanes[1] and min(map(len, lanes)) > 3
    held_out = documents([[valid.sample(position, 1)] for position in range(valid.size(1))])
    everything = documents([batch for step in epoch for batch in step])
    assert held_out == {f"Text number {number}" for number in (19, 39, 59)}
    assert not held_out & everything and len(everything) == 58
    with pytest.raises(UserError, match="Resume with that"):
        open_stream(data, settings, 3, 10)[0].load_state_dict(state)


def test_streaming_run_resumes_exactly(
    tmp_path: Path, corpus: str, tiny_tokenizer: Tokenizer
) -> None:
    """Catches a resumed run that reads on where reading ahead was, and results that depend on the
    number of workers."""
    data = DataConfig(text=corpus, streaming=True, stream_block=7)
    weights, lines = [], []
    for name, starts in (
        ("whole", [{"prefetch": 0}]),
        ("workers", [{"prefetch": 6, "prefetch_workers": 3}]),
        ("resumed", [{"prefetch": 4, "steps": 3}, {"prefetch": 2}]),
    ):
        for start in starts:
            rows, valid = open_stream(data, RowSettings(tiny_tokenizer, 40, True), 2, 10)
            objective = make(rows, valid, tiny_tokenizer, 2, packing=True)
            settings = TrainSettings(
                **{
                    "steps": 8,
                    "accumulation": 2,
                    "threads": 1,
                    "loggers": [],
                    "log_every": 1,
                    "schedule": "constant",
                    "validate_every": 4,
                    **start,
                }
            )
            run = RunFolder.open(tmp_path / name, "lm", {})
            Trainer(objective, settings, run).train()
        weights.append(objective.model.state_dict())
        records = [
            {key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if line["kind"] == "train"
        ]
        lines.append(records)
    for other in (1, 2):
        torch.testing.assert_close(weights[other], weights[0], rtol=0, atol=0)
        assert lines[other] == lines[0]
    status = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert status["data"]["train"]["records"] > 20


def test_a_stream_that_holds_nothing_out_says_so(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    """Catches a message about readers where a text is too short for its held-out share."""
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:19]))
    settings = RowSettings(tiny_tokenizer, 40)
    data = DataConfig(text=str(path), streaming=True)
    with pytest.raises(UserError, match=r"19 record.*one in 20.*valid_fraction=0\.05") as caught:
        open_stream(data, settings, 1, 10)
    assert "data.streaming=false" in str(caught.value)
    open_stream(data.model_copy(update={"valid_fraction": 0.1}), settings, 1, 10)
    (tmp_path / "few.valid.jsonl").write_text(json.dumps({"text": "Held out."}) + "\n")
    folder = DataConfig(text=str(tmp_path), streaming=True)
    assert open_stream(folder, settings, 1, 10)[1].size(1) == 1


def test_a_stream_is_not_resumed_without_streaming(
    tmp_path: Path, corpus: str, tiny_tokenizer: Tokenizer
) -> None:
    """Catches an internal error where a setting was changed."""
    data = DataConfig(text=corpus, streaming=True, stream_block=7)
    rows, valid = open_stream(data, RowSettings(tiny_tokenizer, 40), 1, 10)
    for source, steps in ((rows, 1), (valid, 2)):
        objective = make(source, valid, tiny_tokenizer, 2)
        run = RunFolder.open(tmp_path / "run", "lm", {})
        settings = TrainSettings(steps=steps, threads=1, loggers=[], watch={"mfu": False})
        if source is rows:
            Trainer(objective, settings, run).train()
        else:
            with pytest.raises(UserError, match=r"data\.streaming=true"):
                Trainer(objective, settings, run).train()


def test_mixture_rows(tmp_path: Path, corpus: str, tiny_tokenizer: Tokenizer) -> None:
    """Catches a source read in another order than alone, and a run that goes on after its mixture
    has ended."""
    other = tmp_path / "b.txt"
    other.write_text("\n\n".join(f"Other {number}" for number in range(40)))
    mixture = [{"text": corpus, "weight": 3}, {"text": str(other), "weight": 1}]
    settings = RowSettings(tiny_tokenizer, 300)
    data = DataConfig.parse({"mixture": mixture, "mixture_stop": "first_exhausted"})
    rows = open_rows(data, "train", settings)
    first = open_rows(DataConfig(text=corpus), "train", settings)
    texts = [tiny_tokenizer.decode(rows.sample(position, 1)[0].ids) for position in range(1000)]
    own = [position for position, text in enumerate(texts) if text.startswith("Text")]
    assert len(own) == 750
    for number, position in enumerate(own):
        assert rows.sample(position, 1) == first.sample(number, 1)
    with pytest.raises(UserError, match=r"the mixture ends after \d+ \(data\.mixture_stop=first"):
        check_long_enough(rows, 1, 8, 100)
    check_long_enough(rows, 1, 8, 5)
    endless = DataConfig.parse({"mixture": mixture})
    check_long_enough(open_rows(endless, "train", settings), 1, 8, 10**6)


@pytest.mark.parametrize("max_texts", [None, 50])
def test_large_texts_are_not_held(
    tmp_path: Path,
    corpus: str,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    max_texts: int | None,
) -> None:
    """Catches other documents in a split when the text is too large to hold, and a default cache
    that is not used, or not where it was asked for."""
    data = DataConfig(text=corpus, max_texts=max_texts)
    wanted = {split: open_texts(data, split) for split in SPLITS}
    monkeypatch.setattr("rxlm.training.texts.LARGE", 1)
    monkeypatch.setenv("RXLM_CACHE", str(tmp_path / "cache"))
    for split in SPLITS:
        assert list(iter_texts(data, split, DataSummary())) == wanted[split]
        assert token_cache(data, split) == tmp_path / "cache" / "tokens"
        rows = open_rows(data, split, RowSettings(tiny_tokenizer, 300))
        assert rows.size(1) == len(wanted[split])
    (store,) = [item for item in (tmp_path / "cache" / "tokens").iterdir() if item.suffix == ""]
    assert (store / "info.json").is_file()
    assert token_cache(data.model_copy(update={"token_cache": None}), "train") is None
    with pytest.raises(UserError, match="cannot be known by its content"):
        token_cache(DataConfig(text="hf://a/b", token_cache="x"), "train")


def test_files_that_change_are_not_kept(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tokens of another content, kept forever under the hash of what a file was before
    the lock was waited for."""
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("hello\n\nworld")
    data = DataConfig(text=str(path), token_cache=str(cache), valid_fraction=0.5)
    settings = RowSettings(tiny_tokenizer, 64)
    build = corpus_module.open_store

    def changed_first(*arguments: Any, **more: Any) -> Any:
        path.write_text("other\n\nwords")
        return build(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "open_store", changed_first)
        with pytest.raises(RunError, match=r"a\.txt: the files changed while they were read"):
            open_rows(data, "train", settings)
    assert not [item for item in cache.iterdir() if item.is_dir() and item.name != "hashes"]
    for texts in (["hello", "world"], ["other", "words"]):
        path.write_text("\n\n".join(texts))
        rows = open_rows(data, "train", settings)
        assert tiny_tokenizer.decode(rows.sample(0, 1)[0].ids) == texts[0]


def test_a_stream_resumes_only_in_the_same_files(
    tmp_path: Path, tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a resumed run that reads other records without a word when a file was added, taken
    away, or written anew; and one that is refused because its data was moved."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "bc":
        (folder / f"{name}.txt").write_text("\n\n".join(f"{name} {n}" for n in range(20)))

    def stream() -> Any:
        data = DataConfig(text=str(folder), streaming=True, stream_block=3)
        return open_stream(data, RowSettings(tiny_tokenizer, 40), 2, 2)[0]

    rows = stream()
    rows.micro_batch(0, 0, 3)
    rows.trained(1)
    state = json.loads(json.dumps(rows.merged([rows.state_dict(), stream().state_dict()])))
    stream().load_state_dict(state)
    (folder / "a.txt").write_text("new")
    with pytest.raises(UserError, match=r"not what the run has read \(new: a\.txt \(3 bytes\)\)"):
        stream().load_state_dict(state)
    (folder / "a.txt").unlink()
    text = (folder / "c.txt").read_text()
    (folder / "c.txt").write_text(text + "!")
    size = len(text)
    with pytest.raises(
        UserError, match=rf"any more: c\.txt \({size} bytes\); new: c\.txt \({size + 1} bytes\)"
    ):
        stream().load_state_dict(state)
    (folder / "c.txt").write_text(text)
    folder = folder.rename(tmp_path / "moved")
    stream().load_state_dict(state)
    old = {name: state[name] for name in ("num_lanes", "lanes")}
    stream().load_state_dict(old)
    assert "does not say which files" in caplog.text
