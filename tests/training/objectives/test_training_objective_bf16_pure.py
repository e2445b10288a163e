"""Stages under ``precision: bf16_pure``, with every type of self-attention.

Not here: masters by themselves (test_training_master_weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.device import autocast
from rxlm.training.master_weights import MasterWeights
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer

KINDS = ("softmax", "gla", "deltanet", "gated_deltanet", "kda", "md_gdn")
SIZES = {"turns": 3, "dialogues": 2, "validation_dialogues": 2}


def model_of(tiny: Any, kind: str, **fields: Any) -> ReactiveModel:
    config = tiny.model(norm_type="adaptive").config.model_dump(mode="json")
    linear = {"use_linear_self_attn": True, "linear_attn_type": kind}
    for part in ("encoder", "decoder"):
        config[part] |= {**({} if kind == "softmax" else linear), **fields}
    torch.manual_seed(0)
    return ReactiveModel(config, tiny.tokenizer)


def memory_aware(tiny: Any, model: ReactiveModel) -> Any:
    settings = MemoryAwareSettings(phases=(Phase(turns=3, dialogues=2),), validation_dialogues=2)
    return tiny.objective(MemoryAwareObjective, settings, model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_float32(tiny: Any, kind: str) -> None:
    """Catches a product of mixed types on some path, a memory or a carried state in bfloat16, and
    gates that are rounded."""
    model = model_of(tiny, kind, use_moe=kind == "gated_deltanet", num_experts=3)
    objective = memory_aware(tiny, model)
    device = torch.device("cpu")
    exact = objective.loss(objective.batch(0, 0), 0).loss.item()
    MasterWeights(model)
    exact_names = {
        name.rpartition("memory_attention.")[2].rpartition("gates.")[2].rpartition("router.")[2]
        for name, param in model.named_parameters()
        if param.dtype == torch.float32
    }
    assert {"gate.bias", "gate.weight", "slot_norm.gate", "slot_norm.scale"} <= exact_names
    has_rate = kind in ("gated_deltanet", "kda", "md_gdn")
    assert ({"A_log", "dt_bias"} <= exact_names) == has_rate
    assert model.encoder.embedding.weight.dtype == torch.bfloat16
    assert len(exact_names) < 15
    assert model.initial_memory(2).dtype == torch.float32
    with autocast(device, "bf16_pure"):
        loss = objective.loss(objective.batch(0, 0), 0).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert all(
        torch.isfinite(param.grad).all()
        for param in model.parameters()
        if param.grad is not None
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["joint_lm", "sft", "memory_pretraining", "memory_aware"])
def test_every_stage_trains_and_validates(tiny: Any, tmp_path: Path, stage: str) -> None:
    """Catches a stage, a head of its own, or the generation of answers in validation that breaks
    on bfloat16 weights; and a frozen part that is saved rounded."""
    model = model_of(tiny, "gated_deltanet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = {
        "joint_lm": lambda: tiny.objective(JointLMObjective, JointLMSettings(**SIZES), model),
        "sft": lambda: tiny.objective(SFTObjective, SFTSettings(**SIZES), model),
        "memory_pretraining": lambda: tiny.objective(
            MemoryPretrainingObjective, MemoryPretrainingSettings(**SIZES), model
        ),
        "memory_aware": lambda: memory_aware(tiny, model),
    }[stage]()
    settings = TrainSettings(
        steps=2, precision="bf16_pure", validate_every=2, threads=1, loggers=()
    )
    run = RunFolder.open(tmp_path, objective.name, {})
    result = Trainer(objective, settings, run).train()
    assert result.status == "complete"
    assert result.checkpoint is not None
    saved = load_file(result.checkpoint / "model.safetensors")
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert bool(frozen) == (stage != "memory_aware")
    for name, value in saved.items():
        assert value.dtype == torch.float32, name
        assert name not in frozen or torch.equal(value, before[name]), name
