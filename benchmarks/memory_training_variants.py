"""The rows of memory_training.py: what each changes in `stages/nano`, and the budget of all.

A variant is a list of overrides of the nano recipes. Nothing is trained or measured here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.training.recipes import StageFile, read_recipe

STAGES = Path(__file__).resolve().parents[1] / "stages" / "nano"
SHARED = ("10_tokenizer", "20_joint_lm", "30_sft")
"""Stages that do not use memory attention: trained once for all variants of a network."""
PRETRAINING, AWARE = "40_memory_pretraining", "50_memory_aware"
RECIPE = "recipe"
"""The variant that all others are compared with."""


class Budget(NamedTuple):
    """Updates of each stage; those of the last are `history` + `memory`."""

    joint: int = 120
    sft: int = 150
    pretraining: int = 60
    history: int = 150
    memory: int = 500


QUICK = Budget(joint=2, sft=2, pretraining=2, history=2, memory=7)
Phase = dict[str, Any]
WRITTEN: Phase = {"turns": 6, "dialogues": 8}


def _history(budget: Budget) -> Phase:
    return {"turns": 4, "dialogues": 16, "reads": "history", "steps": budget.history}


def _recipe(budget: Budget) -> list[Phase]:
    return [_history(budget), WRITTEN]


def _no_history(budget: Budget) -> list[Phase]:
    return [WRITTEN]


def _by_turns(budget: Budget) -> list[Phase]:
    short = {
        "turns": 4, "dialogues": 12, "advance_accuracy": 0.9,
        "min_steps": budget.memory // 7, "steps": budget.memory // 2,
    }  # fmt: skip
    return [_history(budget), short, WRITTEN]


def _thawing(*parts: str) -> Callable[[Budget], list[Phase]]:
    def phases(budget: Budget) -> list[Phase]:
        some = {**WRITTEN, "trains": list(parts), "steps": 3 * budget.memory // 7}
        return [_history(budget), some, WRITTEN]

    return phases


class Variant(NamedTuple):
    """One row of the table.

    Attributes:
        name: on the command line and in file names.
        title: what differs from the recipe.
        memory: overrides of `model.memory_attention`.
        network: overrides of the model that the shared stages see as well.
        objective: overrides of `objective` in the last stage.
        phases: of the last stage.
        pretrained: whether memory pretraining comes before it; if not, the last stage gets its
            updates.
    """

    name: str
    title: str
    memory: tuple[str, ...] = ()
    network: tuple[str, ...] = ()
    objective: tuple[str, ...] = ()
    phases: Callable[[Budget], list[Phase]] = _recipe
    pretrained: bool = True


_MD_GDN = (
    "decoder.self_att_type=hybrid", "decoder.attn_layer_types=[mha,md_gdn]",
    "decoder.linear_attn_heads=2", "decoder.linear_attn_expand_v=2.0",
    "decoder.linear_attn_key_dim=128", "encoder.self_att_type=mha", "encoder.attn_layer_types=null",
)  # fmt: skip

VARIANTS = (
    Variant(RECIPE, "the recipe: gradients through all writes, history phase, probes"),
    Variant("cut-1", "gradient cut after every write", objective=("backprop_turns=1",)),
    Variant("no-history", "no history phase: from memory from the start", phases=_no_history),
    Variant("no-probes", "no probe questions (the auxiliary recall task)", objective=("probes=0",)),
    Variant("no-identity", "no learned slot identity", memory=("use_slot_identity=false",)),
    Variant("open-gate", "gate starts open: bias 0, not -1.5", memory=("residual_gate_init=0.0",)),
    Variant(
        "closing-gate",
        "gate closes altogether: stretch 0.02",
        memory=("residual_gate_stretch=0.02",),
    ),
    Variant("competing", "slots compete for tokens", memory=("write_competition=true",)),
    Variant("distilled", "distillation from the full history", objective=("distillation=0.5",)),
    Variant(
        "readers-first",
        "encoder and decoder first, memory attention thaws later",
        phases=_thawing("encoder", "decoder"),
    ),
    Variant("blunt", "blunt writes: sharpness 1, not 3", memory=("write_sharpness=1.0",)),
    Variant(
        "delta",
        "delta-style writes: a layer of MD-GDN carries a state beside the slots",
        network=_MD_GDN,
    ),
    Variant("by-turns", "4 turns first, then 6, by accuracy", phases=_by_turns),
    Variant("cut-2", "gradient cut after two writes", objective=("backprop_turns=2",)),
    Variant(
        "writer-first",
        "memory attention first, encoder and decoder thaw later",
        phases=_thawing("memory_attention"),
    ),
    Variant("random-values", "written values start at random", memory=("copy_path_init=false",)),
    Variant("mixing", "slots mix before a write", memory=("variant=self-interlayer",)),
    Variant("no-pretraining", "no memory pretraining", pretrained=False),
    Variant("all-answers", "all answers are predicted, not 20 %", objective=("chat_answers=1.0",)),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


def stage_of(
    name: str, variant: Variant, seed: int, budget: Budget, init_from: Path | None = None
) -> StageFile:
    """Return one stage of a variant.

    Args:
        name: of the nano recipe.
        variant: says what differs.
        seed: of weights, dropout and training dialogues.
        budget: how long it trains.
        init_from: folder of the weights; ``None``: what the recipe says.
    """
    changes = overrides(name, variant, seed, budget)
    if init_from is not None:
        changes.append(f"init_from={init_from}")
    return read_recipe(STAGES / f"{name}.yaml", changes)


def overrides(name: str, variant: Variant, seed: int, budget: Budget) -> list[str]:
    """Return what changes in one recipe of nano."""
    changes = [f"model.{item}" for item in variant.network]
    changes += [f"data.generator.seed={seed}"]
    if name == SHARED[0]:
        return changes
    changes += [f"train.{item}" for item in _TRAINING] + [f"train.seed={seed}"]
    steps = {"20_joint_lm": budget.joint, "30_sft": budget.sft, PRETRAINING: budget.pretraining}
    if name in SHARED:
        return [*changes, f"train.steps={steps[name]}"]
    changes += [f"model.memory_attention.{item}" for item in variant.memory]
    if name == PRETRAINING:
        return [*changes, f"train.steps={steps[name]}"]
    total = budget.history + budget.memory + (0 if variant.pretrained else budget.pretraining)
    phases = json.dumps(variant.phases(budget))
    changes += [f"train.steps={total}", f"objective.phases={phases}", "objective.chat_answers=0.2"]
    return changes + [f"objective.{item}" for item in variant.objective]


_TRAINING = (
    "loggers=[]", "watch.mfu=false", "validate_every=null", "save_every=100", "keep_last=1",
)  # fmt: skip


def key_of(variant: Variant, seed: int, budget: Budget, *, shared: bool = False) -> str:
    """Return a short hash of everything that is changed (in the shared stages alone)."""
    names = SHARED if shared else (*SHARED, PRETRAINING, AWARE)
    content = [overrides(name, variant, seed, budget) for name in names]
    text = json.dumps([content, variant.pretrained or shared])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:10]
