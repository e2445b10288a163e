"""Writes the API reference (``docs/api``) and the command-line reference (``docs/cli.md``).

    python scripts/api_reference.py            # rewrites what is out of date
    python scripts/api_reference.py --check    # exit status 1 if something is

The pages are made of docstrings, signatures and help texts only, so what they say stands beside
the code. ``PAGES`` is the table of what is public. Run it after every change of a docstring, a
signature or a command. Not here: the guides, which are written by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel
from typer.main import get_command

from rxlm.cli.main import Invocation, build_app

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = "<!-- Made by scripts/api_reference.py: change the docstrings, then run it. -->"
MAX_SIGNATURE = 96


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
            "rxlm.rxt.conversation",
            "rxlm.rxt.generation",
            "rxlm.rxt.components",
            "rxlm.rxt.memory_building",
            "rxlm.rxt.freezing",
            "rxlm.rxt.parameter_groups",
            "rxlm.rxt.accounting",
            "rxlm.rxt.fingerprint",
            "rxlm.rxt.model_card",
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
        ("rxlm.data", "rxlm.data.mqar"),
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
            "rxlm.evaluation.language_model",
            "rxlm.evaluation.scoring",
            "rxlm.evaluation.statistics",
            "rxlm.evaluation.report",
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
    seen: set[int] = set()
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
            entries = [entry for entry in public_names(module) if not known(entry.value, seen)]
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
    pages["cli.md"] = tidy(command_line())
    return pages


def tidy(lines: Sequence[str]) -> str:
    """Join lines: no space at their ends, no two empty ones in a row, one newline at the end."""
    text = "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


# What is public.


class Entry(NamedTuple):
    """A public name of a module; a constant has its source and its docstring, if there is one."""

    name: str
    value: Any
    constant: tuple[str, str] | None = None


def known(value: Any, seen: set[int]) -> bool:
    """Return whether a class or function has been listed; constants are never the same thing."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return False
    if id(value) in seen:
        return True
    seen.add(id(value))
    return False


def public_names(module: ModuleType) -> list[Entry]:
    """Return what a module offers: ``__all__`` and its later imports, or what it defines."""
    listed = [*getattr(module, "__all__", ()), *getattr(module, "_EXPORTS", ())]
    if not listed:
        listed = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module.__name__
        ]
        listed += [name for name, (_, text) in constants_of(module).items() if text]
    entries = []
    for name in sorted(set(listed) - {"__version__"}, key=lambda word: (word.lower(), word)):
        value = getattr(module, name)
        is_object = inspect.isclass(value) or inspect.isfunction(value)
        entries.append(Entry(name, value, None if is_object else constant(name, module)))
    return entries


@cache
def constants_of(module: ModuleType) -> dict[str, tuple[str, str]]:
    """Return source and docstring of the constants that a module defines, by name."""
    source = inspect.getsource(module)
    found: dict[str, tuple[str, str]] = {}
    body = ast.parse(source).body
    for place, node in enumerate(body):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                text = ast.get_source_segment(source, node) or ""
                found[target.id] = (text, docstring_after(body, place))
    return found


def constant(name: str, module: ModuleType) -> tuple[str, str] | None:
    """Return source and docstring of a constant, from the module that a module imports it from."""
    if name in constants_of(module):
        return constants_of(module)[name]
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
            continue
        if name in [alias.asname or alias.name for alias in node.names]:
            return constant(name, importlib.import_module(node.module))
    return None


def docstring_after(body: Sequence[ast.stmt], place: int) -> str:
    """Return the string that stands alone after a statement, '' if there is none."""
    following = body[place + 1] if place + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return inspect.cleandoc(str(following.value.value))
    return ""


# Names to Markdown.


def summary(entry: Entry) -> str:
    """Return the first sentence about a name, for the table of names."""
    text = entry.constant[1] if entry.constant else own_doc(entry.value)
    first = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return cell(inline(first.rstrip(":")))


def describe(entry: Entry, module: ModuleType, listed: Mapping[type, str]) -> list[str]:
    """Return the section of one name; ``listed`` has the links of all classes."""
    lines = [f"### {entry.name}", ""]
    if inspect.isclass(entry.value):
        return lines + describe_class(entry.value, module, listed)
    if inspect.isfunction(entry.value):
        text = markdown(own_doc(entry.value))
        return [*lines, *fence(signature(entry.name, entry.value)), text]
    source, text = entry.constant or (entry.name, "")
    return [*lines, *fence(source), markdown(text)]


