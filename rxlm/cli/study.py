"""``rxlm study``: attention mechanisms at equal parameters, from question to report.

The options that all verbs share, and how they become settings: ``study_options``. The verbs that
only look at a study: ``study_reports``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console
from rxlm.cli.study_options import (
    AsJson,
    FitSlope,
    Given,
    common_options,
    folder_of,
    settings_of,
)
from rxlm.cli.study_reports import (
    check,
    compare,
    doctor,
    list_mechanisms,
    print_tables,
    report,
)
from rxlm.errors import RunError

if TYPE_CHECKING:
    from rxlm.study.settings import Stage

# Section of the report that shows what a stage measured.
_SECTIONS = {
    "train": ("efficiency",), "prefill": ("latency",), "decode": ("latency",), "op": ("operator",),
    "memory": ("memory",), "scale": ("scaling",), "profile": ("profile",), "pretrain": ("ppl",),
    "tasks": ("tasks",),
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add ``study`` to the command line."""
    family = typer.Typer(help="Compare attention mechanisms at equal size.", no_args_is_help=True)
    family.command("run")(common_options(run))
    family.command("calibrate")(common_options(calibrate))
    family.command("pretrain")(common_options(pretrain))
    bench = typer.Typer(help="Time one part.", no_args_is_help=True)
    bench.command("train")(common_options(bench_train))
    bench.command("prefill")(common_options(bench_prefill))
    bench.command("decode")(common_options(bench_decode))
    bench.command("op")(common_options(bench_op))
    family.add_typer(bench, name="bench")
    family.command("memory")(common_options(memory))
    family.command("task")(common_options(task))
    family.command("scale")(common_options(scale))
    family.command("profile")(common_options(profile))
    family.command("report")(report)
    family.command("compare")(compare)
    family.command("list")(list_mechanisms)
    family.command("check")(check)
    family.command("doctor")(doctor)
    app.add_typer(family, name="study")


def run(
    given: Given,
    publish: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the page and its figures to DIR."),
    ] = None,
) -> None:
    """Run a whole study, or go on with one: what was measured is not measured again.

    Example: rxlm study run --preset cpu --out runs/study/cpu
    """
    from rxlm.study.report import StudyReport
    from rxlm.study.runner import Study, require_gates

    settings, folder = settings_of(given), folder_of(given)
    study = Study(settings, folder)
    study.run()
    found = StudyReport(folder)
    pages = found.write()
    if publish is not None:
        pages.append(found.publish(publish, f"study-{settings.preset}"))
    print_tables(found.section_tables(), ("gates", "claims"))
    console.results().out(f"written: {', '.join(map(str, pages))}", highlight=False)
    require_gates(study.gates_hold())


def calibrate(given: Given, as_json: AsJson = False) -> None:
    """Print models of equal size, or say why there are none.

    Example: rxlm study calibrate --params 5M --assert-within 1%
    """
    from rxlm.evaluation.tables import rich_table
    from rxlm.study.calibration import calibration_table, costs_of, model_row, plan_model
    from rxlm.study.mechanisms import check_mechanisms
    from rxlm.study.runner import BENCH_VOCABULARY

    settings = settings_of(given)
    check_mechanisms(settings)
    tokens = max(settings.seq_lens)
    plans = [plan_model(settings, name, BENCH_VOCABULARY) for name in settings.attention]
    rows = [model_row(plan, costs_of(settings, plan, tokens), tokens) for plan in plans]
    if as_json:
        console.print_json(rows)
    else:
        console.results().print(rich_table(calibration_table(rows)))


def pretrain(given: Given) -> None:
    """Train a language model of every mechanism on the same text.

    Example: rxlm study pretrain --data wikitext/ --attn softmax,kda --steps 200
    """
    _measure(given, "pretrain")


def bench_train(given: Given, fit_slope: FitSlope = False) -> None:
    """Time training steps and their parts by length."""
    _measure(given, "train", fit_slope=fit_slope)


