"""Running one stage: where its inputs lie, whether it is finished, training it into its folder.

A stage's run folder is named after its recipe (``runs/nano/20_joint_lm``), beside those of the
other recipes of the folder; that is how ``previous`` is found. Not here: several stages
(``pipeline.py``).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from rxlm.errors import UserError
from rxlm.storage.model_folder import resolve_model_dir
from rxlm.tokenization.storage import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from rxlm.training.build import StageInputs, build_model, build_objective
from rxlm.training.build_lm import build_language_model, build_lm_objective
from rxlm.training.checkpoint import find_latest
from rxlm.training.distributed.world import World, open_world
from rxlm.training.objectives.language_modeling import LMObjective
from rxlm.training.objectives.model_objective import ModelObjective
from rxlm.training.recipe import diff_mappings, fingerprint, load_mapping
from rxlm.training.recipes import (
    PREVIOUS,
    LMRecipe,
    ModelRecipe,
    StageFile,
    TokenizerRecipe,
    read_recipe,
    recipe_files,
    recipe_values,
    result_values,
)
from rxlm.training.run_folder import RunFolder, read_status, write_atomically
from rxlm.training.tokenizer_stage import run_tokenizer_stage
from rxlm.training.trainer import Trainer

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
FINISHED = ("complete", "early_stopped")


class StageResult(NamedTuple):
    """How a stage ended."""

    name: str
    folder: Path
    status: str
    """``complete``, ``early_stopped`` or ``interrupted``."""
    metrics: dict[str, float | None]
    seconds: float
    """Training time over all starts."""
    skipped: bool = False
    """Whether it was finished before."""
    signal: int | None = None
    """What interrupted it."""


def default_run_folder(stage: StageFile) -> Path:
    """Return ``runs/<recipe folder>/<recipe>``."""
    return Path("runs", stage.path.resolve().parent.name, stage.name)


def run_stage(stage: StageFile, folder: Path, console: Console | None = None) -> StageResult:
    """Train one stage into ``folder``, or go on with what is there.

    Called in every process that ``torchrun`` started; they share the work, process 0 writes.

    Args:
        stage: the recipe.
        folder: the run folder; its parent holds those of the other recipes.
        console: where the progress bar goes; default standard error.

    Raises:
        UserError: when an input is missing or something does not fit.
        RunError: when the run fails.
    """
    with open_world() as world:
        return _run_stage(stage, folder, console, world)


def _run_stage(
    stage: StageFile, folder: Path, console: Console | None, world: World
) -> StageResult:
    recipe = stage.recipe
    values = recipe_values(recipe)
    if isinstance(recipe, TokenizerRecipe):
        if world.size > 1:
            raise UserError("stage tokenizer runs in one process: start it without torchrun.")
        run = RunFolder.open(folder, recipe.stage, values)
        done = run.read_status()
        if done is None or done.status not in FINISHED or changes(stage, folder):
            done = run_tokenizer_stage(recipe.data, recipe.tokenizer, recipe.objective, run)
        return StageResult(stage.name, folder, done.status, done.metrics, done.seconds)
    # All that can be wrong with the input is found out before anything is written.
    inputs = find_inputs(stage, folder)
    objective = build_stage(recipe, inputs)
    run = RunFolder.open(folder, recipe.stage, values, writes=world.is_main)
    # Nobody goes on before all have seen the folder as it was.
    world.wait()
    if world.is_main and find_latest(folder) is None:
        write_inputs(stage, folder, objective.tokenizer.fingerprint)
    result = Trainer(objective, recipe.train, run, console).train()
    return StageResult(
        stage.name, folder, result.status, result.metrics, result.seconds, signal=result.signal
    )


def build_stage(
    recipe: ModelRecipe | LMRecipe, inputs: StageInputs
) -> ModelObjective | LMObjective:
    """Return the objective of a stage, around its model, with its data opened.

    Raises:
        UserError: when something does not fit.
    """
    if isinstance(recipe, LMRecipe):
        return build_lm_objective(recipe, build_language_model(recipe, *inputs))
    model = build_model(recipe, inputs)
    return build_objective(recipe, model, model.require_tokenizer(), inputs.model_folder)


def find_inputs(stage: StageFile, folder: Path) -> StageInputs:
    """Return where the model and the tokenizer of a stage come from.

    A run with a checkpoint goes on from that; what it began with is then not needed any more.

    Raises:
        UserError: when something is missing; the message says how to make it.
    """
    recipe = stage.recipe
    own = find_latest(folder) if folder.is_dir() else None
    if own is not None:
        return StageInputs(own, own)
    if recipe.init_from == PREVIOUS:
        before = previous_recipes(stage, "init_from")[-1]
        model_folder = resolve_model_dir(_finished(before, folder, stage, "init_from"))
    elif recipe.init_from is not None:
        model_folder = resolve_model_dir(recipe.init_from)
    else:
        return StageInputs(None, _find_tokenizer(stage, folder))
    if not (model_folder / TOKENIZER_CONFIG_FILE).is_file():
        raise UserError(
            f"init_from: {model_folder} has no tokenizer: copy the one that the model was trained "
            "with into it."
        )
    return StageInputs(model_folder, model_folder)


def previous_recipes(stage: StageFile, key: str) -> list[Path]:
    """Return the numbered recipes before a stage, in order; at least one.

    Raises:
        UserError: when there is none; ``key`` is the setting that asked.
    """
    files = [path.resolve() for path in recipe_files(stage.path.parent)]
    path = stage.path.resolve()
    if path not in files:
        raise UserError(
            f"{stage.path}: {key} is 'previous', but only numbered recipes (like 20_joint_lm.yaml) "
            f"have a previous one. Set {key} to a folder, or rename the recipe."
        )
    before = files[: files.index(path)]
    if not before:
        raise UserError(
            f"{stage.path}: {key} is 'previous', but this is the first recipe of its folder. Set "
            f"{key} to a folder" + (" or to null." if key == "init_from" else ".")
        )
    return before


def changes(stage: StageFile, folder: Path) -> list[str]:
    """Return one line per difference between a recipe and that of the run in ``folder``.

    Only what decides the result counts. Settings that the stored recipe lacks, since it was
    written by an older rxlm, have their default.
    """
    stored = read_recipe(folder / CONFIG_FILE).recipe
    differences = diff_mappings(result_values(stored), result_values(stage.recipe))
    recorded = _read_inputs(folder).get("init_from")
    if recorded and stage.recipe.init_from == PREVIOUS:
        config = folder.parent / recorded["run"] / CONFIG_FILE
        if config.is_file() and fingerprint(load_mapping(config)) != recorded["recipe"]:
            differences.append(f"init_from: {recorded['run']} was trained again since")
    return differences


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder needs no more training."""
    status = read_status(folder)
    return status is not None and status.status in FINISHED


