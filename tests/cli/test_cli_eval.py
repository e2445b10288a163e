"""``rxlm eval``: settings reach the test, results reach the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxlm.cli.main import main


def test_recall_takes_settings_and_writes_files(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches options that are ignored, and results that differ from file to screen."""
    json_file, html_file = tmp_path / "r.json", tmp_path / "r.html"
    words = ["distances=[2]", "free_running=false", "--seeds", "2"]
    files = ["--json", str(json_file), "--html", str(html_file)]
    assert main(["eval", "recall", str(micro_pipeline), *words, *files]) == 0
    report = json.loads(json_file.read_text(encoding="utf-8"))
    rows = report["recall"]["rows"]
    assert {(row["distance"], row["seed"]) for row in rows} == {(2, 0), (2, 1)}
    assert {row["condition"] for row in rows} == {"memory", "zeroed", "swapped"}
    # What was not given is the recipe's: two dialogues, one fact.
    assert {(row["n"], row["facts"]) for row in rows} == {(2, 1)}
    assert "Recall by distance" in capsys.readouterr().out
    assert "<html" in html_file.read_text(encoding="utf-8")
    # The user named the file, so it may be replaced.
    assert main(["eval", "recall", str(micro_pipeline), *words, *files]) == 0


def test_recall_of_one_checkpoint_is_that_of_the_pipeline(
    micro_pipeline: Path, tmp_path: Path
) -> None:
    """Catches `eval` measuring other weights, or other dialogues, than `pipeline run` did."""
    (checkpoint,) = (micro_pipeline / "50_memory_aware" / "checkpoints").glob("step-000002")
    assert main(["eval", "recall", str(checkpoint), "--json", str(tmp_path / "r.json")]) == 0
    measured = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    reported = json.loads((micro_pipeline / "report.json").read_text(encoding="utf-8"))
    assert measured["recall"]["rows"] == reported["recall"]["rows"]


def test_perplexity_on_own_and_on_given_conversations(
    micro_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --data being ignored."""
    file = tmp_path / "mine.jsonl"
    row = {"interactions": [{"query": "Hi.", "answer": "Hello."}] * 2}
    file.write_text(f"{json.dumps(row)}\n" * 3, encoding="utf-8")
    out = tmp_path / "p.json"
    counts = {}
    for words in ([], ["--data", str(file), "max_dialogues=9"]):
        command = ["eval", "perplexity", str(micro_pipeline), *words, "--json", str(out)]
        assert main(command) == 0
        (result,) = json.loads(out.read_text(encoding="utf-8"))["perplexity"]
        counts[result["source"]] = result["num_dialogues"]
    assert counts == {"built-in dialogues (test)": 2, str(file): 3}
    assert "memory swapped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recall", "MODEL", "distance=[2]"], "did you mean 'distances'?"),
        (["recall", "MODEL", "dialogues=one"], "dialogues"),
        (["recall", "MODEL", "--json", "none/r.json"], "does not exist"),
        (["recall", "none"], "does not exist"),
        (["perplexity", "MODEL", "--data", "none.jsonl"], "no such file"),
    ],
)
def test_bad_input_is_status_2_before_the_work(
    micro_pipeline: Path,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, and minutes of work before an error that was there from the start."""
    monkeypatch.chdir(tmp_path)
    given = [str(micro_pipeline) if word == "MODEL" else word for word in words]
    assert main(["eval", *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_suite_writes_its_files_and_goes_on(
    micro_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches options that are ignored, finished tests that are run again, and a comparison of
    documents in columns that cannot be told apart."""
    monkeypatch.delenv("RXLM_DATA", raising=False)
    files = ["--json", str(tmp_path / "s.json"), "--html", str(tmp_path / "s.html")]
    words = [
        "facts={distances: [1], facts: [1], long_distances: [], side_distances: [1], "
        "side_facts: 2, together: [2], capacity_facts: [], dialogues: 2}",
        "max_answer_tokens=3",
    ]
    command = ["eval", "suite", str(micro_pipeline), *words, "--seeds", "0,3", *files]
    assert main([*command, "--tests", "facts,babi"]) == 0
    document = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert {row["seed"] for row in document["tests"]["facts"]["rows"]} == {0, 3}
    assert document["tests"]["babi"]["status"] == "skipped"
    assert "Goals of the suite" in capsys.readouterr().out
    assert "T1 Facts over turns" in (tmp_path / "s.html").read_text(encoding="utf-8")
    seconds = document["tests"]["facts"]["seconds"]
    assert main([*command, "--tests", "babi,facts"]) == 0
    again = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert again["tests"]["facts"]["seconds"] == seconds
    assert list(again["tests"]) == ["babi", "facts"]
    capsys.readouterr()
    both = [str(tmp_path / "s.json"), str(tmp_path / "s.json")]
    assert main(["eval", "compare", *both]) == 2
    assert "--names" in capsys.readouterr().err
    assert main(["eval", "compare", *both, "--names", "one,two"]) == 0
    shown = capsys.readouterr().out
    assert "one" in shown and "two" in shown and "turns ago" in shown
    monkeypatch.setenv("RXLM_DATA", str(tmp_path / "nowhere"))
    assert main([*command, "--tests", "babi"]) == 2
    assert "RXLM_DATA" in capsys.readouterr().err
