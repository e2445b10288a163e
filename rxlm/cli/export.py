"""``rxlm export MODEL_DIR OUT --int8``: a model in another form, and what the form costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console
from rxlm.cli.evaluate import ModelDir, Threads, work_progress
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.evaluation.int8_loss import Int8Loss, Int8LossSettings


def register(app: typer.Typer) -> None:
    """Add ``export`` to the command line."""
    app.command("export")(export)


def export(
    model_dir: ModelDir,
    out: Annotated[Path, typer.Argument(help="Folder of the new model.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="int8 weights, for inference on a CPU.")
    ] = False,
    check: Annotated[
        bool, typer.Option(help="Measure what is lost, on the built-in test dialogues.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model that OUT holds.")
    ] = False,
    threads: Threads = 1,
) -> None:
    """Write a model with int8 weights into a folder that chat, serve and eval take as it is.

    Example: rxlm export runs/nano models/nano-int8 --int8
    """
    if not int8:
        raise UserError("nothing to do: say which form, --int8.")
    from rxlm.evaluation.int8_loss import int8_table, measure_int8_loss
    from rxlm.evaluation.tables import markdown_table, rich_table
    from rxlm.rxt.int8 import quantize_int8, quantized_share
    from rxlm.rxt.model_card import write_model_card
    from rxlm.rxt.models import RxTAlpha
    from rxlm.storage.hub import local_folder
    from rxlm.storage.model_folder import CONFIG_FILE, WEIGHTS_FILE
    from rxlm.training.device import cpu_threads

    folder = local_folder(model_dir)
    if out.exists() and out.samefile(folder):
        raise UserError(f"{out} is the model itself: give another folder for the int8 model.")
    if (out / CONFIG_FILE).exists() and not overwrite:
        raise UserError(f"{out} already holds a model: give another folder, or pass --overwrite.")
    loss: Int8Loss | None = None
    with cpu_threads(threads):
        model = RxTAlpha.from_pretrained(folder)
        made = quantize_int8(model)
        if check:
            with work_progress("int8 beside float32") as shown:
                loss = measure_int8_loss(model, made, _settings(folder), shown)
    made.save_pretrained(out, overwrite=overwrite)
    before, after = ((place / WEIGHTS_FILE).stat().st_size for place in (folder, out))
    size = (
        f"{before:,} bytes of weights became {after:,} ({after / before:.2f} x); "
        f"{quantized_share(made):.0%} of the parameters are int8."
    )
    text = "What was lost has not been measured (`--no-check`)."
    if loss is not None:
        table = int8_table(loss, before, after)
        text = markdown_table(table)
        console.results().print(rich_table(table))
    write_model_card(made, out, sections={"Quantisation": f"{size}\n\n{text}"})
    console.results().out(f"{out}: {size}", highlight=False)


def _settings(folder: Path) -> Int8LossSettings:
    """Return the default check, on the dialogues that the model's recipe names."""
    from rxlm.evaluation.int8_loss import Int8LossSettings
    from rxlm.training.final_evaluation import recipe_of_model

    recipe = recipe_of_model(folder)
    return (
        Int8LossSettings() if recipe is None else Int8LossSettings(generator=recipe.data.generator)
    )
