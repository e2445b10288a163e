"""Recipes: parents, overrides, the scalars of YAML 1.2, and errors that name file and line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.training.recipe import (
    apply_overrides,
    deep_merge,
    diff_mappings,
    load_mapping,
    load_recipe,
    parse_recipe,
)
from rxlm.training.settings import TrainSettings


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_child_wins_over_parent_and_override_over_both(tmp_path: Path) -> None:
    """Catches a wrong order of precedence, and a merge that drops the parent's other keys."""
    write(tmp_path / "base/base.yaml", "a: {x: 1, y: 2, z: [1, 2]}\nb: base\n")
    write(tmp_path / "mid.yaml", "extends: base/base.yaml\na: {y: 20}\n")
    child = write(tmp_path / "child.yaml", "extends: mid.yaml\na: {z: [3]}\nc: null\n")
    values = load_mapping(child, ["a.x=100", "d.e=new"])
    assert values == {
        "a": {"x": 100, "y": 20, "z": [3]},
        "b": "base",
        "c": None,
        "d": {"e": "new"},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("7", 7),
        ("true", True),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("", None),
        ("[1, 2e-1]", [1, 0.2]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    """Catches the traps of YAML 1.1: ``1e-4`` as text, ``no`` as false, dates as objects."""
    result = apply_overrides({}, [f"key={text}"])["key"]
    assert result == value
    assert type(result) is type(value)


def test_a_file_reads_the_same_scalars_as_an_override(tmp_path: Path) -> None:
    """Catches a file loader and an override parser that differ."""
    path = write(tmp_path / "r.yaml", "lr: 1e-4\nflag: off\n")
    assert load_mapping(path) == {"lr": 1e-4, "flag": "off"}


def test_overrides_leave_their_input_alone() -> None:
    """Catches an override that changes the mapping that it was given."""
    values = {"a": {"b": 1}}
    assert apply_overrides(values, ["a.b=2"]) == {"a": {"b": 2}}
    merged = deep_merge(values, {"a": {"c": [3]}})
    merged["a"]["b"] = 9
    assert values == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b", "expected key=value"),
        ("a..b=1", "expected key=value"),
        ("=1", "expected key=value"),
        ("a.b.c=1", "'a.b' is 5, not a mapping"),
        ("a=[1", "not valid YAML"),
    ],
)
def test_bad_overrides_are_named(override: str, expected: str) -> None:
    """Catches an override that is ignored or ends in a traceback."""
    with pytest.raises(UserError) as error:
        apply_overrides({"a": {"b": 5}}, [override])
    assert expected in str(error.value)
    assert f"'{override}'" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1\nc: 2\n", "r.yaml:3: not valid YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "r.yaml:4: the key 'b.c' is written twice"),
        ("a: 1\n3: x\n", "r.yaml:2: the key '3' is not text"),
        ("- a\n", "r.yaml:1: expected a mapping of keys, got a list"),
        ("\nextends: [a, b]\n", "r.yaml:2: 'extends' must be one relative path"),
        ("extends: none.yaml\n", "r.yaml:1: 'extends: none.yaml' names no file"),
    ],
)
def test_file_errors_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    """Catches a message that leaves the writer searching."""
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(UserError) as error:
        load_mapping(path)
    assert expected in str(error.value)


def test_unreadable_files_are_user_errors(tmp_path: Path) -> None:
    """Catches a traceback for a missing file, a folder, or a file that is not text."""
    with pytest.raises(UserError, match="no such recipe"):
        load_mapping(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="folder"):
        load_mapping(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_mapping(tmp_path / "binary.yaml")


def test_a_circle_of_parents_is_an_error(tmp_path: Path) -> None:
    """Catches endless recursion."""
    first = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_mapping(first)


class _Model(Config):
    width: int = 8


class _First(Config):
    stage: Literal["first"]
    model: _Model = _Model()
    training: TrainSettings


class _Second(Config):
    stage: Literal["second"]
    rounds: int = Field(default=1, gt=0)


_Recipe = Annotated[_First | _Second, Field(discriminator="stage")]


def problem(tmp_path: Path, text: str, *overrides: str, schema: object = _Recipe) -> str:
    recipe = load_recipe(write(tmp_path / "r.yaml", text), overrides)
    with pytest.raises(UserError) as error:
        parse_recipe(recipe, schema)
    return str(error.value)


def test_a_good_recipe_becomes_its_configuration(tmp_path: Path) -> None:
    """Catches a tagged union that picks the wrong stage, or a value lost on the way."""
    path = write(tmp_path / "r.yaml", "stage: first\ntraining: {steps: 3, lr: 1e-4}\n")
    recipe = parse_recipe(load_recipe(path, ["model.width=16"]), _Recipe)
    assert isinstance(recipe, _First)
    assert (recipe.model.width, recipe.training.steps, recipe.training.lr) == (16, 3, 1e-4)


def test_unknown_keys_have_line_path_and_hint(tmp_path: Path) -> None:
    """Catches a misspelt key that is ignored, or reported without its place or the right name."""
    text = "stage: first\ntraining:\n  steps: 3\n  warmup_step: 5\n"
    message = problem(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'r.yaml'}:4: training.warmup_step: ")
    assert "did you mean 'warmup_steps'?" in message
    message = problem(tmp_path, "stage: second\nround: 2\n")
    assert "r.yaml:2: round: " in message
    assert "did you mean 'rounds'?" in message
    message = problem(tmp_path, "widht: 2\n", schema=_Model)
    assert "r.yaml:1: widht: " in message
    assert "did you mean 'width'?" in message


def test_bad_values_have_line_path_and_value(tmp_path: Path) -> None:
    """Catches a message without the value, or one that blames the file for an override."""
    text = "stage: first\ntraining:\n  steps: many\n"
    message = problem(tmp_path, text)
    assert "r.yaml:3: training.steps: " in message
    assert "(got 'many')" in message
    message = problem(tmp_path, text, "training.steps=0")
    assert message.startswith("override 'training.steps=0': training.steps: ")
    assert "training.steps" in problem(tmp_path, "stage: first\ntraining: {}\n")
    assert "third" in problem(tmp_path, "stage: third\n")


def test_the_place_is_that_of_the_file_that_wins(tmp_path: Path) -> None:
    """Catches origins that name the parent for a value of the child, or the other way round."""
    write(tmp_path / "base.yaml", "stage: first\ntraining:\n  steps: 0\n  lr: 0\n")
    message = problem(tmp_path, "extends: base.yaml\n\ntraining: {steps: -1}\n")
    assert "r.yaml:3: training.steps" in message
    assert "base.yaml:4: training.lr" in message


def test_diff_lists_every_change_once() -> None:
    """Catches a diff that misses an added, a removed, or a nested value, or cries over a tuple."""
    old = {"a": {"x": 1, "same": (1, 2)}, "gone": True}
    new = {"a": {"x": 2, "same": [1, 2]}, "b": {"c": None}}
    assert diff_mappings(old, new) == [
        "a.x: 1 -> 2",
        "b.c: (absent) -> null",
        "gone: true -> (absent)",
    ]
    assert diff_mappings(old, old) == []


def test_recipes_and_settings_do_not_import_torch() -> None:
    """Catches a heavy import that would make ``rxlm --help`` and ``rxlm config`` slow."""
    code = (
        "import sys, rxlm.training, rxlm.training.recipe, rxlm.training.settings, "
        "rxlm.training.run_folder, rxlm.training.checkpoint, rxlm.training.metrics; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
