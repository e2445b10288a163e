"""The suite as a whole: one document, resumed; tables, figures and a page of it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rxlm.errors import UserError
from rxlm.evaluation.report import write_json
from rxlm.evaluation.suite import facts, runner
from rxlm.evaluation.suite.baseline import (
    LanguageModelContestant,
    check_baseline,
    non_embedding_parameters,
    twin_config,
)
from rxlm.evaluation.suite.contestant import CONTROLS
from rxlm.evaluation.suite.figures import draw_suite
from rxlm.evaluation.suite.page import suite_page
from rxlm.evaluation.suite.runner import Subject, read_suite, run_suite
from rxlm.evaluation.suite.settings import (
    BabiSettings,
    CostSettings,
    DialogueSettings,
    FactsSettings,
    RewardTestSettings,
    SlotsSettings,
    SuiteSettings,
)
from rxlm.evaluation.suite.tables import suite_tables
from rxlm.evaluation.tables import NOT_MET
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer

SMALL = SuiteSettings(
    seeds=(0, 1),
    max_answer_tokens=4,
    facts=FactsSettings(
        distances=(1, 2),
        facts=(1, 2),
        long_distances=(3,),
        long_facts=(1,),
        side_distances=(1,),
        side_facts=2,
        together=(2,),
        capacity_facts=(),
        dialogues=3,
    ),
    babi=BabiSettings(questions=2),
    dialogues=DialogueSettings(conversations=3, max_turns=3),
    cost=CostSettings(turns=(1, 2), query_tokens=4, answer_tokens=2, rounds=2),
    reward=RewardTestSettings(steps=2, conversations=2),
    slots=SlotsSettings(dialogues=3, facts=2, distance=1, probe_train=8, probe_test=4),
)


def quiet(title: str) -> contextlib.AbstractContextManager[None]:
    """Show no progress."""
    return contextlib.nullcontext()


def twin_of(model: RxTAlpha) -> LanguageModel:
    """Return an untrained language model of equal size."""
    torch.manual_seed(1)
    return LanguageModel(twin_config(model), model.tokenizer).eval()


def test_without_data_and_baseline(
    make_model: Callable[..., RxTAlpha], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a column or a test that disappears silently, and a page that asks for something."""
    caplog.set_level(logging.INFO, "rxlm")
    document = run_suite(Subject(make_model(), None, None), SMALL, progress=quiet, name="tiny")
    status = {test: result["status"] for test, result in document["tests"].items()}
    assert status["babi"] == status["dialogues"] == "skipped"
    assert set(status.values()) == {"done", "skipped"}
    assert "RXLM_DATA" in document["tests"]["babi"]["reason"]
    assert document["baseline"] == {"status": "not given"}
    for table in suite_tables(document):
        if "M" in table.header and "Z" in table.header:
            assert set(CONTROLS) <= set(table.header)
            assert all("not given" in row for row in table.rows)
    path = tmp_path / "suite.json"
    write_json(document, path)
    again = read_suite(path)
    assert again["tests"].keys() == document["tests"].keys()
    pictures = draw_suite(again)
    assert set(pictures) >= {"accuracy", "capacity", "cost", "reward", "deleted", "writes"}
    page = suite_page(again, pictures)
    assert "skipped: needs real dialogues" in page and NOT_MET in page
    assert "prefers-color-scheme: dark" in page
    for sign in ("<script", "http://", "https://", "<link", "@import"):
        assert sign not in page.replace("http://www.w3.org", ""), sign
    assert "left_out" in document["tests"]["reward"]
    assert "T2 bAbI over turns: skipped" in caplog.text


def test_with_real_data_and_baseline(make_model: Callable[..., RxTAlpha], data_dir: Path) -> None:
    """Catches a source that cannot be read, and controls that are missing although given."""
    model = make_model(seq_len=128)
    settings = SMALL.model_copy(update={"tests": ("babi", "dialogues", "reward"), "seeds": (0,)})
    document = run_suite(Subject(model, twin_of(model), data_dir), settings, progress=quiet)
    assert all(result["status"] == "done" for result in document["tests"].values())
    assert document["baseline"]["equal"]
    for test in ("babi", "dialogues"):
        rows = document["tests"][test]["rows"]
        assert {row["control"] for row in rows} == set(CONTROLS)
    sources = {row["source"] for row in document["tests"]["dialogues"]["rows"]}
    assert sources == set(settings.dialogues.sources)
    assert draw_suite(document).keys() == {"babi", "perplexity", "reward"}


