"""Running the stages of a recipe folder in order: skip what is finished, resume what is not.

Not here: one stage (``stage.py``), what is measured at the end (``final_evaluation.py``), and what
a person sees of it (the command line).
"""

from __future__ import annotations

import difflib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console

from rxlm.errors import UserError
from rxlm.training.processes import check_processes, run_stage_in_processes
from rxlm.training.recipes import PREVIOUS, StageFile, TokenizerRecipe, read_folder
from rxlm.training.run_folder import STATUS_FILE, read_status
from rxlm.training.stage import StageResult, changes, is_finished, run_stage

logger = logging.getLogger(__name__)

_MAX_SHOWN = 12


class PlannedStage(NamedTuple):
    """A stage, where it runs, and whether there is anything to do."""

    stage: StageFile
    folder: Path
    action: Literal["skip", "resume", "run"]


class PipelineResult(NamedTuple):
    """How the stages went."""

    stages: list[StageResult]
    interrupted: int | None
    """The signal that stopped the last of ``stages``; ``None``: all wanted stages are finished."""

    @property
    def last(self) -> StageResult:
        """The last stage that ran or was skipped."""
        return self.stages[-1]


def plan_pipeline(
    recipes: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    stop_after: str | None = None,
    redo: str | None = None,
) -> list[PlannedStage]:
    """Read all recipes of a folder and decide what each needs; nothing is written.

    Args:
        recipes: folder of numbered recipes.
        out: each stage runs in ``out/<recipe name>``.
        overrides: see :func:`~rxlm.training.recipes.read_folder`.
        stop_after: leave out what comes after this stage (a recipe's name, or its stage).
        redo: run this stage and all later ones, whatever is there.

    Raises:
        UserError: for recipes that are not valid, and when a finished stage was trained by another
            recipe.
    """
    root = Path(out)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder for the runs.")
    stages = read_folder(recipes, overrides)
    _check_order(stages)
    first_redone = len(stages) if redo is None else find_stage(stages, redo)
    if stop_after is not None:
        stages = stages[: find_stage(stages, stop_after, last=True) + 1]
    planned = []
    changed: list[str] = []
    for index, stage in enumerate(stages):
        folder = root / stage.name
        if index >= first_redone or read_status(folder) is None:
            planned.append(PlannedStage(stage, folder, "run"))
        elif not is_finished(folder):
            planned.append(PlannedStage(stage, folder, "resume"))
        else:
            planned.append(PlannedStage(stage, folder, "skip"))
            changed += [f"{stage.name}: {line}" for line in changes(stage, folder)]
    if changed:
        first = changed[0].split(":")[0]
        more = [f"... and {len(changed) - _MAX_SHOWN} more"] if len(changed) > _MAX_SHOWN else []
        raise UserError(
            f"{root} holds finished stages of another recipe:\n  "
            + "\n  ".join([*changed[:_MAX_SHOWN], *more])
            + f"\nUse another --out, undo the change, or pass --redo {first} to train that stage "
            "and all that follow again (what they made is deleted)."
        )
    return planned


def run_pipeline(
    planned: Sequence[PlannedStage],
    *,
    redo: str | None = None,
    processes: int = 1,
    console: Console | None = None,
    announce: Callable[[int, int, PlannedStage], None] | None = None,
) -> PipelineResult:
    """Run what :func:`plan_pipeline` planned, in order, until it is done or interrupted.

    Args:
        planned: the stages.
        redo: as in the plan; the run folders of that stage and of all later ones are deleted.
        processes: how many processes of this machine share the training of a stage.
        console: where progress bars go; default standard error.
        announce: told (number from 1, number of stages, stage) before each stage.

    Raises:
        UserError: when something does not fit, and for more processes than CPU cores.
        RunError: when a stage fails. Finished stages stay.
    """
    check_processes(processes)
    if redo is not None:
        stages = [item.stage for item in planned]
        for item in planned[find_stage(stages, redo) :]:
            _delete_run(item.folder)
    results: list[StageResult] = []
    for number, item in enumerate(planned, start=1):
        if announce is not None:
            announce(number, len(planned), item)
        if item.action == "skip":
            results.append(_finished_result(item))
            continue
        if processes > 1 and not isinstance(item.stage.recipe, TokenizerRecipe):
            result = run_stage_in_processes(item.stage, item.folder, processes)
        else:
            result = run_stage(item.stage, item.folder, console)
        results.append(result)
        if result.status == "interrupted":
            return PipelineResult(results, result.signal)
    return PipelineResult(results, None)


def find_stage(stages: Sequence[StageFile], name: str, last: bool = False) -> int:
    """Return the index of the stage that ``name`` (recipe name or stage) means.

    Args:
        stages: of one folder.
        name: such as ``20_joint_lm`` or ``joint_lm``.
        last: of several recipes of that stage, take the last one.

    Raises:
        UserError: when there is none.
    """
    found = [index for index, item in enumerate(stages) if name in (item.name, item.recipe.stage)]
    if not found:
        names = [item.name for item in stages]
        near = difflib.get_close_matches(name, [*names, *(item.recipe.stage for item in stages)], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(names)}."
        raise UserError(f"'{name}' is no stage of these recipes: {hint}")
    return found[-1 if last else 0]


def _check_order(stages: Sequence[StageFile]) -> None:
    """Find out before the first stage runs whether a later one cannot have its inputs."""
    has_tokenizer = has_model = False
    for stage in stages:
        recipe = stage.recipe
        if isinstance(recipe, TokenizerRecipe):
            has_tokenizer, has_model = True, False
            continue
        if recipe.init_from == PREVIOUS and not has_model:
            raise UserError(
                f"{stage.path}: init_from is 'previous', but the recipe before it trains no model. "
                "Set init_from to a model folder, or to null for new weights."
            )
        if recipe.init_from is None:
            if recipe.model is None:
                raise UserError(f"{stage.path}: init_from is null, so 'model' must be described.")
            if recipe.tokenizer_from == PREVIOUS and not has_tokenizer:
                raise UserError(
                    f"{stage.path}: no recipe before it makes a tokenizer. Add one of stage "
                    "'tokenizer', or set tokenizer_from to a folder with a tokenizer."
                )
        has_tokenizer = has_model = True


def _finished_result(item: PlannedStage) -> StageResult:
    status = read_status(item.folder)
    assert status is not None, "only finished runs are skipped"
    return StageResult(
        item.stage.name, item.folder, status.status, status.metrics, status.seconds, skipped=True
    )


def _delete_run(folder: Path) -> None:
    """Delete a run folder; anything else is left alone."""
    if (folder / STATUS_FILE).is_file():
        logger.info("%s: deleted, to be made again", folder)
        shutil.rmtree(folder)
