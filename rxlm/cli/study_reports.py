"""``rxlm study report / compare / list / check / doctor``: verbs that look and do not measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxlm.cli import console
from rxlm.cli.study_options import AsJson, Plugin
from rxlm.errors import RunError, UserError

if TYPE_CHECKING:
    from rxlm.evaluation.tables import Table

StudyFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study.")]


def report(
    folder: StudyFolder,
    section: Annotated[
        str | None, typer.Option(help="Print one section only: claims, ppl, tasks, ...")
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the page and its figures to DIR."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report anew from the rows of a study, and print it.

    Example: rxlm study report runs/study/cpu --section claims
    """
    from rxlm.study.mechanisms import load_plugins
    from rxlm.study.report import SECTIONS, StudyReport

    if section is not None and section not in SECTIONS:
        raise UserError(f"--section {section}: use one of {', '.join(SECTIONS)}.")
    found = StudyReport(folder)
    load_plugins(found.settings.plugins)
    pages = found.write()
    if publish is not None:
        pages.append(found.publish(publish, f"study-{found.settings.preset}"))
    tables = found.section_tables()
    shown = (section,) if section else tuple(SECTIONS)
    if as_json:
        console.print_json(
            {
                name: [table._asdict() | {"rows": [list(row) for row in table.rows]}
                       for table in tables[name]]
                for name in shown if name in tables
            }
        )  # fmt: skip
        return
    print_tables(tables, shown)
    console.results().out(f"written: {', '.join(map(str, pages))}", highlight=False)


def compare(
    a: StudyFolder,
    b: StudyFolder,
    as_json: AsJson = False,
) -> None:
    """Compare two studies: results to the last digit, differences with intervals, times.

    Example: rxlm study compare runs/study/a runs/study/b
    """
    from rxlm.evaluation.tables import rich_table
    from rxlm.study.comparing import compare_studies, comparison_tables

    found = compare_studies(a, b)
    if as_json:
        console.print_json(found)
        return
    for table in comparison_tables(found):
        console.results().print(rich_table(table))
    console.results().out(found["verdict"], highlight=False)


def list_mechanisms(plugin: Plugin = None, as_json: AsJson = False) -> None:
    """Show mechanisms, tasks and presets."""
    from rxlm.data.synthetic_tasks import TASKS
    from rxlm.evaluation.tables import Table, rich_table
    from rxlm.nn.mixers import MIXERS
    from rxlm.study.mechanisms import load_plugins, title
    from rxlm.study.settings import PRESETS

    load_plugins(tuple(plugin or ()))
    if as_json:
        console.print_json(
            {
                "mechanisms": {name: mixer.summary for name, mixer in MIXERS.items()},
                "tasks": {name: kind.summary for name, kind in TASKS.items()},
                "presets": list(PRESETS),
            }
        )
        return
    mechanisms = [(name, title(name), mixer.cost, mixer.summary) for name, mixer in MIXERS.items()]
    tasks = [(name, ", ".join(map(str, kind.sizes)), kind.summary) for name, kind in TASKS.items()]
    presets = [(name, ", ".join(map(str, values["attention"]))) for name, values in PRESETS.items()]
    for table in (
        Table("Mechanisms", ("--attn", "", "time", ""), mechanisms, prose=True),
        Table("Tasks", ("task", "sizes", ""), tasks, prose=True),
        Table("Presets", ("--preset", "mechanisms"), presets, prose=True),
    ):
        console.results().print(rich_table(table))


def check(folder: StudyFolder, as_json: AsJson = False) -> None:
    """List every file that a study promises, and fail if one is missing, empty or broken."""
    from rxlm.evaluation.tables import rich_table
    from rxlm.study.checking import check_study, checked_table, require_whole

    found = check_study(folder)
    if as_json:
        console.print_json([item._asdict() for item in found])
    else:
        console.results().print(rich_table(checked_table(found)))
    wrong = [item for item in found if item.problem]
    if wrong:
        try:
            require_whole(found, folder)
        except UserError as error:
            raise RunError(str(error)) from error


def doctor(as_json: AsJson = False) -> None:
    """Say what a study can measure here, and who computes each mechanism."""
    from rxlm.evaluation.tables import Table, rich_table

    found = examine()
    if as_json:
        console.print_json(found)
        return
    rows = [
        (name, row["backend"], row["backend_version"], row["backend_reason"])
        for name, row in found["mechanisms"].items()
    ]
    console.results().print(
        rich_table(Table("Backends", ("mechanism", "computed by", "version", "why"), rows,
                         prose=True))
    )  # fmt: skip
    facts = [(name, str(value)) for name, value in found["machine"].items()]
    console.results().print(rich_table(Table("Here", ("", ""), facts, prose=True)))


def examine() -> dict[str, Any]:
    """Return what ``rxlm study doctor`` knows, as JSON-ready data."""
    import importlib.util
    import os

    import torch

    from rxlm.evaluation.timing import load_average, machine_name
    from rxlm.nn.mixers import MIXERS, MixerSettings, build_mixer
    from rxlm.ops.linear_attention import why_fla_cannot_run
    from rxlm.study.mechanisms import backend_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = MixerSettings(dim=64, num_heads=2)
    mechanisms = {}
    for name in MIXERS:
        with torch.random.fork_rng(devices=[]):
            mixer = build_mixer(name, settings)
        backend = backend_of(mixer, "auto", device, dtype, needs_gradient=True)
        mechanisms[name] = backend._asdict()
    return {
        "machine": {
            "device": machine_name(device.type),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load average": round(load_average(), 2),
            "resident memory can be measured": os.path.exists("/proc/self/clear_refs"),
            "fla": why_fla_cannot_run() or "can run",
            "flash-attn": importlib.util.find_spec("flash_attn") is not None,
            "lm-eval": importlib.util.find_spec("lm_eval") is not None,
            "RXLM_DATA": os.environ.get("RXLM_DATA") or "not set",
        },
        "mechanisms": mechanisms,
    }


def print_tables(tables: Mapping[str, Sequence[Table]], sections: Sequence[str]) -> None:
    """Print the tables of some sections."""
    from rxlm.evaluation.tables import rich_table

    for section in dict.fromkeys(sections):
        for table in tables.get(section, ()):
            console.results().print(rich_table(table))
