"""The recall benchmarks run, score honestly, and say what they found. Nothing is timed here."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rxlm.data.mqar import MqarSettings

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("mqar_training", "mqar_report", "mqar", "two_turn_recall")
TINY = ["--quick", "--processes", "1", "--steps", "6", "--mixers", "kda", "elu"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the benchmarks, found as when they run as scripts."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return {name: importlib.import_module(name) for name in NAMES}


def look_up(tokens: Tensor, asked: Tensor) -> Tensor:
    """Answer as someone who reads: the token after the first occurrence of the key."""
    rows, places = asked.nonzero(as_tuple=True)
    keys = tokens[rows, places]
    first = (tokens[rows] == keys[:, None]).long().argmax(dim=1)
    return tokens[rows, first + 1]


def test_score_of_an_oracle_and_of_guesses(scripts: dict[str, ModuleType]) -> None:
    """Catches a score that misses right answers, or that counts what was not asked."""
    score = scripts["mqar_training"].score
    task = MqarSettings(8, 64, 64)
    assert score(look_up, task, 0, 8001) == (8008, 8008)
    generator = torch.Generator().manual_seed(0)

    def guess(tokens: Tensor, asked: Tensor) -> Tensor:
        return torch.randint(32, 64, (int(asked.sum()),), generator=generator)

    assert abs(score(guess, task, 0, 20000).share - 1 / 32) < 0.006
    assert score(lambda tokens, asked: tokens[asked], task, 0, 800).correct == 0


def test_model_answers_without_seeing_later_tokens(scripts: dict[str, ModuleType]) -> None:
    """Catches a mechanism that peeks: fillers after a question must not move its answer."""
    training = scripts["mqar_training"]
    tokens, asked, _ = training.batch(MqarSettings(4, 16, 32), 0, range(3))
    only = torch.zeros_like(asked)
    only[:, 8] = True
    changed = tokens.clone()
    changed[:, 9:] = 0
    for mixer in scripts["mqar"].NAMES:
        torch.manual_seed(0)
        model = training.Recaller(mixer, 8, 2, 32)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens, only), model(changed, only))


def test_state_is_counted(scripts: dict[str, ModuleType]) -> None:
    """Catches a state that leaves something out, or that grows where it must not."""
    recaller = scripts["mqar_training"].Recaller
    kda = recaller("kda", 8, 2, 32)
    state, recent = 2 * 4 * 4, 3 * 3 * 8
    assert kda.state_bytes(16) == kda.state_bytes(64) == 2 * 4 * (state + recent)
    softmax = recaller("softmax", 8, 2, 32)
    assert softmax.state_bytes(64) - softmax.state_bytes(16) == 2 * 48 * (2 * 8 * 4 + 1)


def test_training_learns_and_repeats_itself(scripts: dict[str, ModuleType]) -> None:
    """Catches a recipe that learns nothing, and randomness outside the seed."""
    training = scripts["mqar_training"]
    recipe = training.Recipe(
        difficulties=(training.Difficulty(2, 8, 8),), vocab_size=8, tokens_per_step=256,
        max_steps=120, questions=512, learning_rate=1e-2,
    )  # fmt: skip
    found = [training.train("deltanet", 16, 1, 0, recipe) for _ in range(2)]
    assert found[0].scores[2].share > 0.8
    assert found[0].scores == found[1].scores and found[0].curve == found[1].curve


def test_small_run_writes_and_resumes(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches files that are missing, a second run that trains again, or one that takes the rows
    of other settings for its own."""
    mqar = scripts["mqar"]
    arguments = [*TINY, "--out", str(tmp_path)]
    assert mqar.main(arguments) == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "mqar.csv").read_text().splitlines()))
    assert {(row["mixer"], row["pairs"]) for row in rows} == {
        (mixer, pairs) for mixer in ("kda", "elu") for pairs in ("2", "4")
    }
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")
    assert "KDA at least 99%" in (tmp_path / "mqar.md").read_text()
    trained: list[Any] = []

    def no_training(job: Any) -> dict[str, Any]:
        trained.append(job)
        raise AssertionError

    monkeypatch.setattr(mqar, "train_one", no_training)
    assert mqar.main(arguments) == 0 and capsys.readouterr().out == first
    with pytest.raises(AssertionError):
        mqar.main([*arguments, "--seeds", "1"])
    assert [job.seed for job in trained] == [1]