def test_finished_tests_are_kept(
    make_model: Callable[..., RxTAlpha], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a suite that begins anew, one that keeps what another model did, or loses a test."""
    path, ran = tmp_path / "suite.json", []

    def fake(name: str) -> Callable[..., dict[str, object]]:
        def run(*_: object) -> dict[str, object]:
            ran.append(name)
            if name == "slots" and len(ran) == 2:
                raise KeyboardInterrupt
            return {"rows": [], "findings": []}

        return run

    monkeypatch.setattr(runner, "_RUN", {name: fake(name) for name in runner._RUN})
    settings = SMALL.model_copy(update={"tests": ("facts", "slots")})
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        run_suite(Subject(model, None, None), settings, progress=quiet, keep=path)
    run_suite(Subject(model, None, None), settings, progress=quiet, keep=path)
    assert ran == ["facts", "slots", "slots"]
    other = settings.model_copy(update={"facts": FactsSettings(dialogues=7)})
    run_suite(Subject(model, None, None), other, progress=quiet, keep=path)
    assert ran[3:] == ["facts"]
    run_suite(Subject(make_model(seed=5), None, None), other, progress=quiet, keep=path)
    assert ran[4:] == ["facts", "slots"]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="rxlm-suite/1"):
        run_suite(Subject(model, None, None), other, progress=quiet, keep=path)


def test_a_baseline_must_be_comparable(
    make_model: Callable[..., RxTAlpha], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches perplexities of different tokens side by side, and a baseline that is larger."""
    model = make_model()
    twin = twin_of(model)
    sizes = check_baseline(model, twin)
    assert sizes["equal"] and abs(sizes["ratio"] - 1) < 0.03 and not caplog.text
    counted = non_embedding_parameters(model)
    assert counted == sum(weight.numel() for weight in model.parameters()) - (
        model.decoder.embedding.weight.numel() + model.decoder.head_bias.numel()
    )
    big = LanguageModel({**twin.config.model_dump(), "ff_dim": 400}, model.tokenizer)
    assert not check_baseline(model, big)["equal"]
    assert (
        "not of equal size" in caplog.text and f"{non_embedding_parameters(big):,}" in caplog.text
    )
    other = train_tokenizer(["another text altogether " * 50], TokenizerTraining(vocab_size=300))
    config = {**twin.config.model_dump(), "vocab_size": other.vocab_size}
    with pytest.raises(UserError, match="tokenizer_from"):
        check_baseline(model, LanguageModel(config, other))


def test_the_baseline_reads_its_history(tokenizer: Tokenizer) -> None:
    """Catches F that is not given the conversation, or N that is; and batches that matter."""
    torch.manual_seed(0)
    config = {
        "vocab_size": tokenizer.vocab_size,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "ff_dim": 8,
    }
    more = {"attention": "softmax", "init_std": 1.0, "tie_embeddings": False}
    lm = LanguageModel({**config, **more}, tokenizer).eval()
    with torch.no_grad():
        # It never says a special token: all answers are text, and none ends by itself.
        lm.head.weight[list(tokenizer.special_ids)] = 0.0
    contestant = LanguageModelContestant(lm, 6)
    cell = facts.plan_facts(SMALL.facts)[3]
    dialogues = facts.cell_dialogues(facts.DialogueGenerator(), cell, 0, 6)
    answers = dict(facts.answers_of([contestant], dialogues))
    assert answers["F"] != answers["N"]
    single = [dict(facts.answers_of([contestant], [item])) for item in dialogues]
    assert [item["F"][0] for item in single] == answers["F"]
    assert [item["N"][0] for item in single] == answers["N"]
    held = contestant.read([item.interactions[:-1] for item in dialogues])
    same = [dialogues[0].interactions[-1].query] * 6
    assert len(set(contestant.answer(held, same, "N"))) == 1
    assert len(set(contestant.answer(held, same, "F"))) > 1


def test_the_document_is_plain_json(make_model: Callable[..., RxTAlpha]) -> None:
    """Catches tensors, NaN and tuples as keys in what is written."""
    settings = SMALL.model_copy(update={"tests": ("facts", "cost", "slots"), "seeds": (0,)})
    document = run_suite(Subject(make_model(), None, None), settings, progress=quiet)
    assert json.loads(json.dumps(document, allow_nan=False))["schema"] == "rxlm-suite/1"
