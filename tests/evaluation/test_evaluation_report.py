"""Reports: one JSON document, and the tables, figures and pages made of it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rxlm.data import DialogueGenerator
from rxlm.errors import UserError
from rxlm.evaluation.perplexity import (
    PerplexitySettings,
    builtin_conversations,
    evaluate_perplexity,
)
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.report import (
    build_report,
    console_tables,
    read_json,
    write_json,
    write_report,
)
from rxlm.evaluation.transcript import MODEL, USER, Line
from rxlm.rxt.models import RxTAlpha

HOSTILE = "</p><script src='http://evil.example/x.js'>alert(1)</script> | [A] `x` <b>"
METRICS = [
    {"kind": "train", "step": step, "loss": 5.0 / step, "seconds": 2.0 * step} for step in (1, 2, 3)
] + [{"kind": "validation", "step": 3, "loss": 2.0, "accuracy_recall": 0.5}]


@pytest.fixture(scope="module")
def report(make_model: Callable[..., RxTAlpha]) -> dict[str, Any]:
    """A report with everything in it, and text that would like to be code."""
    model = make_model()
    recall = evaluate_recall(
        model,
        RecallSettings(
            distances=(1, 2), facts=(1, 2), unseen=("pairs", "none"), dialogues=2, seeds=(0,),
            update_distances=(1,), unknown_distances=(1,), max_answer_tokens=4,
        ),
    )  # fmt: skip
    recall.mistakes[0]["answer"] = HOSTILE
    settings = PerplexitySettings(max_dialogues=2, max_turns=2)
    perplexity = evaluate_perplexity(
        model, builtin_conversations(DialogueGenerator(), settings), settings, source=HOSTILE
    )
    transcript = [
        [Line(1, USER, "My name is Maria."), Line(1, MODEL, HOSTILE)],
        [Line(2, USER, "Who am I?"), Line(2, MODEL, "Your name is Maria.\n```")],
    ]
    return build_report(
        model,
        name="nano & co",
        recall=recall,
        perplexity=[perplexity],
        training={"4-memory": METRICS, "1-lm": METRICS[:3]},
        transcript=transcript,
    )


@pytest.fixture(scope="module")
def folder(report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's files."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    written = write_report(report, folder)
    assert [path.name for path in written[:3]] == ["report.json", "report.md", "report.html"]
    assert all(path.is_file() for path in written)
    return folder


def test_json_round_trip(report: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Catches tuples, tensors or NaN in a report: they do not survive JSON."""
    assert read_json(folder / "report.json") == report
    write_json(report, tmp_path / "again" / "out.json")
    assert read_json(tmp_path / "again" / "out.json") == report


def test_the_report_says_what_was_measured(
    report: dict[str, Any], make_model: Callable[..., RxTAlpha]
) -> None:
    """Catches a report that cannot be traced to its model, settings and machine."""
    model = make_model()
    assert report["model"]["fingerprint"] == model.fingerprint()._asdict()
    assert report["model"]["num_parameters"] == sum(item.numel() for item in model.parameters())
    other = make_model(seed=1)
    assert report["model"]["fingerprint"] != other.fingerprint()._asdict()
    assert RecallSettings.parse(report["recall"]["settings"]).dialogues == 2
    assert PerplexitySettings.parse(report["perplexity"][0]["settings"]).max_turns == 2
    assert {"rxlm", "torch", "python", "num_threads"} <= report["environment"].keys()
    assert report["recall"]["passed"] is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a report of schema"),
        ('{"schema": "rxlm-evaluation/0"}', "found 'rxlm-evaluation/0'"),
        ('{"schema": "rxlm-evaluation/1", "recall": null}', "lacks created, model"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    """Catches a traceback where a message is due."""
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


class Page(HTMLParser):
    """Collects what a page refers to and which elements it has."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        names = ("src", "href", "srcset", "data", "action", "style")
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"


def test_the_page_is_self_contained(folder: Path) -> None:
    """Catches requests to the outside, and text of a model that becomes part of the page."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "b/"} & set(page.tags)
    assert not re.search(r"@import|url\(", text)
    assert len(page.links) == len(list((folder / "figures").glob("*.png"))) == 4
    assert "&lt;script" in text and "nano &amp; co" in text


def test_the_figures_are_pictures(folder: Path) -> None:
    """Catches empty or missing figures."""
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {"recall", "perplexity", "accuracy", "loss"}
    for path in (folder / "figures").glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_markdown_tables_keep_their_columns(folder: Path) -> None:
    """Catches cells that break a table, and a transcript that breaks out of its block."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        counts = {
            len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) for line in table.splitlines()
        }
        assert len(counts) == 1
    assert "<script" not in re.sub(r"^    .*$", "", text, flags=re.MULTILINE).replace("\\<", "")
    assert "      2  model:  Your name is Maria. ```\n" in text
    for name in re.findall(r"\]\((figures/[a-z-]+\.png)\)", text):
        assert (folder / name).is_file()


def test_console_tables_show_every_number_in_100_columns(report: dict[str, Any]) -> None:
    """Catches columns that are cut in a pipe, and markup in what a model said."""
    console = Console(file=io.StringIO(), width=100, markup=False)
    for table in console_tables(report):
        console.print(table)
    text = console.file.getvalue()
    assert "Memory test" in text and "FAILED" in text
    assert "\u2026" not in text.replace(HOSTILE, "")
    assert "turns ago" in text and "swapped" in text and "chance" in text
    for figure in report["recall"]["summary"]:
        assert figure["label"] in text, "no label is broken over two lines"


def test_a_report_may_hold_a_part_only(model: RxTAlpha, tmp_path: Path) -> None:
    """Catches pages that need results which were not asked for."""
    report = build_report(model)
    files = write_report(report, tmp_path)
    assert [path.name for path in files] == ["report.json", "report.md", "report.html"]
    assert console_tables(report) == []
    assert json.loads((tmp_path / "report.json").read_text())["recall"] is None
    assert "RxTAlpha" in (tmp_path / "report.md").read_text()
