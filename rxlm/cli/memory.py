"""``rxlm memory``: what changed in a memory, and what an answer read of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rxlm.cli import console
from rxlm.cli.evaluate import Device, ModelDir, Threads, check_writable, load_model
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.evaluation.memory_trace import TurnTrace
    from rxlm.rxt.models import RxTAlpha


def register(app: typer.Typer) -> None:
    """Add ``memory`` to the command line."""
    family = typer.Typer(help="Look into a memory.", no_args_is_help=True)

    # A second command will come here some day; without this, typer drops the name of the first.
    @family.callback()
    def nothing() -> None:
        pass

    family.command("show")(show)
    app.add_typer(family, name="memory")


def show(
    model_dir: ModelDir,
    session: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Show the last turn of a saved session."),
    ] = None,
    say: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Say this and show the turn; may be given several times. With --session, the "
            "conversation goes on from there (the saved session stays as it is).",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Show a conversation of this file, or of 'builtin'."),
    ] = None,
    number: Annotated[
        int, typer.Option(min=0, metavar="N", help="Which conversation of --data, from 0.")
    ] = 0,
    turns: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many turns of --data, the first ones.")
    ] = 8,
    every_turn: Annotated[
        bool, typer.Option("--every-turn", help="Show all turns, not only the last one.")
    ] = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a picture.")] = None,
    threads: Threads = 1,
    device: Device = "cpu",
) -> None:
    """Show what a turn changed in the memory, and which slots each token of the answer read.

    Example: rxlm memory show runs/nano --say "My name is Ann." --say "What is my name?"
    """
    from rxlm.evaluation.memory_view import trace_png, turn_view
    from rxlm.storage.files import write_bytes
    from rxlm.training.device import cpu_threads

    if data is not None and (session is not None or say):
        raise UserError("--data with --session or --say: choose one, a conversation or your own.")
    if data is None and session is None and not say:
        raise UserError("nothing to show: give --say TEXT, --session DIR or --data FILE.")
    check_writable(png)
    with cpu_threads(threads):
        model = load_model(model_dir, device)
        if data is not None:
            traces = _of_data(model, data, number, turns)
        else:
            traces = _of_session(model, session, say or [])
    shown = list(enumerate(traces, start=1))
    for place, trace in shown if every_turn else shown[-1:]:
        console.results().print(turn_view(trace, place))
    if png is not None:
        write_bytes(png, trace_png(traces))


def _of_data(model: RxTAlpha, data: str, number: int, turns: int) -> list[TurnTrace]:
    from rxlm.data.data_config import BUILTIN
    from rxlm.data.generator import DialogueGenerator
    from rxlm.data.sources import load_conversations
    from rxlm.evaluation.memory_trace import trace_conversation

    if data == BUILTIN:
        conversation = DialogueGenerator().conversation(number, turns, "test")
    else:
        found = load_conversations(data)
        if number >= len(found):
            raise UserError(f"--number {number}: {data} holds {len(found)} conversations, from 0.")
        conversation = found[number].window(0, turns)
    return trace_conversation(model, conversation.interactions, system=conversation.system)


def _of_session(model: RxTAlpha, directory: Path | None, say: list[str]) -> list[TurnTrace]:
    from rxlm.evaluation.memory_trace import trace_turn
    from rxlm.ops.sampling import SamplingSettings
    from rxlm.rxt.session import Session

    greedy = SamplingSettings(temperature=0.0)
    held = model.session(settings=greedy) if directory is None else Session.load(directory, model)
    traces = []
    if not say:
        after, before = held.state, held.fork()
        try:
            (turn,) = before.undo()
        except UserError as error:
            raise UserError(
                f"{directory}: the memory before its last turn is gone: {error}"
            ) from None
        return [trace_turn(model, before.state, after, turn)]
    for text in say:
        before_turn = held.state
        held.ask(text)
        traces.append(trace_turn(model, before_turn, held.state, held.turns[-1]))
    return traces
