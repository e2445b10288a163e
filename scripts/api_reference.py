"""Writes the API reference (``docs/api``) and the command-line reference (``docs/cli.md``).

    python scripts/api_reference.py            # rewrites what is out of date
    python scripts/api_reference.py --check    # exit status 1 if something is

The pages are made of docstrings, signatures and help texts only, so what they say stands beside
the code. ``PAGES`` is the table of what is public. Run it after every change of a docstring, a
signature or a command. Not here: the guides, which are written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reference_commands import command_line
from reference_sections import describe, known, public_names, summary
from reference_text import markdown

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = "<!-- Made by scripts/api_reference.py: change the docstrings, then run it. -->"


class Page(NamedTuple):
    """One page: a title, a line on what it is for, and the modules whose names it lists."""

    title: str
    purpose: str
    modules: tuple[str, ...]


PAGES: Mapping[str, Page] = {
    "models": Page(
        "Models and conversations",
        "Build, load, save and talk to a reactive model.",
        (
            "rxlm",
            "rxlm.rxt.models",
            "rxlm.rxt.session",
            "rxlm.rxt.session_events",
            "rxlm.rxt.tools",
            "rxlm.rxt.conversation",
            "rxlm.rxt.generation",
            "rxlm.rxt.components",
            "rxlm.rxt.memory_building",
            "rxlm.rxt.freezing",
            "rxlm.rxt.int8",
            "rxlm.rxt.parameter_groups",
            "rxlm.rxt.accounting",
            "rxlm.rxt.fingerprint",
            "rxlm.rxt.model_card",
        ),
    ),
    "serving": Page(
        "Serving",
        "Many conversations with one model, and HTTP over them.",
        (
            "rxlm.serve.service",
            "rxlm.serve.interface",
            "rxlm.serve.app",
            "rxlm.serve.settings",
        ),
    ),
    "memory": Page(
        "Memory",
        "The network that writes memory, and its parts.",
        ("rxlm.memory.attention", "rxlm.memory.gates", "rxlm.memory.norms", "rxlm.memory.slots"),
    ),
    "nn": Page(
        "Layers",
        "PyTorch modules that know nothing of reactive models.",
        (
            "rxlm.nn",
            "rxlm.nn.drop_in",
            "rxlm.nn.attention",
            "rxlm.nn.linear_attention",
            "rxlm.nn.memory_driven",
            "rxlm.nn.feature_map_attention",
            "rxlm.nn.based",
            "rxlm.nn.window_attention",
            "rxlm.nn.feed_forward",
            "rxlm.nn.moe",
            "rxlm.nn.short_conv",
            "rxlm.nn.norms",
            "rxlm.nn.mixers",
            "rxlm.nn.packing",
        ),
    ),
    "ops": Page(
        "Functions of tensors",
        "Pure functions: recurrences, attention, positions, losses, sampling.",
        (
            "rxlm.ops.linear_attention",
            "rxlm.ops.feature_map_attention",
            "rxlm.ops.feature_maps",
            "rxlm.ops.attention",
            "rxlm.ops.local_attention",
            "rxlm.ops.rotary",
            "rxlm.ops.alibi",
            "rxlm.ops.losses",
            "rxlm.ops.bleu",
            "rxlm.ops.sampling",
            "rxlm.ops.padding",
        ),
    ),
    "tokenization": Page(
        "Tokenization", "Text to ids and back, without torch.", ("rxlm.tokenization",)
    ),
    "data": Page(
        "Data",
        "Conversations and text: files, built-in dialogues, order.",
        ("rxlm.data", "rxlm.data.streaming", "rxlm.data.mixture", "rxlm.data.mqar"),
    ),
    "training": Page(
        "Training",
        "The Trainer, the recipes, and the settings of every stage.",
        (
            "rxlm.training",
            "rxlm.training.recipes",
            "rxlm.training.recipe",
            "rxlm.training.pipeline",
            "rxlm.training.objectives.joint_lm",
            "rxlm.training.objectives.sft",
            "rxlm.training.objectives.memory_pretraining",
            "rxlm.training.objectives.memory_aware",
            "rxlm.training.objectives.memory_reinforcement",
            "rxlm.training.objectives.episode_rewards",
            "rxlm.training.objectives.reward_floors",
            "rxlm.training.objectives.preference",
            "rxlm.training.objectives.curriculum",
            "rxlm.training.objectives.language_modeling",
        ),
    ),
    "evaluation": Page(
        "Evaluation",
        "How well a model remembers and predicts.",
        (
            "rxlm.evaluation.recall",
            "rxlm.evaluation.recall_plan",
            "rxlm.evaluation.perplexity",
            "rxlm.evaluation.int8_loss",
            "rxlm.evaluation.language_model",
            "rxlm.evaluation.scoring",
            "rxlm.evaluation.statistics",
            "rxlm.evaluation.report",
            "rxlm.evaluation.suite.settings",
            "rxlm.evaluation.suite.contestant",
            "rxlm.evaluation.suite.runner",
            "rxlm.evaluation.suite.findings",
            "rxlm.evaluation.reward",
            "rxlm.evaluation.memory_trace",
        ),
    ),
    "study": Page(
        "The study",
        "Attention mechanisms at equal size.",
        (
            "rxlm.study.settings",
            "rxlm.study.mechanisms",
            "rxlm.study.trainer",
            "rxlm.study.runner",
            "rxlm.study.report",
            "rxlm.data.synthetic_tasks",
            "rxlm.data.characters",
        ),
    ),
    "lm": Page(
        "Language models without a memory",
        "The baseline, with any attention.",
        ("rxlm.lm", "rxlm.lm.generation"),
    ),
    "base": Page(
        "Foundations",
        "Errors, the base of every configuration, model folders, the Hub.",
        (
            "rxlm.errors",
            "rxlm.configuration",
            "rxlm.storage.model_folder",
            "rxlm.storage.model_card",
            "rxlm.storage.hub",
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the API and command-line reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the pages")
    options = parser.parse_args(arguments)
    pages = reference()
    present = {path.relative_to(options.docs).as_posix() for path in options.docs.glob("api/*.md")}
    stale = sorted(present - set(pages))
    for name, text in pages.items():
        path = options.docs / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if not options.check:
        for name in present - set(pages):
            (options.docs / name).unlink()
    if stale and options.check:
        print(f"out of date: {', '.join(stale)}. Run: python scripts/api_reference.py")
        return 1
    print(f"written: {', '.join(stale)}" if stale else "up to date")
    return 0


def reference() -> dict[str, str]:
    """Return the text of every page, by its path under ``docs``."""
    pages: dict[str, str] = {}
    seen: set[object] = set()
    listed: dict[type, str] = {}
    for name, page in PAGES.items():
        for module_name in page.modules:
            for entry in public_names(importlib.import_module(module_name)):
                if inspect.isclass(entry.value):
                    listed.setdefault(
                        entry.value, f"[{entry.name}]({name}.md#{entry.name.lower()})"
                    )
    index = ["# API reference", "", MADE_BY, ""]
    index += ["Made from the docstrings. The guides begin on [the start page](../index.md).", ""]
    for name, page in PAGES.items():
        lines = [f"# {page.title}", "", MADE_BY, "", page.purpose, ""]
        index += [f"## {page.title}", "", f"{page.purpose} [{name}.md]({name}.md)", ""]
        index += ["| | |", "|---|---|"]
        for module_name in page.modules:
            module = importlib.import_module(module_name)
            entries = [entry for entry in public_names(module) if not known(entry, seen)]
            if not entries:
                continue
            lines += [f"## {module_name}", "", markdown(module.__doc__ or ""), ""]
            for entry in entries:
                lines += [*describe(entry, module, listed), ""]
                first = summary(entry)
                index.append(f"| [{entry.name}]({name}.md#{entry.name.lower()}) | {first} |")
        index.append("")
        pages[f"api/{name}.md"] = tidy(lines)
    pages["api/index.md"] = tidy(index)
    pages["cli.md"] = tidy(command_line(MADE_BY))
    return pages


def tidy(lines: Sequence[str]) -> str:
    """Join lines: no space at their ends, no two empty ones in a row, one newline at the end."""
    text = "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
