"""``rxlm config``: look at recipes: resolved (show), checked (validate), described (schema)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console
from rxlm.cli.model_costs import show_costs
from rxlm.cli.train import print_recipe
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.training.recipes import StageFile

RecipePath = Annotated[Path, typer.Argument(metavar="PATH", help="A recipe, or a folder of them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace the recipe's."),
]


def register(app: typer.Typer) -> None:
    """Add ``config`` to the command line."""
    family = typer.Typer(help="Look at recipes.", no_args_is_help=True)
    family.command("show")(show)
    family.command("validate")(validate)
    family.command("schema")(schema)
    app.add_typer(family, name="config")


def show(
    path: RecipePath,
    overrides: Overrides = None,
    params: Annotated[
        bool,
        typer.Option(
            "--params", help="Print what its model costs instead: parameters, operations, bytes."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --params: as JSON on standard output.")
    ] = False,
) -> None:
    """Print a recipe with its parents merged, overrides applied and every default filled in.

    Example: rxlm config show stages/nano/50_memory_aware.yaml train.steps=500
    """
    if params:
        show_costs(path, overrides or [], as_json=as_json)
        return
    if as_json:
        raise UserError("--json goes with --params: a recipe is printed as YAML.")
    stages = _read(path, overrides or [])
    for index, stage in enumerate(stages):
        if len(stages) > 1:
            console.results().out(f"{'---' if index else ''}\n# {stage.path}".strip())
        print_recipe(stage.recipe)


def validate(path: RecipePath, overrides: Overrides = None) -> None:
    """Check recipes; says what is wrong, where, and what was probably meant.

    Example: rxlm config validate stages/nano
    """
    for stage in _read(path, overrides or []):
        console.results().out(f"{stage.path}: valid ({stage.recipe.stage})", highlight=False)


def schema() -> None:
    """Print the JSON Schema of recipes, for completion in editors.

    Example: rxlm config schema > recipe.schema.json, and in a recipe's first line:
    # yaml-language-server: $schema=recipe.schema.json
    """
    console.print_json(recipe_schema())


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipe files.

    Nothing is required in it: any key may come from the parent that ``extends`` names.
    """
    from pydantic import TypeAdapter

    from rxlm.training.recipe import EXTENDS
    from rxlm.training.recipes import STAGES, AnyRecipe

    content: dict[str, Any] = TypeAdapter(AnyRecipe).json_schema()
    for definition in content["$defs"].values():
        definition.pop("required", None)
    for recipe in STAGES.values():
        content["$defs"][recipe.__name__]["properties"][EXTENDS] = {
            "type": "string",
            "description": "Another recipe, relative to this one, whose keys this one replaces.",
        }
    # A recipe without a stage, such as _base.yaml, fits several of them.
    content["anyOf"] = content.pop("oneOf")
    content.pop("discriminator", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rxlm recipe",
        **content,
    }


def _read(path: Path, overrides: list[str]) -> list[StageFile]:
    from rxlm.training.recipes import read_folder, read_recipe

    return read_folder(path, overrides) if path.is_dir() else [read_recipe(path, overrides)]
