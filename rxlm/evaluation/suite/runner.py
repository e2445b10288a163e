"""The suite as a whole: its tests one after the other into one document, which is kept as it grows.

A test that lacks its data is in the document as skipped, with the reason. A document of the same
model, baseline and settings is gone on with: tests that are finished in it are not run again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rxlm.errors import UserError
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.report import describe_environment, describe_model, write_json
from rxlm.evaluation.suite import babi, cost, dialogues, facts, rewards, slots
from rxlm.evaluation.suite.baseline import (
    LanguageModelContestant,
    check_baseline,
    twin_config,
)
from rxlm.evaluation.suite.contestant import Contestant, Turns
from rxlm.evaluation.suite.findings import NOT_GIVEN
from rxlm.evaluation.suite.reactive import ReactiveContestant
from rxlm.evaluation.suite.settings import TEST_TITLES, SuiteSettings
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.reactive import ReactiveModel

logger = logging.getLogger(__name__)

SCHEMA = "rxlm-suite/1"
DATA_VARIABLE = "RXLM_DATA"
ProgressOf = Callable[[str], AbstractContextManager[Progress | None]]
"""Opens a view of the progress of a piece of work with a title."""


class Subject(NamedTuple):
    """What is tested: the model, a language model of equal size or None, and real data or None."""

    model: ReactiveModel
    baseline: LanguageModel | None
    data: Path | None


class _Skipped(Exception):
    """A test that cannot be run here."""


def run_suite(
    subject: Subject,
    settings: SuiteSettings,
    *,
    progress: ProgressOf,
    name: str = "",
    baseline_name: str = "",
    keep: Path | None = None,
) -> dict[str, Any]:
    """Run the tests that ``settings`` name.

    Args:
        subject: what to test.
        settings: how much.
        progress: how to show progress.
        name: what the report calls the model.
        baseline_name: what it calls the baseline.
        keep: a file for the document, written after every test, and read first.

    Returns:
        the document: see ``docs/evaluation.md``.

    Raises:
        UserError: if the baseline is of another tokenizer, or ``keep`` is not such a document.
    """
    document = _new_document(subject, settings, name, baseline_name)
    if keep is not None and keep.is_file():
        document["tests"] = _finished(read_suite(keep), document)
    for test in settings.tests:
        if document["tests"].get(test, {}).get("status") == "done":
            logger.info("%s: kept from %s", TEST_TITLES[test], keep)
            continue
        begin = time.perf_counter()
        with progress(TEST_TITLES[test]) as shown:
            try:
                result = {"status": "done", "reason": "", **_RUN[test](subject, settings, shown)}
            except _Skipped as reason:
                result = {"status": "skipped", "reason": str(reason), "findings": []}
        result["seconds"] = time.perf_counter() - begin
        what = result["reason"] or f"{result['seconds']:.0f} s"
        logger.info("%s: %s (%s)", TEST_TITLES[test], result["status"], what)
        document["tests"][test] = result
        document["seconds"] = sum(item["seconds"] for item in document["tests"].values())
        if keep is not None:
            write_json(document, keep)
    document["tests"] = {test: document["tests"][test] for test in settings.tests}
    document["seconds"] = sum(item["seconds"] for item in document["tests"].values())
    return document


def read_suite(path: Path) -> dict[str, Any]:
    """Return the document in a file.

    Raises:
        UserError: if it cannot be read, or is not of the suite.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}).") from None
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path}: expected results of schema '{SCHEMA}', found {found!r}. Give another file."
        )
    return dict(document)


def _new_document(
    subject: Subject, settings: SuiteSettings, name: str, baseline_name: str
) -> dict[str, Any]:
    baseline: dict[str, Any] = {"status": NOT_GIVEN}
    if subject.baseline is not None:
        baseline = {
            "status": "given",
            "name": baseline_name,
            **check_baseline(subject.model, subject.baseline),
        }
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": describe_model(subject.model, name),
        "baseline": baseline,
        "data": None if subject.data is None else str(subject.data),
        "environment": describe_environment(),
        "settings": settings.model_dump(mode="json"),
        "seconds": 0.0,
        "tests": {},
    }