def describe_class(cls: type, module: ModuleType, listed: Mapping[type, str]) -> list[str]:
    """Return constructor, fields and public methods of a class, with those that it inherits.

    What it inherits from a class that is listed as well is found there.
    """
    lines = fence(f"from {module.__name__} import {cls.__name__}")
    bases = [base for base in cls.__mro__[1:] if base in listed]
    if bases:
        lines += [f"Inherits from {', '.join(listed[base] for base in bases)}.", ""]
    lines += [markdown(own_doc(cls)), ""]
    fields = list(fields_of(cls))
    if fields:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in fields
        ]
        lines.append("")
    elif "__init__" in vars(cls):
        init = vars(cls)["__init__"]
        lines += [*fence(signature(cls.__name__, init)), markdown(own_doc(init)), ""]
    for name, member in methods_of(cls, bases):
        lines += [f"#### {cls.__name__}.{name}", ""]
        if isinstance(member, property):
            returned = annotation(getattr(member.fget, "__annotations__", {}).get("return"))
            lines += [*fence(f"{name}: {returned}"), markdown(own_doc(member.fget)), ""]
            continue
        function = getattr(member, "__func__", member)
        mark = {classmethod: "@classmethod\n", staticmethod: "@staticmethod\n"}
        before = mark.get(type(member), "")
        lines += [*fence(before + signature(name, function)), markdown(own_doc(function)), ""]
    return lines


def fields_of(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and meaning of the fields of a configuration or a record."""
    texts: dict[str, str] = {}
    kinds: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("rxlm"):
            texts |= attribute_docs(base)
            kinds |= inspect.get_annotations(base)
    defaults: dict[str, Any] = {}
    if issubclass(cls, BaseModel):
        names = list(cls.model_fields)
        for name, field in cls.model_fields.items():
            if not field.is_required():
                defaults[name] = field.get_default(call_default_factory=True)
    elif dataclasses.is_dataclass(cls):
        items = [item for item in dataclasses.fields(cls) if not item.name.startswith("_")]
        names = [item.name for item in items]
        for item in items:
            if item.default is not dataclasses.MISSING:
                defaults[item.name] = item.default
    elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
        names, defaults = list(cls._fields), dict(cls._field_defaults)
    else:
        return
    for name in names:
        kind = cell(f"`{annotation(kinds.get(name))}`") if name in kinds else ""
        default = cell(f"`{shown(defaults[name])}`") if name in defaults else ""
        yield name, kind, default, cell(inline(" ".join(texts.get(name, "").split())))


@cache
def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    node = tree.body[0]
    assert isinstance(node, ast.ClassDef)
    return {
        item.target.id: docstring_after(node.body, place)
        for place, item in enumerate(node.body)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def methods_of(cls: type, listed_bases: Sequence[type] = ()) -> list[tuple[str, Any]]:
    """Return public methods and properties in the order of their definition, nearest class first.

    What other libraries define (``torch.nn.Module``) is left out, as is what ``listed_bases``
    have, unless it has a docstring of its own here.
    """
    found: dict[str, Any] = {}
    elsewhere = {name for base in listed_bases for name in dir(base)}
    for base in cls.__mro__:
        if not base.__module__.startswith("rxlm") or base in listed_bases:
            continue
        for name, member in vars(base).items():
            is_method = inspect.isfunction(member) or isinstance(
                member, classmethod | staticmethod | property
            )
            if not is_method or name.startswith("_") or name in found:
                continue
            if name not in elsewhere or member.__doc__:
                found[name] = member
    return list(found.items())


def signature(name: str, function: Any) -> str:
    """Return a call as it is typed, over several lines if it is long."""
    parameters = []
    kinds = inspect.Parameter
    star = False
    for item in inspect.signature(function).parameters.values():
        if item.name in ("self", "cls"):
            continue
        if item.kind is kinds.KEYWORD_ONLY and not star:
            parameters.append("*")
        star = star or item.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        prefix = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(item.kind, "")
        text = prefix + item.name
        if item.annotation is not kinds.empty:
            text += f": {annotation(item.annotation)}"
        if item.default is not kinds.empty:
            text += f" = {shown(item.default)}"
        parameters.append(text)
    returned = function.__annotations__.get("return") if name[0].islower() else None
    end = ")" if returned is None else f") -> {annotation(returned)}"
    short = f"{name}({', '.join(parameters)}{end}"
    if len(short) <= MAX_SIGNATURE:
        return short
    return "\n".join([f"{name}(", *(f"    {item}," for item in parameters), end])


def annotation(value: Any) -> str:
    """Return a type as the source spells it."""
    text = value if isinstance(value, str) else getattr(value, "__name__", repr(value))
    return text.removeprefix("typing.")


def shown(value: Any) -> str:
    """Return a default in a form that is the same in every process."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"{type(value).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"
    text = repr(value)
    return "..." if " at 0x" in text else text


# Docstrings to Markdown.

_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Examples?|Notes?):$")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes"}


