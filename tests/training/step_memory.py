"""Prints what a step is estimated to take and what it takes. Not a test file.

``python step_memory.py ATTENTION CHECKPOINTING ACCUMULATION``
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from rxlm.data import DialogueGenerator, GeneratedConversations, conversation_texts
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.distributed.strategy import Strategy
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.optim import build_optimizer
from rxlm.training.settings import TrainSettings
from rxlm.training.step_estimate import estimate_step
from rxlm.training.update import run_update

CPU = torch.device("cpu")


def build(
    kind: str, accumulation: int, dim: int = 128, dialogues: int = 16
) -> MemoryAwareObjective:
    generator = DialogueGenerator()
    texts = conversation_texts(generator.conversation(index, 4) for index in range(50))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=400))
    part = {
        "num_layers": 2, "vocab_size": tokenizer.vocab_size, "embed_dim": dim, "ff_dim": 4 * dim,
        "att_heads": 4, "seq_len": 128, "stm_size": 16, "self_att_type": kind,
        "cross_att_type": "mha", "tie_embeddings": True,
    }  # fmt: skip
    memory = {
        "variant": "simple", "num_layers": 2, "embed_dim": dim, "att_heads": 4, "att_type": "mha",
        "stm_size": 16, "seq_len": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = ReactiveModel({"encoder": part, "decoder": part, "memory_attention": memory}, tokenizer)
    settings = MemoryAwareSettings(phases=(Phase(turns=4, dialogues=dialogues),))
    return MemoryAwareObjective(
        model,
        GeneratedConversations(generator, "train"),
        GeneratedConversations(generator, "valid"),
        TurnEncoder(tokenizer, 128),
        settings,
        seed=0,
        accumulation=accumulation,
    )


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def ready(
    objective: MemoryAwareObjective, settings: TrainSettings
) -> tuple[Strategy, list[Any], int]:
    """Return what makes steps, the batches of one, and the bytes of the weights."""
    accumulation = settings.accumulation
    batches = [objective.batch(0, index) for index in range(accumulation)]
    module = objective.trained_modules()
    weights = sum(item.numel() * item.element_size() for item in module.parameters())
    checkpointing = settings.gradient_checkpointing
    objective.set_gradient_checkpointing(
        layers=checkpointing in ("layers", "both"), turns=checkpointing in ("turns", "both")
    )
    optimizer = build_optimizer(module, objective.parameter_groups(settings), settings)
    objective.set_training_mode()
    return Strategy(objective, optimizer, settings, CPU), batches, weights


def main() -> None:
    kind, checkpointing, accumulation = sys.argv[1], sys.argv[2], int(sys.argv[3])
    settings = TrainSettings(
        steps=2, gradient_checkpointing=checkpointing, accumulation=accumulation, threads=1
    )
    torch.set_num_threads(1)
    # Enough that a few MB of the allocator's own do not decide.
    dialogues = 16 if checkpointing == "none" else 32
    # First a small one: what the first step of a process loads (libraries, code) is no tensor.
    strategy, batches, _ = ready(build(kind, accumulation, dim=16, dialogues=4), settings)
    run_update(strategy, batches, 0, CPU)
    # Then the real one: what a process has freed, it may use again without growing.
    strategy, batches, weights = ready(build(kind, accumulation, dialogues=dialogues), settings)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for step in range(2):
        run_update(strategy, batches, step, CPU)
    real = resident("VmHWM") - before + weights
    again = build(kind, accumulation, dialogues=dialogues)
    estimate = estimate_step(again, settings, CPU, whole_budget=0.0)
    print(
        json.dumps(
            {
                "estimated": estimate.peak_bytes,
                "share": estimate.share,
                "real": real,
            }
        )
    )


if __name__ == "__main__":
    main()
