"""Stage ``lm``: rows, loss, accumulation, precision, resuming, fine-tuning, loggers."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rxlm.data import DialogueGenerator
from rxlm.data.conversation_source import GeneratedConversations
from rxlm.errors import UserError
from rxlm.lm import LanguageModel
from rxlm.ops import losses
from rxlm.tokenization import Tokenizer, encode_interaction
from rxlm.training import loggers
from rxlm.training.checkpoint import find_latest
from rxlm.training.distributed.strategy import Strategy
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.objectives.dialogue_rows import DialogueRows
from rxlm.training.objectives.language_modeling import LMObjective, LMSettings, bucketed_rows
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.optim import build_optimizer
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer, TrainResult
from rxlm.training.update import run_update

TEXTS = [
    f"{name} lives in {town} and likes {food}."
    for name in ("Ann", "Bob", "Cleo", "Dan")
    for town in ("Paris", "Rome", "a very small village far away")
    for food in ("tea", "figs")
]
CONFIG = {"dim": 16, "depth": 2, "num_heads": 2, "ff_dim": 24, "max_seq_len": 24}


def make(
    tokenizer: Tokenizer, batch_size: int = 4, accumulation: int = 1, **config: Any
) -> LMObjective:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LanguageModel(
            {**CONFIG, "vocab_size": tokenizer.vocab_size, "attention": "gla", **config}, tokenizer
        )
    rows = TextRows(TEXTS, tokenizer, 24)
    settings = LMSettings(batch_size=batch_size, validation_rows=8)
    return LMObjective(model, rows, rows, settings, accumulation=accumulation)


def train(objective: LMObjective, folder: Path, **settings: Any) -> TrainResult:
    defaults: dict[str, Any] = {"steps": 6, "lr": 0.01, "threads": 1, "loggers": []}
    resolved = TrainSettings(**{**defaults, **settings})
    run = RunFolder.open(folder, objective.name, {"train": resolved.model_dump()})
    return Trainer(objective, resolved, run).train()


def test_loss_is_that_of_single_documents(tiny_tokenizer: Tokenizer) -> None:
    """Catches tokens read across documents, a padded target, a shifted label, a lost [EOS]."""
    objective = make(tiny_tokenizer, batch_size=6)
    objective.model.double()
    output = objective.loss(objective.batch(0, 0), 0)
    nats, count = 0.0, 0
    for position in range(6):
        ids = torch.tensor([objective.train_rows.sample(position, 1)[0].ids])
        logits = objective.model.logits(objective.model(ids)[0])[0, :-1]
        nats += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").detach())
        count += ids.shape[1] - 1
    assert output.num_targets == count
    assert float(output.loss.detach()) == pytest.approx(nats / count, rel=1e-6)
    one = bucketed_rows([[1, 2], [1, 2, 3, 4]], 2, 0)
    assert [rows.ids.tolist() for rows in one] == [[[1, 2]], [[1, 2, 3, 4]]]


@pytest.mark.parametrize("tied", [True, False])
def test_scores_in_chunks_change_nothing(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """Catches a loss, an accuracy or a gradient of the (tied) head that depends on how many rows'
    scores fit into memory."""
    found = []
    for limit in (losses.WHOLE_SCORES, 1):
        monkeypatch.setattr(losses, "WHOLE_SCORES", limit)
        monkeypatch.setattr(losses, "FEWEST_ROWS", 7)
        objective = make(tiny_tokenizer, batch_size=8, tie_embeddings=tied)
        objective.model.double()
        output = objective.loss(objective.batch(0, 0), 0)
        output.loss.backward()
        grads = [parameter.grad for parameter in objective.model.parameters()]
        with torch.no_grad():
            found.append((output.loss, output.metrics, grads, objective.validate()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_accum_4x16_equals_1x64(tiny_tokenizer: Tokenizer) -> None:
    """Catches accumulation that averages micro-batches instead of weighting their tokens."""
    gradients = []
    for accumulation, batch_size in ((4, 16), (1, 64)):
        objective = make(tiny_tokenizer, batch_size, accumulation)
        settings = TrainSettings(steps=1, accumulation=accumulation, grad_clip=None)
        groups = objective.parameter_groups(settings)
        optimizer = build_optimizer(objective.model, groups, settings)
        batches = [objective.batch(0, index) for index in range(accumulation)]
        counts = {objective.loss(batch, 0).num_targets for batch in batches}
        assert accumulation == 1 or len(counts) > 1, "micro-batches differ in their targets"
        strategy = Strategy(objective, optimizer, settings, torch.device("cpu"))
        run_update(strategy, batches, 0, torch.device("cpu"))
        gradients.append([parameter.grad for parameter in objective.model.parameters()])
    for many, once in zip(*gradients, strict=True):
        assert many is not None
        assert (many - once).abs().max() < 1e-6


def test_bf16_keeps_fp32_weights_and_the_loss(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches weights or optimizer states in bf16, and arithmetic that loses the loss."""
    losses = {}
    for precision in ("fp32", "bf16"):
        objective = make(tiny_tokenizer, batch_size=4, depth=1)
        result = train(
            objective, tmp_path / precision, steps=50, precision=precision, validate_every=50
        )
        losses[precision] = result.metrics["validation/loss"]
        assert all(weight.dtype == torch.float32 for weight in objective.model.parameters())
        assert result.checkpoint is not None
        moments = load_file(result.checkpoint / "train" / "optimizer.safetensors")
        assert {tensor.dtype for tensor in moments.values() if tensor.numel() > 1} == {
            torch.float32
        }
    assert losses["fp32"] < 0.8 * math.log(tiny_tokenizer.vocab_size), "it learned something"
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_resume_is_bit_equal(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Catches a batch, dropout or validation that depends on where the run was stopped."""
    options: dict[str, Any] = {"log_every": 2, "validate_every": 3, "accumulation": 2}
    train(make(tiny_tokenizer, 3, 2, dropout=0.2), tmp_path / "whole", **options)
    stopped = make(tiny_tokenizer, 3, 2, dropout=0.2)
    after_step = stopped.after_step

    def stop(step: int, metrics: Any) -> None:
        after_step(step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    stopped.after_step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "cut", **options, save_every=1)
    train(make(tiny_tokenizer, 3, 2, dropout=0.2), tmp_path / "cut", **options, save_every=1)
    folders = [find_latest(tmp_path / name) for name in ("whole", "cut")]
    for name in ("model", "train/optimizer", "train/rng"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in folders if folder)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    lines = [
        [
            {key: value for key, value in line.items() if key not in TIMING_FIELDS}
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_resume_of_another_architecture_is_refused(
    tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Catches weights of one mixer continued by another that happens to have the same shapes."""
    train(make(tiny_tokenizer), tmp_path, steps=1)
    with pytest.raises(UserError, match="num_heads"):
        train(make(tiny_tokenizer, num_heads=4), tmp_path, steps=2)
    train(make(tiny_tokenizer, dropout=0.5), tmp_path, steps=2)


class FakeTracker(types.ModuleType):
    """Stands for wandb or trackio: remembers what it was told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeTracker:
        self.inits.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_logging_tells_every_logger(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a logger that is not opened, not told, not closed, or does not know a resumed run;
    and a logger that is missing noticed only after training."""
    trackers = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    find_spec = loggers.importlib.util.find_spec
    monkeypatch.setattr(
        loggers.importlib.util, "find_spec", lambda name: trackers.get(name) or find_spec(name)
    )
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    options: dict[str, Any] = {"loggers": ["tensorboard"], "log_every": 1, "validate_every": 2}
    options |= {"wandb_project": "lalm", "trackio_project": "here"}
    train(make(tiny_tokenizer), tmp_path / "run", steps=2, **options)
    train(make(tiny_tokenizer), tmp_path / "run", steps=3, **options)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    for tracker, project in ((trackers["wandb"], "lalm"), (trackers["trackio"], "here")):
        assert [init["project"] for init in tracker.inits] == [project] * 2
        assert tracker.inits[0]["name"] == tracker.inits[1]["name"]
        assert tracker.finished == 2
        seen = {(step, name) for step, values in tracker.points for name in values}
        assert {(1, "train/loss"), (3, "train/loss"), (2, "validation/perplexity")} <= seen
    ids = json.loads((tmp_path / "run" / loggers.TRACKER_FILE).read_text())
    assert [init["id"] for init in trackers["wandb"].inits] == [ids["wandb"]] * 2


def test_logging_is_optional_and_missing_packages_are_named(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails late, or silently goes without the tracker that was asked for."""
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"asks for wandb, which is not installed: pip install"):
        train(make(tiny_tokenizer), tmp_path / "a", wandb_project="lalm")
    train(make(tiny_tokenizer), tmp_path / "b", steps=1, loggers=["tensorboard"])
    assert not (tmp_path / "b" / "tensorboard").exists()
    assert TrainSettings(steps=1, tensorboard=False).loggers == ()
    assert TrainSettings(steps=1, wandb_project="x").loggers == ("tensorboard", "wandb")


def interactions_objective(tokenizer: Tokenizer, length: int = 64, turns: int = 3) -> LMObjective:
    """Return an objective on built-in dialogues as interactions."""
    config = {**CONFIG, "vocab_size": tokenizer.vocab_size, "attention": "softmax"}
    source = GeneratedConversations(DialogueGenerator())
    rows = DialogueRows(source, tokenizer, length, turns, 10)
    settings = LMSettings(batch_size=4, validation_rows=8, interactions=True)
    return LMObjective(LanguageModel(config, tokenizer), rows, rows, settings)


def test_only_answers_of_a_conversation_are_learned(tiny_tokenizer: Tokenizer) -> None:
    """Catches queries that are learned, a turn that is not read, and a lost [A] or [EOS]."""
    objective = interactions_objective(tiny_tokenizer)
    rows = objective.batch(0, 0)
    assert sum(len(bucket.ids) for bucket in rows) == 4
    conversation = DialogueGenerator().conversation(0, 3)
    turns = [
        encode_interaction(tiny_tokenizer, t.query, t.answer) for t in conversation.interactions
    ]
    kept, learned = [], []
    for turn in turns:
        if len(kept) + len(turn.ids) > 64:
            break
        kept += turn.ids
        learned += turn.ids[turn.answer_start :]
    found = [
        (
            bucket.ids[row][bucket.mask[row]].tolist(),
            bucket.ids[row, 1:][bucket.targets[row]].tolist(),
        )
        for bucket in rows
        for row in range(len(bucket.ids))
    ]
    assert (kept, learned) in found
    output = objective.loss(rows, 0)
    assert output.num_targets == sum(len(part[1]) for part in found)
    parts = [objective.shard(rows, rank, 2) for rank in range(2)]
    assert sum(objective.count_targets(part) for part in parts) == output.num_targets


def test_interactions_refuse_what_they_cannot_read(tiny_tokenizer: Tokenizer) -> None:
    """Catches turns that are cut in the middle, and settings that contradict each other."""
    with pytest.raises(ValueError, match="choose one"):
        LMSettings(packing=True, interactions=True)
    with pytest.raises(UserError, match="seq_len"):
        interactions_objective(tiny_tokenizer, length=8).batch(0, 0)
    with torch.no_grad():
        found = interactions_objective(tiny_tokenizer).validate()
    assert set(found) == {"loss", "perplexity", "accuracy"}
