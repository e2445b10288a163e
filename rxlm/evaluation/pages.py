"""A report as a page: Markdown for a repository, HTML for a browser. Works on its JSON; no torch.

Both are made of the same blocks. The HTML asks for nothing from outside: its pictures are in it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rxlm.evaluation.result_tables import mistakes_table, report_tables
from rxlm.evaluation.tables import Table, escape_markdown, html_table, markdown_table

CAPTIONS = {
    "recall": "Right answers by distance, with 95 % intervals",
    "perplexity": "Answer perplexity by turn",
    "accuracy": "Accuracy in validation while training",
    "loss": "Loss of the stages",
}
RESTART = "(the program was restarted)"


class Heading(NamedTuple):
    """Title of a section."""

    text: str


class Picture(NamedTuple):
    """A figure, by the name of its file."""

    name: str
    caption: str


class Talk(NamedTuple):
    """Parts of a conversation; each line is (turn, speaker, text)."""

    parts: Sequence[Sequence[Sequence[Any]]]


Block = str | Heading | Picture | Table | Talk


def page_blocks(report: Mapping[str, Any], pictures: Sequence[str]) -> Iterator[Block]:
    """Yield the content of the page, in reading order; a ``str`` is a paragraph."""
    yield _about(report)
    recall = report["recall"]
    if recall is not None:
        yield _verdict(recall)
    if report["transcript"]:
        yield Heading("A conversation, interrupted")
        yield Talk(report["transcript"])
    yield Heading("Results")
    for name in pictures:
        if name == "recall" or name.startswith("perplexity"):
            yield Picture(name, CAPTIONS[name.split("-")[0]])
    yield from report_tables(report)
    if recall is not None and recall["mistakes"]:
        yield mistakes_table(recall["mistakes"])
    training = [name for name in pictures if name in ("accuracy", "loss")]
    if training:
        yield Heading("Training")
        for name in training:
            yield Picture(name, CAPTIONS[name])
    # Reports of earlier versions have none.
    for sample in report.get("samples", ()):
        yield Heading(f"A conversation at the validation after {sample['step']:,} steps")
        yield Talk([_sample_lines(sample["turns"])])
    yield Heading("How it was measured")
    yield _provenance(report)


def markdown_page(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """Return the report in Markdown; pictures are links to ``figures/NAME.png``."""
    return render_markdown(_title(report), page_blocks(report, pictures))


def render_markdown(title: str, blocks: Iterable[Block], figures: str = "figures") -> str:
    """Return a page in Markdown; pictures are links to ``FIGURES/NAME.png``."""
    parts = [f"# {escape_markdown(title)}\n"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {escape_markdown(block.text)}\n")
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({figures}/{block.name}.png)\n")
        elif isinstance(block, Table):
            parts.append(f"### {escape_markdown(block.title)}\n\n{markdown_table(block)}")
        elif isinstance(block, Talk):
            parts.append(_markdown_talk(block))
        else:
            parts.append(f"{escape_markdown(block)}\n")
    return "\n".join(parts)


def html_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the report as one self-contained HTML page; ``pictures`` are PNG files by name."""
    return render_html(_title(report), page_blocks(report, list(pictures)), pictures)


def render_html(title: str, blocks: Iterable[Block], pictures: Mapping[str, bytes]) -> str:
    """Return one self-contained HTML page, for light and dark screens.

    Args:
        title: also the first heading.
        blocks: the content.
        pictures: PNG or SVG files by name.
    """
    title = html.escape(title)
    parts = [
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
    ]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{html.escape(block.text)}</h2>\n")
        elif isinstance(block, Picture):
            parts.append(_html_picture(block, pictures[block.name]))
        elif isinstance(block, Table):
            parts.append(f"<h3>{html.escape(block.title)}</h3>\n{html_table(block)}")
        elif isinstance(block, Talk):
            parts.append(_html_talk(block))
        else:
            parts.append(f"<p>{html.escape(block)}</p>\n")
    parts.append("</body></html>\n")
    return "".join(parts)


