"""Small runs of every stage and strategy, in one process or in several.

Not a test file. ``torchrun ... cases.py ROOT`` runs :data:`SHARED` in several processes, each into
a folder of ROOT; the tests run the same cases in one process and compare.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rxlm.data import DialogueGenerator, GeneratedConversations, conversation_texts
from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.language_model import LanguageModel
from rxlm.ops import losses
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.reactive import ReactiveModel
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer
from rxlm.training.distributed.world import World, current_world, open_world
from rxlm.training.objectives.curriculum import Phase, TurnsPhase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.language_modeling import LMObjective, LMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)
from rxlm.training.objectives.memory_reinforcement import (
    MemoryReinforcementObjective,
    MemoryReinforcementSettings,
)
from rxlm.training.objectives.preference import PreferenceObjective, PreferenceSettings
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer, TrainResult

DEEPSPEED = Path(__file__).resolve().parents[3] / "stages" / "deepspeed"
SEQ_LEN = 64
# An odd number: two processes get different shares.
SIZES = {"turns": 3, "dialogues": 3, "validation_dialogues": 2}
STAGES: dict[str, tuple[type, Any]] = {
    "joint_lm": (JointLMObjective, JointLMSettings(**SIZES, drop_probability=0.1)),
    "sft": (SFTObjective, SFTSettings(**SIZES)),
    "memory_pretraining": (MemoryPretrainingObjective, MemoryPretrainingSettings(**SIZES)),
    "memory_aware": (
        MemoryAwareObjective,
        MemoryAwareSettings(phases=(Phase(turns=3, dialogues=3),), validation_dialogues=2),
    ),
    # Begins without memory attention. (With ZeRO its moments would count that step, too.)
    "curriculum": (
        MemoryAwareObjective,
        MemoryAwareSettings(
            phases=(
                Phase(turns=2, dialogues=3, reads="history", steps=1),
                Phase(turns=3, dialogues=3),
            ),
            validation_dialogues=2,
        ),
    ),
    # The second step leaves parts as they are, of which there are moments. (ZeRO cannot.)
    "thawing": (
        MemoryAwareObjective,
        MemoryAwareSettings(
            phases=(
                Phase(turns=2, dialogues=3, steps=1),
                Phase(turns=3, dialogues=3, trains=("encoder", "decoder")),
            ),
            distillation=0.5,
            validation_dialogues=2,
        ),
    ),
    # The second step trains on the episodes that each process has sampled in the first.
    "memory_reinforcement": (
        MemoryReinforcementObjective,
        MemoryReinforcementSettings(
            phases=(TurnsPhase(turns=3, dialogues=3),),
            group=3,
            max_answer_tokens=5,
            inner_epochs=2,
            # Advantages add up to nothing, and so would the loss of the first step.
            entropy_scale=0.1,
            validation_dialogues=2,
        ),
    ),
    "preference": (
        PreferenceObjective,
        PreferenceSettings(turns=5, dialogues=3, validation_dialogues=2),
    ),
}
DDP_ONLY = ("curriculum", "thawing", "memory_reinforcement", "preference")
KINDS = ("gla", "deltanet", "gated_deltanet", "kda", "md_gdn")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


class Case(NamedTuple):
    """One run."""

    stage: str
    kind: str = "softmax"
    strategy: str = "ddp"
    steps: int = 2
    accumulation: int = 1

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


SHARED = (
    *(
        Case(stage, strategy=name)
        for stage in STAGES
        for name in STRATEGIES
        if stage not in DDP_ONLY or name == "ddp"
    ),
    *(Case("memory_aware", kind) for kind in KINDS),
    Case("memory_aware", "md_gdn", "zero3"),
    Case("lm", strategy="ddp"),
    Case("lm", strategy="zero2"),
    Case("lm", strategy="zero3"),
    Case("memory_aware", strategy="zero2_offload"),
    Case("memory_aware", strategy="ddp", accumulation=4),
    Case("memory_aware", strategy="zero2", accumulation=4),
)
"""What is compared with one process."""
RESUMED = tuple(Case("memory_aware", strategy=name, steps=4) for name in ("zero1", "zero3"))
"""Runs that one process began, and that several continue."""
STOPPED = tuple(Case("memory_aware", strategy=name, steps=4) for name in ("ddp", "zero2"))
"""Runs of which one process gets SIGTERM in its second step; then they go on."""
GROWN = Case("memory_aware", "gated_deltanet", steps=4)
"""One process makes the first two steps, two make the others."""
SHRUNK = Case("sft", steps=2)
"""Two processes make the first two steps; one makes two more."""
PURE = Case("memory_aware", "gla", steps=3)
"""Under ``bf16_pure``."""


def tokenizer() -> Tokenizer:
    conversations = (DialogueGenerator().conversation(index, 8) for index in range(40))
    return train_tokenizer(conversation_texts(conversations), TokenizerTraining(vocab_size=384))


def run_case(
    case: Case, root: Path, tokens: Tokenizer, stop_at: int | None = None, **settings: Any
) -> TrainResult:
    """Train one case into its folder; shared by the processes if there are several.

    In step ``stop_at``, the last process gets SIGTERM.
    """
    world = current_world()
    shared = {} if world.size == 1 else strategy_settings(case.strategy)
    train = TrainSettings(
        **{
            "steps": case.steps,
            "lr": 0.01,
            # Adam divides tiny gradients by their size; rounding errors in them must not matter.
            "eps": 1e-3,
            # ZeRO lets parameters decay that a step does not use.
            "weight_decay": 0.0,
            "schedule": "constant",
            "grad_clip": 0.5,
            "accumulation": case.accumulation,
            "log_every": 1,
            "validate_every": case.steps,
            "keep_best": 0,
            "threads": 1,
            "tensorboard": False,
            **shared,
            **settings,
        }
    )
    run = RunFolder.open(root / case.name, "test", {"case": case.name}, writes=world.is_main)
    world.wait()
    objective = objective_of(case, tokens)
    if stop_at is not None and world.rank == world.size - 1:
        after_step = objective.after_step

        def stopping(step: int, metrics: Any) -> None:
            after_step(step, metrics)
            if step == stop_at:
                signal.raise_signal(signal.SIGTERM)

        objective.after_step = stopping
    return Trainer(objective, train, run).train()


def strategy_settings(name: str) -> dict[str, Any]:
    if name == "ddp":
        return {"strategy": "ddp"}
    return {"strategy": "deepspeed", "deepspeed": str(DEEPSPEED / f"{name}.json")}


def language_modeling(case: Case, tokens: Tokenizer) -> LMObjective:
    torch.manual_seed(0)
    config = LMConfig(
        vocab_size=tokens.vocab_size,
        dim=16,
        depth=1,
        num_heads=2,
        attention="gated_deltanet",
        max_seq_len=16,
    )
    conversations = (DialogueGenerator().conversation(index, 4) for index in range(8))
    rows = TextRows(conversation_texts(conversations), tokens, 16)
    settings = LMSettings(batch_size=5, num_buckets=2, validation_rows=4)
    model = LanguageModel(config, tokens)
    return LMObjective(model, rows, rows, settings, accumulation=case.accumulation)


def objective_of(case: Case, tokens: Tokenizer) -> Any:
    if case.stage == "lm":
        return language_modeling(case, tokens)
    component: dict[str, Any] = {
        "num_layers": 2,
        "vocab_size": tokens.vocab_size,
        "embed_dim": 16,
        "ff_dim": 32,
        "att_heads": 2,
        "seq_len": SEQ_LEN,
        "stm_size": 8,
        "self_att_type": "mha",
        "cross_att_type": "mha",
        "tie_embeddings": True,
        "use_head_norm": True,
    }
    if case.kind != "softmax":
        component |= {
            "use_linear_self_attn": True,
            "linear_attn_type": case.kind,
            "linear_attn_use_short_conv": True,
        }
    memory = {
        "variant": "self-interlayer",
        "num_layers": 2,
        "embed_dim": 16,
        "att_heads": 1,
        "att_type": "mha",
        "stm_size": 8,
        "seq_len": SEQ_LEN,
    }
    torch.manual_seed(0)
    model = ReactiveModel(
        {"encoder": component, "decoder": component, "memory_attention": memory}, tokens
    )
    generator = DialogueGenerator()
    cls, settings = STAGES[case.stage]
    return cls(
        model,
        GeneratedConversations(generator, "train"),
        GeneratedConversations(generator, "valid"),
        TurnEncoder(tokens, SEQ_LEN),
        settings,
        seed=0,
        accumulation=case.accumulation,
    )


def fail_in_process_1(world: World, root: Path, tokens: Tokenizer) -> None:
    """Train with data that one process cannot read."""
    case = Case("memory_aware", steps=50)
    objective = objective_of(case, tokens)
    if world.rank == 1:

        def broken(batch: Any, rank: int, size: int) -> Any:
            raise UserError("this dialogue is damaged")

        objective.shard = broken
    settings = TrainSettings(steps=50, threads=1, tensorboard=False)
    run = RunFolder.open(root / "failing", "test", {}, writes=world.is_main)
    world.wait()
    Trainer(objective, settings, run).train()


def run_faults(world: World, root: Path, tokens: Tokenizer) -> None:
    """Stop and go on, go on with what one process began, and round weights."""
    for case in STOPPED:
        if case.strategy != "ddp" and importlib.util.find_spec("deepspeed") is None:
            continue
        first = run_case(case, root, tokens, stop_at=1)
        second = run_case(case, root, tokens)
        report = [first.status, first.step, first.signal, second.status, second.step]
        (root / f"{case.name}.{world.rank}.json").write_text(json.dumps(report))
    for case in (GROWN, SHRUNK):
        run_case(case, root, tokens)
    run_case(PURE, root, tokens, precision="bf16_pure", accumulation=2)


def main(root: Path) -> None:
    only = os.environ.get("RXLM_CASES")
    # Scores in chunks here, in one piece in the one process that this is compared with.
    losses.WHOLE_SCORES, losses.FEWEST_ROWS = 1, 7
    with open_world() as world:
        tokens = tokenizer()
        if only == "failing":
            fail_in_process_1(world, root, tokens)
        if only == "faults":
            run_faults(world, root, tokens)
        for case in (*SHARED, *RESUMED):
            if only is None or only in case.name:
                run_case(case, root, tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
