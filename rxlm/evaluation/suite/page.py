"""The document of the suite as one HTML page that asks for nothing from outside. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rxlm.evaluation.pages import Block, Heading, Picture, render_html
from rxlm.evaluation.suite.contestant import CONTROL_NAMES
from rxlm.evaluation.suite.figures import CAPTIONS
from rxlm.evaluation.suite.settings import TEST_TITLES
from rxlm.evaluation.suite.tables import goals_table, test_tables

PICTURES_OF = {
    "facts": ("accuracy", "capacity"),
    "babi": ("babi",),
    "dialogues": ("perplexity",),
    "cost": ("cost",),
    "reward": ("reward",),
    "slots": ("writes", "deleted"),
}


def suite_page(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page; ``pictures`` are the files of :func:`.figures.draw_suite`."""
    name = document["model"]["name"] or document["model"]["class"]
    return render_html(f"Memory suite: {name}", suite_blocks(document, list(pictures)), pictures)


def suite_blocks(document: Mapping[str, Any], pictures: Sequence[str]) -> Iterator[Block]:
    """Yield the content of the page, in reading order."""
    yield about(document)
    yield verdict(document)
    yield baseline_note(document)
    table = goals_table(document)
    if table.rows:
        yield table
    for test, result in document["tests"].items():
        yield Heading(TEST_TITLES[test])
        if result["status"] != "done":
            yield f"{result['status']}: {result['reason']}"
            continue
        for picture in PICTURES_OF[test]:
            if picture in pictures:
                yield Picture(picture, CAPTIONS[picture])
        yield from (table for table in test_tables(document, test) if table.rows)
    yield Heading("How it was measured")
    yield provenance(document)


def about(document: Mapping[str, Any]) -> str:
    """Say what was tested."""
    model = document["model"]
    return (
        f"{model['class']} with {model['num_parameters']:,} parameters: {model['num_layers']} "
        f"layers of width {model['dim']}, a memory of {model['num_slots']} slots a layer. "
        f"{document['created']}."
    )


def verdict(document: Mapping[str, Any]) -> str:
    """Say how many goals are met, and what is not judged."""
    judged = [
        item
        for result in document["tests"].values()
        for item in result["findings"]
        if item["goal"] is not None
    ]
    met = sum(item["passed"] is True for item in judged)
    missing = sum(item["passed"] is None for item in judged)
    skipped = [test for test, result in document["tests"].items() if result["status"] != "done"]
    text = f"{met} of {len(judged)} goals are met, {len(judged) - met - missing} are not"
    if missing:
        text += f", {missing} could not be judged"
    if skipped:
        text += f"; skipped: {', '.join(TEST_TITLES[test] for test in skipped)}"
    return text + "."


def baseline_note(document: Mapping[str, Any]) -> str:
    """Say what the controls are."""
    names = "; ".join(f"{control}: {name}" for control, name in CONTROL_NAMES.items())
    baseline = document["baseline"]
    if baseline["status"] != "given":
        return f"Controls: {names}. The baseline of F and N was not given (--baseline LM_DIR)."
    text = (
        f"Controls: {names}. Baseline {baseline['name']}: {baseline['baseline_parameters']:,} "
        f"parameters without embeddings, the model {baseline['parameters']:,} "
        f"({100 * (baseline['ratio'] - 1):+.1f} %)."
    )
    return text if baseline["equal"] else text + " They are not of equal size."


def provenance(document: Mapping[str, Any]) -> str:
    """Say how it was measured."""
    environment, fingerprint = document["environment"], document["model"]["fingerprint"]
    seeds = ", ".join(map(str, document["settings"]["seeds"]))
    times = ", ".join(
        f"{TEST_TITLES[test][:2]} {result['seconds']:.0f} s"
        for test, result in document["tests"].items()
    )
    return (
        f"Seeds {seeds}. Greedy decoding; answers count when they are right word for word. "
        f"Intervals: Wilson's for shares, a bootstrap over conversations otherwise. Measured in "
        f"{document['seconds']:.0f} s ({times}) with rxlm {environment['rxlm']}, torch "
        f"{environment['torch']}, {environment['num_threads']} of {environment['num_cpus']} CPU "
        f"threads, device {document['model']['device']}, real data: {document['data'] or 'none'}. "
        f"Weights {fingerprint['weights'][:16]}, tokenizer {fingerprint['tokenizer'][:16]}. "
        "All settings and rows are in the JSON document."
    )