def test_bars_call_a_miss_a_miss(scripts: dict[str, ModuleType]) -> None:
    """Catches a bar that is met by an average, or below which an overlap counts as well."""
    common = {"dim": 64, "cpu_seconds": 60.0}
    rows = [
        {**common, "mixer": "kda", "scores": {"4": (1000, 1000), "64": (980, 1000)}},
        {**common, "mixer": "deltanet", "scores": {"4": (995, 1000), "64": (995, 1000)}},
        {**common, "mixer": "gla", "scores": {"4": (1000, 1000), "64": (970, 1000)}},
        {**common, "mixer": "elu", "scores": {"4": (1000, 1000), "64": (500, 1000)}},
    ]
    met = {bar.asked: bar.met for bar in scripts["mqar_report"].bars(rows)}
    assert met == {
        "D = 64: DeltaNet at least 99% at up to 64 pairs": True,
        "D = 64: KDA at least 99% at up to 64 pairs": False,
        "D = 64: GLA below the delta rules at 64 pairs": False,
        "D = 64: ELU + 1 below the delta rules at 64 pairs": True,
        "the table in under 30 minutes on two cores": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "rnn"], "'rnn' does not exist"),
        (["--dims", "20"], "--dims 20"),
        (["--steps", "1"], "--steps|expected at least 3 steps"),
    ],
)
def test_bad_input_is_refused(
    scripts: dict[str, ModuleType],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, or a model that is trained in spite of it."""
    assert scripts["mqar"].main(["--quick", *arguments]) == 2
    assert any(part in capsys.readouterr().err for part in message.split("|"))


def test_two_turns_share_nothing_but_the_carried_state(scripts: dict[str, ModuleType]) -> None:
    """Catches a leak from interaction 1 when the state is reset, and a swap that swaps nothing."""
    script = scripts["two_turn_recall"]
    settings = script.QUICK
    torch.manual_seed(0)
    decoder = script.make_decoder(settings).eval()
    task = settings.task(2)
    tokens, asked, _ = scripts["mqar_training"].batch(task, 0, range(4))
    cut = task.context_length
    other = tokens.clone()
    other[:, :cut] = tokens[:, :cut].roll(1, dims=1)
    with torch.no_grad():
        logits = {
            (between, name): script.answer(decoder, ids, asked, cut, between)
            for between in ("carried", "reset", "another's")
            for name, ids in (("one", tokens), ("other", other))
        }
        rolled = torch.cat((tokens[:, :cut].roll(-1, dims=0), tokens[:, cut:]), dim=1)
        swapped = script.answer(decoder, rolled, asked, cut, "carried")
    assert torch.equal(logits["reset", "one"], logits["reset", "other"])
    assert not torch.allclose(logits["carried", "one"], logits["carried", "other"])
    torch.testing.assert_close(logits["another's", "one"], swapped)


def test_two_turn_run_writes_every_row(
    scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a condition that is not tested, or a page that does not say that a bar is missed."""
    arguments = ["--quick", "--steps", "3", "--out", str(tmp_path)]
    assert scripts["two_turn_recall"].main(arguments) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "two_turn_recall.json").read_text())
    assert [(row["trained"], row["tested"]) for row in found["results"]] == [
        ("carried", "carried"), ("carried", "reset"), ("carried", "another's"), ("reset", "reset"),
    ]  # fmt: skip
    assert "| NO |" in (tmp_path / "two_turn_recall.md").read_text()


def test_two_turn_training_reaches_the_first_interaction(scripts: dict[str, ModuleType]) -> None:
    """Catches a gradient that stops at the boundary of the interactions."""
    script = scripts["two_turn_recall"]
    torch.manual_seed(0)
    decoder = script.make_decoder(script.QUICK)
    read: list[Tensor] = []

    def keep(module: torch.nn.Module, ids: Any, embedded: Tensor) -> None:
        embedded.retain_grad()
        read.append(embedded)

    decoder.embedding.register_forward_hook(keep)
    tokens, asked, _ = scripts["mqar_training"].batch(script.QUICK.task(2), 0, range(4))
    script.answer(decoder, tokens, asked, 4, "carried").square().sum().backward()
    assert read[0].shape == (4, 4, script.QUICK.dim)
    assert read[0].grad is not None and (read[0].grad.abs().sum(dim=-1) > 0).all()
