"""YAML recipes: ``extends:``, dotted overrides, and errors that name file, line and dotted path.

This module turns files into plain mappings and plain mappings into configurations. What a recipe
of a given stage contains is not known here. No torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from rxlm.errors import UserError

EXTENDS = "extends"
_MISSING = object()


class LoadedRecipe(NamedTuple):
    """A resolved recipe and where each of its keys was written."""

    values: dict[str, Any]
    """The merged mapping, overrides applied, without ``extends``."""
    origins: dict[str, str]
    """Dotted path -> ``file:line`` (or ``override 'a.b=c'``) of the value that won."""


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2.

    PyYAML speaks YAML 1.1, in which ``1e-4`` is a string, ``no`` is false and ``2024-01-01`` is a
    date object. All three surprise the writer of a recipe.
    """


_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("float", "bool", "timestamp")}
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


def load_mapping(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the recipe file as a mapping: parents merged (the child wins), overrides applied.

    Args:
        path: a YAML file; its optional ``extends:`` names one parent, relative to the file.
        overrides: ``a.b=c`` strings, applied in order; the value is read as YAML.

    Raises:
        UserError: for a missing file, a syntax error, a duplicate or non-text key, a circular
            ``extends``, or an override that cannot be applied. The message names file and line.
    """
    return load_recipe(path, overrides).values


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Like :func:`load_mapping`, and also return where every key was written."""
    values, origins = _load_with_parents(Path(path), ())
    for override in overrides:
        values = apply_overrides(values, [override])
        dotted = override.split("=", 1)[0].strip()
        # What the override replaced no longer comes from the file.
        origins = {key: at for key, at in origins.items() if not key.startswith(f"{dotted}.")}
        origins[dotted] = f"override '{override}'"
    return LoadedRecipe(values, origins)


def parse_recipe(recipe: LoadedRecipe, schema: Any) -> Any:
    """Return the recipe as an instance of ``schema``.

    Args:
        recipe: what :func:`load_recipe` returned.
        schema: a configuration class, or a tagged union of them (anything that pydantic's
            ``TypeAdapter`` takes).

    Raises:
        UserError: one line per problem: ``file:line: dotted.path: message (got value)``. An
            unknown key is a problem, and the nearest known key is named.
    """
    try:
        return TypeAdapter(schema).validate_python(recipe.values)
    except ValidationError as error:
        lines = [_describe_problem(recipe, problem) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``values`` with every ``a.b=c`` applied; missing mappings are created.

    Raises:
        UserError: when an override is not of the form ``a.b=c``, its value is not YAML, or its
            path leads through a value that is not a mapping.
    """
    result = copy.deepcopy(dict(values))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"override '{override}': expected key=value or a.b.c=value.")
        target = result
        for depth, key in enumerate(keys[:-1]):
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UserError(
                    f"override '{override}': '{'.'.join(keys[: depth + 1])}' is {target!r}, not a "
                    f"mapping, so it has no '{keys[depth + 1]}'. Set it as a whole instead."
                )
        target[keys[-1]] = _parse_scalar(text, override)
    return result


def deep_merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``overlay`` on top: mappings merge key by key, all else is replaced."""
    result = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in overlay.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = deep_merge(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def diff_mappings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line ``dotted.path: old -> new`` per difference, sorted; ``[]`` when equal.

    Tuples and lists are equal when their items are, so that a mapping read back from JSON or YAML
    can be compared with the one that was written.
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{path}: {_show(before.get(path, _MISSING))} -> {_show(after.get(path, _MISSING))}"
        for path in sorted(before.keys() | after.keys())
        if _show(before.get(path, _MISSING)) != _show(after.get(path, _MISSING))
    ]


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify the content of a JSON-like mapping."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_with_parents(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], Any]:
    """Return values and origins of ``path`` merged over its parent's."""
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(str(item) for item in (*children, resolved))
        raise UserError(f"{path}: 'extends' goes round in a circle: {chain}. Remove one of them.")
    values, origins = _load_file(path)
    parent = values.pop(EXTENDS, None)
    at = origins.pop(EXTENDS, str(path))
    if parent is None:
        return values, origins
    if not isinstance(parent, str):
        raise UserError(f"{at}: 'extends' must be one relative path, got {parent!r}.")
    parent_path = path.parent / parent
    if not parent_path.is_file():
        raise UserError(f"{at}: 'extends: {parent}' names no file (looked for {parent_path}).")
    base, base_origins = _load_with_parents(parent_path, (*children, resolved))
    return deep_merge(base, values), {**base_origins, **origins}


def _load_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read one YAML file; returns its mapping and the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; expected one YAML recipe file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    loader = _RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
            raise UserError(f"{path}:1: expected a mapping of keys, got {kind}.")
        origins = dict(_key_lines(node, path, ""))
        values: dict[str, Any] = loader.construct_document(node)
        return values, origins
    except yaml.YAMLError as error:
        raise UserError(_describe_syntax_error(error, str(path))) from None
    finally:
        loader.dispose()


def _key_lines(node: yaml.Node, path: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, ``file:line``) of every key; refuse duplicate and non-text keys."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _key_lines(item, path, f"{prefix}{index}.")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        at = f"{path}:{key_node.start_mark.line + 1}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        if key_node.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{at}: the key {key_node.value!r} is not text; put it in quotes.")
        if key_node.value in seen:
            raise UserError(f"{at}: the key '{prefix}{key_node.value}' is written twice.")
        seen.add(key_node.value)
        yield f"{prefix}{key_node.value}", at
        yield from _key_lines(value_node, path, f"{prefix}{key_node.value}.")


def _describe_syntax_error(error: yaml.YAMLError, name: str) -> str:
    """Return ``file:line: problem`` for an error of the YAML parser."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{name}{line}: not valid YAML: {problem}."


def _parse_scalar(text: str, override: str) -> Any:
    """Read the right-hand side of an override as YAML."""
    loader = _RecipeLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(_describe_syntax_error(error, f"override '{override}'")) from None
    finally:
        loader.dispose()


def _describe_problem(recipe: LoadedRecipe, problem: Any) -> str:
    """Return ``where: dotted.path: message`` for one entry of ``ValidationError.errors()``."""
    path, value = _locate(recipe.values, problem["loc"])
    if problem["type"] == "missing":
        path = (*path, str(problem["loc"][-1]))
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, Mapping):
        # A nested configuration reports its unknown key from its constructor, at its own path.
        unknown = [key for key in value if f"has no field '{key}'" in message]
        path = (*path, *unknown[:1])
    given = "" if problem["type"] in {"value_error", "missing"} else f" (got {value!r})"
    where = _origin(recipe.origins, path)
    return ": ".join(part for part in (where, ".".join(path), f"{message}{given}") if part)


def _locate(values: Any, location: Sequence[int | str]) -> tuple[tuple[str, ...], Any]:
    """Follow pydantic's location through the recipe; union tags and the like are left out."""
    path: list[str] = []
    for part in location:
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_list or (isinstance(values, Mapping) and part in values):
            values = values[part]
            path.append(str(part))
    return tuple(path), values


def _origin(origins: Mapping[str, str], path: tuple[str, ...]) -> str:
    """Return where ``path``, or the nearest mapping around it, was written; '' if unknown."""
    for length in range(len(path), 0, -1):
        found = origins.get(".".join(path[:length]))
        if found is not None:
            return found
    return ""


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of everything that is not a non-empty mapping."""
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _show(value: Any) -> str:
    """Return a value as the diff writes it."""
    return "(absent)" if value is _MISSING else json.dumps(value, sort_keys=True, default=str)
