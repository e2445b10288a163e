"""A comparison as one HTML page that asks for nothing from outside. No torch."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from rxlm.evaluation.pages import STYLE
from rxlm.evaluation.tables import html_table
from rxlm.training.comparison.runs import Run
from rxlm.training.comparison.tables import section_tables

_SAMPLES = 2


def html_page(
    comparison: Mapping[str, Any],
    pictures: Mapping[str, Mapping[str, bytes]],
    runs: Mapping[str, Sequence[Run]],
) -> str:
    """Return the page.

    Args:
        comparison: from :func:`~rxlm.training.comparison.compare.compare`.
        pictures: by stage, PNG files by metric.
        runs: by stage; their last sample conversations are shown.
    """
    title = "Comparison of " + " and ".join(html.escape(name) for name in comparison["folders"])
    parts = [
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
    ]
    for name, section in comparison["stages"].items():
        parts.append(f"<h2>{html.escape(name or section['stage'])}</h2>\n")
        parts += [f"<p>{html.escape(sentence)}</p>\n" for sentence in section["verdict"]]
        if section["notes"]:
            notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in section["notes"])
            parts.append(f"<ul>\n{notes}</ul>\n")
        for table in section_tables(section, all_metrics=True):
            parts.append(f"<h3>{html.escape(table.title)}</h3>\n{html_table(table)}")
        parts += [_picture(metric, data) for metric, data in pictures[name].items()]
        parts += [_talk(run) for run in runs[name]]
    parts.append("</body></html>\n")
    return "".join(parts)


def _picture(metric: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    caption = html.escape(metric.replace("_", " "))
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _talk(run: Run) -> str:
    if not run.samples:
        return ""
    step = run.samples[-1]["step"]
    parts = [f"<h3>{html.escape(run.label)} speaks, after {step:,} steps</h3>\n"]
    for sample in [item for item in run.samples if item["step"] == step][:_SAMPLES]:
        lines = "".join(
            f'<p class="line"><b>{speaker}</b> {html.escape(turn[key])}</p>\n'
            for turn in sample["turns"]
            for speaker, key in (("asked", "query"), ("model", "answer"), ("expected", "expected"))
        )
        parts.append(f'<div class="talk">\n{lines}</div>\n')
    return "".join(parts)
