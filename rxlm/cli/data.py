"""``rxlm data``: look at data as the model sees it, count it, and find what cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rxlm.cli import console
from rxlm.errors import UserError

if TYPE_CHECKING:
    from rxlm.data.conversations import Conversation

_ROW_LENGTH = 1024

DataPath = Annotated[
    str,
    typer.Argument(metavar="DATA", help="File, folder or glob: .txt, .jsonl, .parquet (.gz too)."),
]
Kind = Annotated[
    str,
    typer.Option(help="dialogues or text; auto looks at the fields of the first records."),
]
TokenizerFolder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder of a tokenizer, a model or a run."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        "--max-record-bytes", min=1, help="Longest record; default as in recipes (64 MiB)."
    ),
]


def register(app: typer.Typer) -> None:
    """Add ``data`` to the command line."""
    family = typer.Typer(help="Look at data, count it, check it.", no_args_is_help=True)
    family.command("inspect")(inspect)
    family.command("stats")(stats)
    family.command("check")(check)
    app.add_typer(family, name="data")


def inspect(
    data: DataPath,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Records to show.")] = 3,
    tokenizer: TokenizerFolder = None,
    length: Annotated[
        int | None,
        typer.Option(min=3, help="Tokens of a row of text (with a tokenizer); default 1024."),
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Show packed rows of text (with a tokenizer).")
    ] = False,
    kind: Kind = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the first records as the model sees them.

    Dialogues: each turn with its special tokens, in the form of the tokenizer; what is learned
    begins with [A], or with [T] where the model thinks first. A turn with parts that the form has
    not is refused here as in training. Text: rows of tokens. Bad records are shown with their
    problem.

    Example: rxlm data inspect my.train.jsonl --tokenizer runs/nano
    """
    rows = inspected(data, count, tokenizer, length, packing, _kind(kind))
    if as_json:
        console.print_json(rows)
        return
    out = console.results()
    for row in rows:
        out.out(f"--- {row['where']}", highlight=False)
        if "problem" in row:
            out.out(f"bad: {row['problem']}", highlight=False)
        for part in row.get("rows", ()):
            size = f"{len(part['ids'])} tokens: " if "ids" in part else ""
            out.out(f"{size}{part['text']}", highlight=False)


def stats(
    data: DataPath,
    tokenizer: TokenizerFolder = None,
    kind: Kind = "auto",
    as_json: AsJson = False,
) -> None:
    """Count records and turns, and print percentiles of lengths.

    With a tokenizer lengths are in tokens, and it is shown how much of the vocabulary occurs.

    Example: rxlm data stats my.train.jsonl --tokenizer runs/nano
    """
    from rxlm.data.checking import read_checked
    from rxlm.data.counting import count_records

    records = read_checked(data, _kind(kind))
    if tokenizer is None:
        counts = count_records(records)
    else:
        loaded = _load_tokenizer(tokenizer)
        counts = count_records(records, loaded.encode_batch, loaded.vocab_size)
    if as_json:
        console.print_json(counts)
    else:
        _print_counts(counts)