def _finished(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the finished tests of a document that are those of this run."""
    same = (
        before["model"]["fingerprint"] == now["model"]["fingerprint"]
        and before["baseline"].get("weights") == now["baseline"].get("weights")
        and all(
            before["settings"][name] == now["settings"][name]
            for name in ("seeds", "max_answer_tokens")
        )
    )
    if not same:
        logger.info("the file holds results of another model or other seeds: all tests are run")
        return {}
    # What makes a result stand is how much was asked, and of whom.
    return {
        test: result
        for test, result in before["tests"].items()
        if result["status"] == "done" and before["settings"][test] == now["settings"][test]
    }


def _contestants(subject: Subject, settings: SuiteSettings) -> list[Contestant]:
    tokens = settings.max_answer_tokens
    found: list[Contestant] = [ReactiveContestant(subject.model, settings.batch_size, tokens)]
    if subject.baseline is not None:
        found.append(LanguageModelContestant(subject.baseline, tokens))
    return found


def _fits(contestants: list[Contestant]) -> Callable[[Turns], bool]:
    return lambda turns: all(contestant.fits(turns) for contestant in contestants)


def _data(subject: Subject) -> Path:
    if subject.data is None:
        raise _Skipped(
            f"needs real dialogues: set {DATA_VARIABLE} to the folder that holds dialogues/"
        )
    return subject.data


def _facts(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    rows = facts.run_facts(_contestants(subject, settings), settings.facts, settings.seeds, shown)
    memory = facts.select(rows, control="M")
    return {
        "rows": rows,
        "capacity": facts.capacity_points(memory),
        "findings": facts.summarise_facts(rows),
    }


def _babi(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    path = _data(subject) / babi.FILE
    if not path.is_file():
        raise _Skipped(f"{path} is not there")
    contestants = _contestants(subject, settings)
    questions = babi.load_questions(_data(subject), settings.babi, _fits(contestants))
    rows = babi.run_babi(contestants, questions, settings.babi, settings.seeds, shown)
    return {"rows": rows, "findings": babi.summarise_babi(rows)}


def _dialogues(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    data = _data(subject)
    contestants = _contestants(subject, settings)
    sources = dialogues.load_sources(data, settings.dialogues, settings.seeds, _fits(contestants))
    found = dialogues.run_dialogues(
        contestants, subject.model.require_tokenizer(), sources, settings.seeds, shown
    )
    rows = dialogues.rows_of(found)
    return {
        "rows": rows,
        "findings": dialogues.summarise_dialogues(found, rows, settings.dialogues),
    }


def _cost(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    given = subject.baseline is not None
    baseline = subject.baseline
    if baseline is None:
        # Time and state do not depend on what the weights are, only on how many there are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            baseline = LanguageModel(twin_config(subject.model)).to(subject.model.device).eval()
    rows = cost.run_cost(subject.model, baseline, settings.cost, shown)
    return {
        "rows": rows,
        "baseline": "given" if given else f"{NOT_GIVEN}: an untrained twin of equal size is timed",
        "findings": cost.summarise_cost(rows),
    }


def _rewards(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    contestants = _contestants(subject, settings)
    sources = rewards.reward_conversations(
        subject.data, settings.reward, settings.seeds, _fits(contestants)
    )
    found = rewards.run_rewards(
        contestants,
        subject.model.require_tokenizer(),
        subject.model.decoder.embedding.weight.detach(),
        sources,
        settings.seeds,
        shown,
    )
    left_out = [source for source in settings.reward.sources if source not in sources]
    return {
        "rows": rewards.reward_rows(found),
        "left_out": left_out,
        "findings": rewards.summarise_rewards(found),
    }


def _slots(subject: Subject, settings: SuiteSettings, shown: Progress | None) -> dict[str, Any]:
    contestant = ReactiveContestant(subject.model, settings.batch_size, settings.max_answer_tokens)
    result = slots.run_slots(
        contestant, settings.slots, settings.seeds, settings.facts.generator, shown
    )
    return {**result.to_dict(), "findings": slots.summarise_slots(result)}


_RUN: dict[str, Callable[[Subject, SuiteSettings, Progress | None], dict[str, Any]]] = {
    "facts": _facts,
    "babi": _babi,
    "dialogues": _dialogues,
    "cost": _cost,
    "reward": _rewards,
    "slots": _slots,
}
