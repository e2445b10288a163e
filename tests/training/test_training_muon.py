"""Muon for matrices and AdamW for the rest, beside torch's two on their own; resume; refusals."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.model import LMNetwork
from rxlm.rxt.model import RxTNetwork
from rxlm.training.checkpoint import find_latest
from rxlm.training.described_model import described_model
from rxlm.training.dry_run import dry_run
from rxlm.training.muon import layer_matrices
from rxlm.training.optim import (
    build_optimizer,
    decay_groups,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from rxlm.training.recipes import read_recipe
from rxlm.training.settings import TrainSettings

NANO = Path(__file__).parents[2] / "stages" / "nano"
SETTINGS = TrainSettings(steps=1, optimizer="muon", lr=0.02, weight_decay=0.3, momentum=0.9)


class Small(nn.Module):
    """A table, two layers, a norm, and a gate that never decays."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.gate = nn.Linear(8, 1)
        self.gate.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.first(self.table(ids)))
        scores: Tensor = self.last(x) * self.gate(x).sigmoid()
        return scores


def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small()


def learn(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    ids = torch.arange(6)
    for _ in range(steps):
        nn.functional.cross_entropy(model(ids), ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_equals_the_two_optimizers_on_their_own() -> None:
    """Catches a parameter with the wrong optimizer, rate or decay, and one that is left out."""
    ours, theirs = small(), small()
    optimizer = build_optimizer(ours, decay_groups(ours, SETTINGS.weight_decay), SETTINGS)
    learn(ours, [optimizer], 4)
    matrices = [theirs.first.weight, theirs.last.weight]
    flat = [theirs.gate.weight, *(item for item in theirs.parameters() if item.ndim == 1)]
    common: dict[str, Any] = {"betas": SETTINGS.betas, "eps": SETTINGS.eps}
    learn(
        theirs,
        [
            torch.optim.Muon(
                matrices, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW([theirs.table.weight], lr=0.02, weight_decay=0.3, **common),
            torch.optim.AdamW(flat, lr=0.02, weight_decay=0.0, **common),
        ],
        4,
    )
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=name)


def test_tables_and_output_layers_are_no_matrices() -> None:
    """Catches an output layer, shared with the table or not, whose rows are made orthogonal."""
    for tied in (True, False):
        model = LMNetwork(
            LMConfig(vocab_size=20, dim=16, depth=1, num_heads=2, tie_embeddings=tied)
        )
        found = layer_matrices(model)
        names = {name for name, item in model.named_parameters() if id(item) in found}
        assert names, tied
        assert not {name for name in names if "head.weight" in name or "embedding" in name}


def test_state_goes_on_where_it_was() -> None:
    """Catches a momentum that begins anew after a resume, and a rate that reaches one part only."""
    whole, parts = small(), small()

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, decay_groups(model, 0.1), SETTINGS)

    one, first = optimizer_of(whole), optimizer_of(parts)
    learn(whole, [one], 2)
    learn(parts, [first], 2)
    second = optimizer_of(parts)
    load_optimizer_tensors(parts, second, optimizer_tensors(parts, first))
    for optimizer in (one, second):
        set_learning_rate(optimizer, 0.005)
    learn(whole, [one], 3)
    learn(parts, [second], 3)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_resumed_run_is_the_uninterrupted_one(toy: ModuleType, tmp_path: Path) -> None:
    """Catches state that checkpoints leave out."""
    values: dict[str, Any] = {"optimizer": "muon", "schedule": "constant"}
    toy.train(toy.ToyObjective(), tmp_path / "whole", steps=6, **values)
    toy.train(toy.ToyObjective(), tmp_path / "parts", steps=3, **values)
    toy.train(toy.ToyObjective(), tmp_path / "parts", steps=6, **values)
    folders = [find_latest(tmp_path / name) for name in ("whole", "parts")]
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in folders if folder is not None
    ]
    assert weights[0] == weights[1]


def test_the_other_optimizer_is_not_given_this_ones_state(toy: ModuleType, tmp_path: Path) -> None:
    """Catches a crash, or moments of zero without a word, where a run changes its optimizer."""
    toy.train(toy.ToyObjective(), tmp_path / "run", steps=2, optimizer="adamw")
    with pytest.raises(UserError, match=r"keeps momentum_buffer: train\.optimizer has changed"):
        toy.train(toy.ToyObjective(), tmp_path / "run", steps=4, optimizer="muon")


def test_deepspeed_is_refused() -> None:
    """Catches Muon on the flat pieces of matrices that ZeRO makes."""
    with pytest.raises(UserError, match="cuts them up"):
        TrainSettings.parse(
            {"steps": 1, "optimizer": "muon", "strategy": "deepspeed", "deepspeed": "zero2.json"},
            "train",
        )


def test_a_dry_run_counts_one_moment_of_a_matrix(tmp_path: Path) -> None:
    """Catches a memory estimate of two moments for what has one."""
    reports = {
        name: dry_run(
            read_recipe(NANO / "50_memory_aware.yaml", [f"train.optimizer={name}"]), tmp_path / "5"
        )
        for name in ("adamw", "muon")
    }
    network = RxTNetwork(described_model(NANO))
    found = layer_matrices(network)
    numbers = sum(item.numel() for item in network.parameters() if id(item) in found)
    saved = reports["adamw"].optimizer_bytes - reports["muon"].optimizer_bytes
    assert saved == 4 * numbers > 0