def check(
    data: DataPath,
    kind: Kind = "auto",
    max_record_bytes: MaxBytes = None,
    show: Annotated[int, typer.Option(min=0, help="Problems and notes to print.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Name every record that cannot be used, by file and line, and every file without a usable one;
    exit status 2 if there is one.

    Example: rxlm data check my.train.jsonl
    """
    from rxlm.data.checking import check_files
    from rxlm.data.records import MAX_RECORD_BYTES

    max_bytes = MAX_RECORD_BYTES if max_record_bytes is None else max_record_bytes
    report = check_files(data, _kind(kind), max_bytes=max_bytes)
    if as_json:
        console.print_json(
            {
                "good": report.is_good,
                "files": dict(report.kinds),
                "records": report.num_records,
                "bad_records": len(report.problems),
                "problems": report.problems,
                "unusable_files": report.unusable_files,
                "notes": report.notes,
            }
        )
    else:
        out = console.results()
        found = (
            ("bad", report.problems),
            ("bad file", report.unusable_files),
            ("note", report.notes),
        )
        for title, lines in found:
            for line in lines[:show]:
                out.out(f"{title}: {line}", highlight=False)
            if len(lines) > show:
                out.out(f"{title}: ... and {len(lines) - show} more", highlight=False)
        out.out(
            f"{len(report.kinds)} files, {report.num_records:,} records, "
            f"{len(report.problems):,} bad, {len(report.notes):,} notes",
            highlight=False,
        )
    if not report.is_good:
        raise typer.Exit(2)


def inspected(
    data: str,
    count: int,
    tokenizer: Path | None,
    length: int | None,
    packing: bool,
    kind: Literal["dialogues", "text"] | None,
) -> list[dict[str, Any]]:
    """Return what ``rxlm data inspect`` prints, as JSON values."""
    import itertools

    from rxlm.data.checking import read_checked
    from rxlm.data.conversations import Conversation

    if tokenizer is None and (packing or length is not None):
        name = "--packing" if packing else f"--length {length}"
        raise UserError(f"{name}: rows of tokens need a tokenizer. Give --tokenizer.")
    length = _ROW_LENGTH if length is None else length
    records = list(itertools.islice(read_checked(data, kind), count))
    loaded = None if tokenizer is None else _load_tokenizer(tokenizer)
    shown: list[dict[str, Any]] = []
    if packing:
        dialogue = next((item for item in records if isinstance(item.value, Conversation)), None)
        if dialogue is not None:
            raise UserError(
                f"--packing: {dialogue.where} is a dialogue, and dialogues are not packed. Leave "
                "--packing out, or add --kind text to read them as text."
            )
        shown += [
            {"where": item.where, "problem": item.problem} for item in records if item.problem
        ]
        texts = [item.value for item in records if isinstance(item.value, str)]
        packed = _packed(texts, loaded, length) if texts else []
        return shown + [
            {"where": f"packed row {number}", "rows": row} for number, row in enumerate(packed, 1)
        ]
    for item in records:
        row: dict[str, Any] = {"where": item.where}
        if item.problem is not None:
            row["problem"] = item.problem
        elif isinstance(item.value, Conversation):
            try:
                row["rows"] = _conversation_rows(item.value, loaded)
            except UserError as error:
                row["problem"] = f"{item.where}: {error}"
        elif item.value is not None:
            row["rows"] = _text_rows([item.value], loaded, length)
        shown.append(row)
    return shown


def _conversation_rows(conversation: Conversation, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the system text and the turns as rows.

    Raises:
        UserError: for a turn with parts that the tokenizer's template has not, as in training.
    """
    from rxlm.tokenization.chat_format import render_text
    from rxlm.tokenization.interaction import RICH_TEMPLATE
    from rxlm.tokenization.special import SpecialTokens
    from rxlm.tokenization.template import encode_system, render_parts

    mark = SpecialTokens()
    rows: list[dict[str, Any]] = []
    if conversation.system and tokenizer is None:
        rows.append({"text": f"{mark.bos}{mark.internal}{conversation.system}{mark.eos}"})
    elif conversation.system:
        rows.append(_row(encode_system(tokenizer, conversation.system), tokenizer))
    for number, turn in enumerate(conversation.interactions, start=1):
        if tokenizer is None:
            rows.append({"text": render_text(turn.parts(), RICH_TEMPLATE)})
            continue
        try:
            encoded = render_parts(tokenizer, turn.parts()).turn
        except UserError as error:
            raise UserError(
                f"turn {number} of conversation '{conversation.id}': {error}"
            ) from error
        rows.append({**_row(encoded.ids, tokenizer), "answer_start": encoded.answer_start})
    return rows


def _text_rows(texts: list[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    if tokenizer is None:
        from rxlm.tokenization.special import SpecialTokens

        mark = SpecialTokens()
        return [{"text": f"{mark.bos}{text}{mark.eos}"} for text in texts]
    from rxlm.training.objectives.row_windows import TextRows

    return [_row(ids, tokenizer) for ids in TextRows(texts, tokenizer, length).rows()]


def _packed(texts: list[str], tokenizer: Any, length: int) -> list[list[dict[str, Any]]]:
    from rxlm.training.objectives.packed_rows import PackedRows
    from rxlm.training.objectives.row_windows import TextRows

    rows = PackedRows(TextRows(texts, tokenizer, length))
    return [
        [_row(piece.ids, tokenizer) for piece in rows.sample(position)]
        for position in range(rows.size(1))
    ]


def _row(ids: list[int], tokenizer: Any) -> dict[str, Any]:
    return {"text": tokenizer.decode(ids, skip_special_tokens=False), "ids": ids}


def _load_tokenizer(folder: Path) -> Any:
    from rxlm.cli.tokenizer import find_tokenizer
    from rxlm.tokenization import Tokenizer

    return Tokenizer.load(find_tokenizer(folder))


def _kind(given: str) -> Literal["dialogues", "text"] | None:
    if given == "auto":
        return None
    if given == "dialogues":
        return "dialogues"
    if given == "text":
        return "text"
    raise UserError(f"--kind {given}: expected auto, dialogues or text.")


def _print_counts(counts: dict[str, Any]) -> None:
    from rxlm.data.counting import LENGTHS

    out = console.results()
    for name in ("records", "bad_records", "conversations", "documents", "total", "characters"):
        unit = f" {counts['unit']}" if name == "total" else ""
        out.out(f"{name:14} {counts[name]:,}{unit}", highlight=False)
    names = [name for name in LENGTHS if name in counts]
    if names:
        columns = list(counts[names[0]])
        out.out(" " * 15 + "".join(f"{column:>9}" for column in columns), highlight=False)
    for name in names:
        values = "".join(f"{value:9.4g}" for value in counts[name].values())
        out.out(f"{name:14} {values}", highlight=False)
    vocabulary = counts.get("vocabulary")
    if vocabulary is not None:
        out.out(
            f"{'vocabulary':14} {vocabulary['used']:,} of {vocabulary['size']:,} ids occur "
            f"({100 * vocabulary['coverage']:.1f} %), "
            f"{vocabulary['characters_per_token']:.2f} characters a token",
            highlight=False,
        )