def own_doc(value: Any) -> str:
    """Return the docstring of a thing itself: not an inherited one, nor one that was made up."""
    text = value.__doc__ or ""
    if inspect.isclass(value):
        text = vars(value).get("__doc__") or ""
        if dataclasses.is_dataclass(value) and text.startswith(f"{value.__name__}("):
            return ""
    return inspect.cleandoc(text)


def markdown(docstring: str) -> str:
    """Return a Google-style docstring as Markdown."""
    lines = inspect.cleandoc(docstring).splitlines()
    output: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        section = _SECTION.match(line)
        if section or line.rstrip().endswith("::"):
            block, place = indented(lines, place + 1)
            if section:
                output += section_lines(section[1], block)
            else:
                output += [inline(line.rstrip()[:-1]), "", *fence("\n".join(block).strip("\n"))]
            continue
        output.append(inline(line) if not line.startswith("    ") else line)
        place += 1
    return "\n".join(output)


def indented(lines: Sequence[str], place: int) -> tuple[list[str], int]:
    """Return the indented lines from ``place`` on, dedented, and where they end."""
    end = place
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    block = inspect.cleandoc("\n" + "\n".join(lines[place:end])).splitlines()
    return block, end


def section_lines(title: str, block: Sequence[str]) -> list[str]:
    """Return one section of a docstring: a list of names, or a paragraph."""
    if title in ("Returns", "Yields", "Note", "Notes"):
        return ["", inline(f"**{title}:** " + " ".join(block)), ""]
    if title.startswith("Example"):
        return ["", f"**{title}:**", "", *fence("\n".join(block)), ""]
    items: list[str] = []
    for line in block:
        if line.startswith(" ") or not line.strip() or not re.match(r"[*\w., ]+: ", line):
            items[-1:] = [f"{items[-1]} {line.strip()}".rstrip()] if items else [line]
        else:
            name, _, text = line.partition(": ")
            items.append(f"- `{name}`: {text}")
    return ["", f"**{_TITLES.get(title, title)}:**", "", *map(inline, items), ""]


def inline(text: str) -> str:
    """Return a line with roles and double backticks as Markdown code."""
    text = re.sub(r":\w+:`~([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(text: str) -> str:
    """Return text that does not end a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def fence(code: str) -> list[str]:
    """Return code in a fence."""
    return ["```py", *code.splitlines(), "```", ""]


# The command line.


def command_line() -> list[str]:
    """Return the page of all commands."""
    lines = ["# Command line", "", MADE_BY, ""]
    lines += ["Every command has `--help`. Exit status: 0 done, 1 a run failed, 2 the input cannot"]
    lines += ["be used, 130 stopped by Ctrl-C. `--debug` before the command shows tracebacks.", ""]
    root = get_command(build_app(Invocation()))
    for words, command in leaves(root, ("rxlm",)):
        lines += [f"## {' '.join(words)}", "", *describe_command(words, command), ""]
    return lines


def leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of everything that can be run."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, (*words, name))


def describe_command(words: Sequence[str], command: Any) -> list[str]:
    """Return usage, help text and parameters of a command."""
    usage, rows = [*words], []
    options = [item for item in command.params if item.param_type_name == "option"]
    usage += ["[OPTIONS]"] if options else []
    for item in command.params:
        text = cell(" ".join((getattr(item, "help", None) or "").split()))
        name = (item.metavar or item.name or "").upper()
        if item.param_type_name == "argument":
            name = name.strip("[].")
            shown_name = name if item.required else f"[{name}]"
            usage.append(shown_name + ("..." if item.nargs == -1 else ""))
            rows.append(f"| `{name}` | | {text} |")
            continue
        value = "" if item.is_flag else f" {item.metavar or item.name.upper()}"
        default = item.default if not item.is_flag and not callable(item.default) else None
        default = "required" if item.required else "" if default in (None, ()) else f"`{default}`"
        names = ", ".join([*item.opts, *item.secondary_opts])
        rows.append(f"| `{cell(names + value)}` | {default} | {text} |")
    lines = ["```text", " ".join(usage), "```", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        example = paragraph.removeprefix("Example: ")
        if example == paragraph:
            lines += [paragraph, ""]
        else:
            language = "text" if "\n" in example else "bash"
            lines += ["Example:", "", f"```{language}", example, "```", ""]
    return [*lines, "| | default | |", "|---|---|---|", *rows] if rows else lines


if __name__ == "__main__":
    sys.exit(main())
