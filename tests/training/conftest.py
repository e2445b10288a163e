"""Fixtures for the tests of the Trainer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BASE = """
tokenizer: {vocab_size: 300}
model:
  decoder: {num_layers: 1, embed_dim: 8, ff_dim: 8, att_heads: 2, stm_size: 3, seq_len: 128,
            self_att_type: mha, cross_att_type: mha, tie_embeddings: true}
  memory_attention: {variant: simple, att_type: mha, att_heads: 1}
train: {steps: 2, threads: 1, tensorboard: false, warmup_steps: 0}
"""
OBJECTIVE = "objective: {turns: 2, dialogues: 2, validation_dialogues: 2}\n"


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module ``toy.py`` beside this file (tests are no package, so it cannot be imported)."""
    name = "training_toy"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("toy.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Three stages that take milliseconds."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, text in {
        "_base.yaml": BASE,
        "1_tok.yaml": "extends: _base.yaml\nstage: tokenizer\nobjective: {dialogues: 10}\n",
        "2_joint.yaml": f"extends: _base.yaml\nstage: joint_lm\n{OBJECTIVE}",
        "3_sft.yaml": f"extends: _base.yaml\nstage: sft\n{OBJECTIVE}",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
