"""Sections of the API reference: what a module offers, and each name as Markdown.

Not here: the pages and the command line to make them (``api_reference``), docstrings to Markdown
(``reference_text``).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel
from reference_text import cell, fence, inline, markdown, own_doc

MAX_SIGNATURE = 96
"""Longest call on one line."""


class Entry(NamedTuple):
    """A public name of a module; a constant has its source and its docstring, if there is one."""

    name: str
    value: Any
    constant: tuple[str, str] | None = None


def known(entry: Entry, seen: set[object]) -> bool:
    """Return whether a name has been listed: a class or function, or a constant by its source."""
    is_object = inspect.isclass(entry.value) or inspect.isfunction(entry.value)
    what = id(entry.value) if is_object else entry.constant
    if what is None or what not in seen:
        seen.add(what)
        return False
    return True


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