def write_inputs(stage: StageFile, folder: Path, tokenizer_fingerprint: str) -> None:
    """Record in ``inputs.json`` what a run begins with."""
    recipe = stage.recipe
    origin: dict[str, object] | None = None
    if recipe.init_from == PREVIOUS:
        name = previous_recipes(stage, "init_from")[-1].stem
        before = folder.parent / name
        checkpoint = resolve_model_dir(before)
        logger.info("%s: weights of %s", stage.name, checkpoint)
        origin = {
            "run": name,
            "checkpoint": checkpoint.name,
            "recipe": fingerprint(load_mapping(before / CONFIG_FILE)),
        }
    content = {"init_from": origin, "tokenizer": tokenizer_fingerprint}
    write_atomically(folder / INPUTS_FILE, json.dumps(content, indent=2) + "\n")


def _read_inputs(folder: Path) -> dict[str, dict[str, str] | None]:
    path = folder / INPUTS_FILE
    if not path.is_file():
        return {}
    content: dict[str, dict[str, str] | None] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _find_tokenizer(stage: StageFile, folder: Path) -> Path:
    """Return the folder that ``tokenizer_from`` means."""
    given = stage.recipe.tokenizer_from
    if given.endswith((".yaml", ".yml")):
        return _tokenizer_of_recipe(stage, folder)
    if given != PREVIOUS:
        for candidate in (Path(given), *_model_folders(Path(given))):
            if (candidate / TOKENIZER_CONFIG_FILE).is_file():
                return candidate
        raise UserError(f"tokenizer_from: {given} holds no tokenizer ({TOKENIZER_CONFIG_FILE}).")
    before = previous_recipes(stage, "tokenizer_from")
    for path in reversed(before):
        run = folder.parent / path.stem
        for candidate in (run, *_model_folders(run)):
            if is_finished(run) and (candidate / TOKENIZER_CONFIG_FILE).is_file():
                return candidate
    return _finished(before[-1], folder, stage, "tokenizer_from")


def _tokenizer_of_recipe(stage: StageFile, folder: Path) -> Path:
    """Return the run folder of the recipe beside this one that ``tokenizer_from`` names."""
    given = stage.recipe.tokenizer_from
    path = stage.path.parent / given
    run = folder.parent / path.stem
    for candidate in (run, *_model_folders(run)):
        if is_finished(run) and (candidate / TOKENIZER_CONFIG_FILE).is_file():
            return candidate
    if not path.is_file():
        raise UserError(f"{stage.path}: tokenizer_from: {given} is no recipe (looked for {path}).")
    raise UserError(
        f"{stage.path}: tokenizer_from is the recipe {given}, but {run} holds no finished run. "
        f"Train it first: rxlm train {path} --out {run}"
    )


def _model_folders(run: Path) -> list[Path]:
    latest = find_latest(run) if run.is_dir() else None
    return [] if latest is None else [latest]


def _finished(before: Path, folder: Path, stage: StageFile, key: str) -> Path:
    """Return the run folder of an earlier recipe; raise ``UserError`` unless it is finished."""
    run = folder.parent / before.stem
    if is_finished(run):
        return run
    shown = stage.path.parent / before.name
    raise UserError(
        f"{stage.path}: {key} is 'previous', but {run} holds no finished run. Train it first: "
        f"rxlm train {shown} --out {run} (or all stages: rxlm pipeline run {stage.path.parent} "
        f"--out {folder.parent}), or set {key} to a folder."
    )
