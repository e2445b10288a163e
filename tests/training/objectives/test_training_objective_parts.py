"""Stages on turns with thinking and tools: what is a target comes from the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rxlm.data import Conversation, ConversationList, Interaction
from rxlm.errors import UserError
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.models import RxTAlpha, RxTBeta
from rxlm.tokenization import RICH_TEMPLATE, render_parts
from rxlm.training.build import StageInputs, build_model, build_objective
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.recipes import read_recipe

TURNS = (
    Interaction("sum?", "", internal="be kind", think="hm", tool_call="{}"),
    Interaction("", "three", tool_use="3"),
)
DIALOGUE = Conversation(TURNS, system="Help.", id="x")
STAGES = [
    (SFTObjective, SFTSettings(turns=4, dialogues=1)),
    (MemoryPretrainingObjective, MemoryPretrainingSettings(turns=4, dialogues=1)),
    (MemoryAwareObjective, MemoryAwareSettings(phases=(Phase(turns=4, dialogues=1),))),
]


@pytest.mark.parametrize(("stage", "settings"), STAGES, ids=lambda item: getattr(item, "name", ""))
def test_targets_are_what_the_template_says(tiny: Any, stage: type, settings: Any) -> None:
    """A tool's result in the loss, thinking left out of it, or one that is never written."""
    tokenizer = tiny.tokenizer.with_template(RICH_TEMPLATE)
    source = ConversationList([DIALOGUE])
    model = tiny.model()
    model.set_tokenizer(tokenizer)
    objective = stage(model, source, source, TurnEncoder(tokenizer, 64), settings, seed=0)
    batch = objective.batch(0, 0)
    assert objective.loss(batch, 0).loss.item() > 0
    batch = getattr(batch, "dialogues", batch)
    rendered = [render_parts(tokenizer, turn.parts()) for turn in TURNS]
    found = {
        tuple(ids[mask].tolist()): targets[mask].tolist()
        for rows in batch.answer
        for ids, mask, targets in zip(rows.ids, rows.mask, rows.targets, strict=True)
    }
    if stage is MemoryPretrainingObjective:
        assert not found
    else:
        assert found == {tuple(item.ids): item.loss_mask for item in rendered}
    assert sum(len(rows.ids) for rows in batch.encode) == 3


def test_an_alpha_refuses_what_it_cannot_say(tiny: Any) -> None:
    """Thinking that is silently dropped, or a message without the turn and the remedy."""
    with pytest.raises(UserError, match=r"data: turn 1 of conversation 'x': .*RxTBeta"):
        tiny.turns.check_lengths([DIALOGUE], "data")


RECIPE: dict[str, Any] = {
    "stage": "memory_aware",
    "init_from": None,
    "train": {"steps": 2},
    "model": {
        "architecture": "beta",
        "decoder": {
            "num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 4, "seq_len": 64,
            "self_att_type": "mha", "cross_att_type": "mha",
        },
        "encoder": {},
        "memory_attention": {"att_type": "mha", "interlayer_att_type": "mha"},
    },
}  # fmt: skip


def test_a_recipe_chooses_the_model(tiny: Any, tmp_path: Path) -> None:
    """A Beta that is trained as an Alpha, or that the next stage turns back into one."""
    tiny.tokenizer.save(tmp_path / "tokenizer")
    path = tmp_path / "50_x.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    recipe = read_recipe(path).recipe
    model = build_model(recipe, StageInputs(None, tmp_path / "tokenizer"))
    assert type(model) is RxTBeta
    assert model.config.memory_attention.variant == "self-interlayer"
    objective = build_objective(recipe, model, model.require_tokenizer())
    assert objective.turns.tokenizer.template == RICH_TEMPLATE
    model.save_pretrained(tmp_path / "model")
    inputs = StageInputs(tmp_path / "model", tmp_path / "model")
    assert type(build_model(recipe, inputs)) is RxTBeta
    unsaid = read_recipe(path, ["model=null"]).recipe
    assert type(build_model(unsaid, inputs)) is RxTBeta
    alpha = read_recipe(path, ["model.architecture=alpha"]).recipe
    with pytest.raises(UserError, match=r"is an RxTBeta: set model\.architecture: beta"):
        build_model(alpha, inputs)
    variant = ["model.memory_attention.variant=self-interlayer"]
    plain = read_recipe(path, ["model.architecture=alpha", *variant]).recipe
    alpha_model = build_model(plain, StageInputs(None, tmp_path / "tokenizer"))
    assert type(alpha_model) is RxTAlpha
    alpha_model.save_pretrained(tmp_path / "alpha")
    upgraded = build_model(recipe, StageInputs(tmp_path / "alpha", tmp_path / "alpha"))
    assert type(upgraded) is RxTBeta
