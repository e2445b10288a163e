"""The use of memory, the loss by turn and sample conversations, on tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rxlm.lm import LanguageModel
from rxlm.nn.attention import Attention, AttentionSettings
from rxlm.rxt.accounting import encoder_token_operations
from rxlm.rxt.unroll import EncodedTurns, answer_with_memory, encode_turns, scan_memory
from rxlm.training.checkpoint import find_latest
from rxlm.training.distributed.strategy import Strategy, put_on_device
from rxlm.training.held_bytes import peak_of
from rxlm.training.metrics import read_metrics
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.language_modeling import LMObjective, LMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer
from rxlm.training.update import run_update
from rxlm.training.watch import WatchSettings
from rxlm.training.watching.memory_use import (
    attention_weights,
    loss_by_turn,
    mean_loss,
    write_measures,
)
from rxlm.training.watching.samples import read_samples
from rxlm.training.watching.utilization import OperationCounter, count_forward

SETTINGS = MemoryAwareSettings(phases=(Phase(turns=3, dialogues=4),), validation_dialogues=4)


def test_write_measures_are_plain_sums() -> None:
    """Catches turns that do not exist counted as small writes, and pairs counted with themselves
    (L=1, B=2, N=2, S=3, D=4)."""
    memories = torch.randn(1, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True], [True], [True], [False]])
    found = write_measures(memories, EncodedTurns(torch.zeros(1, 4, 1, 4), mask), 2)
    changes = [(memories[:, 2 + i] - memories[:, i]).square() for i in range(3)]
    assert found["write_size"] == pytest.approx(float(torch.stack(changes).mean().sqrt()))
    cosines = [
        float(torch.cosine_similarity(memories[0, b, i], memories[0, b, j], dim=0))
        for b in (4, 5)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert found["slot_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 4)])
def test_attention_weights_are_those_of_the_module(heads: tuple[int, int]) -> None:
    """Catches an entropy of other weights than those with which the module reads."""
    generator = torch.Generator().manual_seed(0)
    attention = Attention(AttentionSettings(8, *heads, head_dim=4, rotary="none"))
    x, slots = (torch.randn(2, n, 8, generator=generator) for n in (5, 3))
    key_value = attention.project(slots, None)
    mask = torch.tensor([True, True, False]).expand(2, 1, 1, 3)
    weights = attention_weights(attention, x, key_value, mask, None)
    value = key_value.value.repeat_interleave(max(1, heads[0] // heads[1]), dim=2)
    heads_out = torch.einsum("bhtp,bphk->bthk", weights, value)
    expected = attention(x, key_value, mask, None)
    torch.testing.assert_close(attention.combine(heads_out, x), expected)


def test_memory_use_is_measured_on_the_same_answers(tiny: Any) -> None:
    """Catches a loss that is not that of the stage, and a gain of another batch."""
    objective = tiny.objective(MemoryAwareObjective, SETTINGS)
    objective.model.eval()
    with torch.no_grad():
        watched = objective.watch(WatchSettings(memory_dialogues=4, sample_dialogues=0)).metrics
        found = objective.validate()
    # The first four dialogues are all that validation measures, too.
    loss = found["loss"]
    assert watched["loss_zeroed"] - watched["memory_gain"] == pytest.approx(loss, abs=1e-5)
    assert 0 <= watched["read_entropy"] <= 1
    assert {f"loss_turn_{n}" for n in (1, 2, 3)} <= watched.keys()
    assert {"loss_chat", "loss_probe", "write_size", "slot_cosine"} <= watched.keys()


def test_read_entropy_has_its_two_ends(tiny: Any) -> None:
    """Catches an entropy that is not normalised: slots that are all alike are read alike."""
    objective = tiny.objective(MemoryAwareObjective, SETTINGS)
    objective.model.eval()
    for layer in objective.model.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attention.query.weight)
    watched = objective.watch(WatchSettings(memory_dialogues=2, sample_dialogues=0)).metrics
    assert watched["read_entropy"] == pytest.approx(1.0, abs=1e-5)


def test_loss_by_turn_adds_up(tiny: Any) -> None:
    """Catches turns mixed up with dialogues (the weighted means must make the whole)."""
    objective = tiny.objective(MemoryAwareObjective, SETTINGS.model_copy(update={"probes": 0}))
    model = objective.model.eval()
    batch = objective.batch(0, 0)
    with torch.no_grad():
        encoded = encode_turns(model.encoder, batch)
        slots = model.initial_memory(batch.num_dialogues, seed=batch.memory_seed)
        memories = scan_memory(model.memory_attention, slots, encoded, batch.num_turns)
        answers = answer_with_memory(model.decoder, batch, memories)
    by_turn = loss_by_turn(answers, batch.num_dialogues)
    counts = dict.fromkeys(by_turn, 0)
    for item in answers:
        for place in item.place[item.row].tolist():
            counts[f"loss_turn_{place // batch.num_dialogues + 1}"] += 1
    total = sum(by_turn[name] * counts[name] for name in by_turn) / sum(counts.values())
    assert total == pytest.approx(mean_loss(answers), rel=1e-5)


def test_sft_measures_turns_and_a_run_writes_samples(tiny: Any, tmp_path: Path) -> None:
    """Catches measures and samples that never reach the run folder, and training that they
    change."""
    sft = tiny.objective(SFTObjective, SFTSettings(turns=3, dialogues=2))
    sft.model.eval()
    with torch.no_grad():
        measures = sft.watch(WatchSettings()).metrics
    assert measures.keys() == {"loss_turn_1", "loss_turn_2", "loss_turn_3"}
    assert all(math.isfinite(value) for value in measures.values())

    weights = []
    for name, watch in (
        ("on", {"sample_tokens": 4}),
        ("off", {"mfu": False, "sample_dialogues": 0}),
    ):
        objective = tiny.objective(MemoryAwareObjective, SETTINGS, model=tiny.model(dropout=0.2))
        settings = TrainSettings(
            steps=2, validate_every=1, log_every=1, tensorboard=False, watch=watch
        )
        run = RunFolder.open(tmp_path / name, objective.name, {})
        Trainer(objective, settings, run).train()
        checkpoint = find_latest(run.path)
        assert checkpoint is not None
        weights.append(load_file(checkpoint / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    samples = read_samples(tmp_path / "on")
    assert [(line["step"], line["dialogue"]) for line in samples] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert all(turn.keys() == {"query", "expected", "answer"} for turn in samples[0]["turns"])
    line = read_metrics(tmp_path / "on" / "metrics.jsonl")[-1]
    assert {"memory_gain", "read_entropy", "loss_turn_3"} <= line.keys()
    assert read_samples(tmp_path / "off") == []


def test_counted_operations_are_those_of_the_accounting(tiny: Any) -> None:
    """Catches attention that is not counted: the rules of ``rxlm.rxt.accounting`` say the same of
    an encoder over one row (they count what a token sees, here all of it)."""
    encoder = tiny.model().encoder
    ids = torch.ones(1, 32, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), OperationCounter() as counter:
        encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    assert counter.total == 32 * encoder_token_operations(encoder, 32)


def test_checkpointing_of_turns_is_advised_where_there_are_any(tiny: Any) -> None:
    """Catches advice to compute turns again in a stage where that has no effect (a warning)."""
    sft = tiny.objective(SFTObjective, SFTSettings(turns=3, dialogues=2))
    assert sft.memory_saving.checkpointing == ("layers",)
    aware = tiny.objective(MemoryAwareObjective, SETTINGS)
    assert aware.memory_saving.checkpointing == ("layers", "both")


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_the_same_whichever_kernel(backend: SDPBackend) -> None:
    """Catches attention that is counted twice (as a whole and by its parts) or, in a kernel without
    a formula, not at all; grouped heads; and products outside that are missed."""
    q, k = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 7, 8)
    v = torch.ones(2, 2, 7, 8)
    with torch.no_grad(), sdpa_kernel(backend), OperationCounter() as counter:
        if backend == SDPBackend.MATH:
            scaled_dot_product_attention(q, k, value=v, enable_gqa=True)
        else:
            k, v = (item.repeat_interleave(2, dim=1) for item in (k, v))
            scaled_dot_product_attention(query=q, key=k, value=v)
        q @ k.transpose(-1, -2)[:, :1]
    assert counter.total == 2 * (2 * 4 * 5 * 7 * (8 + 8)) + 2 * (2 * 4 * 5 * 7 * 8)


def test_counting_needs_less_memory_than_a_step(tiny: Any) -> None:
    """Catches scores of all pairs of tokens (T x T), which no step holds: a run that fits must not
    run out of memory at its first log line."""
    length = 512
    config = {
        "vocab_size": tiny.tokenizer.vocab_size, "attention": "softmax", "num_heads": 8, "dim": 32,
        "depth": 1, "ff_dim": 32, "max_seq_len": length,
    }  # fmt: skip
    rows = TextRows(["A long text about nothing. " * 400], tiny.tokenizer, length)
    objective = LMObjective(
        LanguageModel(config, tiny.tokenizer), rows, rows, LMSettings(batch_size=2, num_buckets=1)
    )
    settings, device = TrainSettings(steps=1), torch.device("cpu")
    optimizer, _ = put_on_device(objective, settings, device)
    strategy = Strategy(objective, optimizer, settings, device)
    batch = objective.batch(0, 0)
    assert batch[0].ids.shape[1] > length - 2
    run_update(strategy, [batch], 0, device)
    step = peak_of(lambda: run_update(strategy, [batch], 0, device), device)
    count = peak_of(lambda: count_forward(objective, batch, 0, device, "fp32"), device)
    assert count < step
