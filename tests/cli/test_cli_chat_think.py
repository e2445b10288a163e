"""``rxlm chat`` with a model that thinks: its mode, and where its thinking and calls are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rxlm.cli.chat_loop import Chat, Lines
from rxlm.rxt.models import RxTAlpha, RxTBeta
from rxlm.rxt.session import Session, TextDelta, ThinkDelta, ToolCallDelta, TurnEnd
from rxlm.tokenization import TokenizerTraining, train_tokenizer

SIZES = {"num_layers": 1, "embed_dim": 16, "att_heads": 2, "stm_size": 2, "seq_len": 32}


def make_chat(cls: type[RxTAlpha], folder: Path) -> tuple[Chat, list[str], list[str]]:
    tokenizer = train_tokenizer(["Hello, Ann."] * 4, TokenizerTraining(vocab_size=280))
    part = {**SIZES, "vocab_size": tokenizer.vocab_size, "ff_dim": 16}
    part |= {"self_att_type": "mha", "cross_att_type": "mha"}
    memory = {**SIZES, "att_type": "mha", "interlayer_att_type": "mha"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(part, part, memory, tokenizer=tokenizer).eval()
    said: list[str] = []
    told: list[str] = []
    return Chat(model, folder, Lines(said.append, told.append)), said, told


def test_the_mode_is_chosen_and_shown(tmp_path: Path) -> None:
    """Catches a mode that is not taken over, and a misspelled one that is."""
    chat, _, told = make_chat(RxTBeta, tmp_path)
    chat.run(["/think", "/think extended", "/think fats", "/think"], forgiving=True)
    assert told[0] == "thinking: auto"
    assert told[1] == told[3] == "thinking: extended"
    assert "did you mean 'fast'" in told[2]
    chat, _, told = make_chat(RxTAlpha, tmp_path)
    chat.run(["/think", "/think auto"], forgiving=True)
    assert "none" in told[0] and "RxTAlpha answers at once" in told[1]


def test_thinking_and_calls_are_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches thinking on standard output, where only answers belong."""
    chat, said, told = make_chat(RxTBeta, tmp_path)
    events = [
        ThinkDelta("hm "), ThinkDelta("well"), TextDelta("Yes."), ToolCallDelta("{}"),
        TurnEnd("eos", "Yes.", "hm well", "{}"),
    ]  # fmt: skip
    monkeypatch.setattr(Session, "interact", lambda self, text: iter(events))
    chat.answer("Hi")
    assert "".join(said) == "Yes.\n"
    assert told[0] == "[thinks] hm well"
    assert told[1].startswith("[calls] {}")