def _title(report: Mapping[str, Any]) -> str:
    return f"Evaluation of {report['model']['name'] or report['model']['class']}"


def _about(report: Mapping[str, Any]) -> str:
    model = report["model"]
    return (
        f"{model['class']} with {model['num_parameters']:,} parameters: {model['num_layers']} "
        f"layers of width {model['dim']}, a memory of {model['num_slots']} slots a layer, and a "
        f"vocabulary of {model['vocab_size']:,} tokens. {report['created']}."
    )


def _verdict(recall: Mapping[str, Any]) -> str:
    asked = [figure for figure in recall["summary"] if figure["goal"] is not None]
    passed = sum(bool(figure["passed"]) for figure in asked)
    verdict = "The memory test is passed" if recall["passed"] else "The memory test is not passed"
    return f"{verdict}: {passed} of {len(asked)} measured goals are reached."


def _sample_lines(turns: Sequence[Mapping[str, str]]) -> list[tuple[int, str, str]]:
    return [
        (number, speaker, turn[key])
        for number, turn in enumerate(turns, start=1)
        for speaker, key in (("user", "query"), ("model", "answer"), ("wanted", "expected"))
    ]


def _provenance(report: Mapping[str, Any]) -> str:
    environment, fingerprint = report["environment"], report["model"]["fingerprint"]
    recall = report["recall"]
    seeds = "" if recall is None else f"Seeds {', '.join(map(str, recall['settings']['seeds']))}. "
    return (
        f"{seeds}Evaluated in {report['seconds']:.0f} s with rxlm {environment['rxlm']}, torch "
        f"{environment['torch']}, Python {environment['python']} on {environment['platform']}, "
        f"{environment['num_threads']} of {environment['num_cpus']} CPU threads, device "
        f"{report['model']['device']}. Weights {fingerprint['weights'][:16]}, architecture "
        f"{fingerprint['architecture'][:16]}, tokenizer {fingerprint['tokenizer'][:16] or 'none'}. "
        "All settings and all rows are in report.json."
    )


def _markdown_talk(talk: Talk) -> str:
    lines = []
    for number, part in enumerate(talk.parts):
        if number:
            lines.append(RESTART)
        lines += [f"{turn:>3}  {speaker + ':':<7} {text}" for turn, speaker, text in part]
    # Indented, so that whatever was said, no fence of a code block can end it.
    return "".join(f"    {' '.join(line.splitlines())}\n" for line in lines)


def _html_talk(talk: Talk) -> str:
    parts = []
    for number, part in enumerate(talk.parts):
        if number:
            parts.append(f'<p class="restart">{html.escape(RESTART)}</p>\n')
        for turn, speaker, text in part:
            parts.append(
                f'<p class="line"><span class="turn">{int(turn)}</span>'
                f"<b>{html.escape(speaker)}</b> {html.escape(text)}</p>\n"
            )
    return f'<div class="talk">\n{"".join(parts)}</div>\n'


def _html_picture(picture: Picture, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    caption = html.escape(picture.caption)
    # A PNG has a white ground of its own; an SVG shows the page's.
    kind = "png" if content.startswith(b"\x89PNG") else "svg+xml"
    return (
        f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #fff; --line: #ddd; --faint: #eee;
        --quiet: #555; --panel: #f6f7f9; --good: #00682c; --bad: #a30000; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --ground: #16181c; --line: #3a3d44; --faint: #2a2d33;
          --quiet: #a0a4ab; --panel: #20242a; --good: #5fd38d; --bad: #ff8a80; }
  img[src^="data:image/png"] { background: #fff; border-radius: .4rem; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child, table.prose th, table.prose td { text-align: left; }
td.short { white-space: nowrap; }
td.passed { color: var(--good); } td.failed { color: var(--bad); font-weight: 700; }
.note, figcaption { color: var(--quiet); font-size: .85rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
.talk { background: var(--panel); border-radius: .5rem; padding: .7rem 1rem; }
.line { margin: .15rem 0; } .turn { display: inline-block; width: 2.2rem; color: var(--quiet); }
.restart { text-align: center; color: var(--quiet); font-style: italic; }
"""