def bench_prefill(given: Given, fit_slope: FitSlope = False) -> None:
    """Time reading a prompt, up to its first token."""
    _measure(given, "prefill", fit_slope=fit_slope)


def bench_decode(given: Given, fit_slope: FitSlope = False) -> None:
    """Time one more token after a context."""
    _measure(given, "decode", fit_slope=fit_slope)


def bench_op(given: Given, fit_slope: FitSlope = False) -> None:
    """Time the mechanism alone, by length.

    Example: rxlm study bench op --attn softmax,kda --seq-lens 256:4k --fit-slope
    """
    _measure(given, "op", fit_slope=fit_slope)


def memory(given: Given, fit_slope: FitSlope = False) -> None:
    """Measure the memory of the mechanism alone, by length."""
    _measure(given, "memory", fit_slope=fit_slope)


def task(
    name: Annotated[
        str, typer.Argument(help="mqar, copy, selective-copy, palindrome, stack, needle, parity.")
    ],
    given: Given,
    sizes: Annotated[
        str | None, typer.Option("--sizes", "--pairs", metavar="L", help="Such as 4,8,16.")
    ] = None,
) -> None:
    """Train every mechanism on synthetic tasks (names with commas between them).

    Example: rxlm study task copy,ar --seeds 3
    """
    from rxlm.cli.study_options import parse_lengths
    from rxlm.data.synthetic_tasks import ALIASES
    from rxlm.study.settings import TaskTraining

    known = settings_of(given).tasks
    names = [ALIASES.get(part.strip(), part.strip()) for part in name.split(",")]
    chosen = {}
    for item in names:
        training = known.get(item, TaskTraining(steps=300))
        if sizes is not None:
            training = training.model_copy(update={"sizes": parse_lengths(sizes)})
        chosen[item] = training.model_dump()
    _measure(given, "tasks", tasks=chosen)


def scale(given: Given) -> None:
    """Time training steps of models of several sizes.

    Example: rxlm study scale --params 1M,5M
    """
    _measure(given, "scale", **_scale_changes(given))


def profile(given: Given) -> None:
    """Profile a training step: traces, tables, stacks, flame graphs."""
    _measure(given, "profile")


def _scale_changes(given: Given) -> dict[str, Any]:
    """Return what ``--params`` and ``--tolerance`` mean for the scaling curve."""
    changes: dict[str, Any] = {}
    if "params" in given.changes and "scale_params" not in given.changes:
        changes["scale_params"] = (given.changes["params"],)
    if "tolerance" in given.changes:
        changes["scale_tolerance"] = given.changes["tolerance"]
    # The sizes are those of the curve; the study's own models stay as the preset says.
    given.changes.pop("params", None)
    given.changes.pop("tolerance", None)
    return changes


def _measure(given: Given, stage: Stage, *, fit_slope: bool = False, **changes: Any) -> None:
    """Run the gates and one stage, write the report, print its tables."""
    from rxlm.evaluation.tables import rich_table
    from rxlm.study.report import StudyReport
    from rxlm.study.runner import Study, require_gates
    from rxlm.study.tables import slope_tables

    folder = folder_of(given)
    settings = settings_of(given, stages=("gates", stage), **changes)
    study = Study(settings, folder)
    study.run()
    found = StudyReport(folder)
    found.write()
    tables = found.section_tables()
    print_tables(tables, ("gates", *_SECTIONS[stage], "outcomes"))
    if fit_slope and stage != "op":
        for table in slope_tables(found.store, settings):
            console.results().print(rich_table(table))
    console.results().out(f"written: {folder}/report.html", highlight=False)
    if not study.gates_hold():
        require_gates(False)
    bad = [row for row in study.store.rows(outcome="failed") if row["kind"] != "gate"]
    if bad:
        raise RunError(f"{bad[0]['kind']} of {bad[0]['attention']} failed: {bad[0]['reason']}")
