"""``rxlm tokenizer``: train one on texts, or look at what one does to a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rxlm.cli import console
from rxlm.errors import UserError


def register(app: typer.Typer) -> None:
    """Add ``tokenizer`` to the command line."""
    family = typer.Typer(help="Train and look at tokenizers.", no_args_is_help=True)
    family.command("train")(train)
    family.command("show")(show)
    app.add_typer(family, name="tokenizer")


def train(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXTS...",
            help="Files, folders or globs: .txt, .jsonl, .parquet (.gz too), or 'builtin'.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer's files.")],
    kind: Annotated[
        str, typer.Option(help="byte-bpe, sentencepiece-unigram or sentencepiece-bpe.")
    ] = "byte-bpe",
    vocab_size: Annotated[int, typer.Option(help="Largest number of ids.")] = 1024,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a tokenizer that is there.")
    ] = False,
) -> None:
    """Train a tokenizer on texts and conversations.

    Example: rxlm tokenizer train my_dialogues.jsonl --out my_tokenizer --vocab-size 4096
    """
    from rxlm.tokenization import TokenizerTraining, train_tokenizer

    training = TokenizerTraining.parse({"kind": kind, "vocab_size": vocab_size}, "options")
    tokenizer = train_tokenizer((text for item in texts for text in _read(item)), training)
    tokenizer.save(out, overwrite=overwrite)
    console.results().out(f"{out}: {tokenizer.vocab_size} ids", highlight=False)


def show(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a tokenizer, a model, a run, ...")
    ],
    text: Annotated[
        str | None,
        typer.Argument(help="A text to encode."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a tokenizer is, and the tokens of a text.

    Example: rxlm tokenizer show runs/nano "My name is Ann."
    """
    report = describe(find_tokenizer(directory), text)
    if as_json:
        console.print_json(report)
    else:
        _print_report(report)


def find_tokenizer(directory: Path) -> Path:
    """Return the folder of the tokenizer that a path means.

    Raises:
        UserError: when there is none.
    """
    from rxlm.storage.model_folder import resolve_model_dir
    from rxlm.tokenization.storage import CONFIG_FILE

    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give the folder of a tokenizer or a model.")
    for folder in (directory, *sorted(directory.glob("[0-9]*_*"), reverse=True)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return resolve_model_dir(directory)


def describe(folder: Path, text: str | None) -> dict[str, Any]:
    """Return what ``rxlm tokenizer show`` prints, as JSON-ready data."""
    from rxlm.tokenization import Tokenizer

    tokenizer = Tokenizer.load(folder)
    report: dict[str, Any] = {
        "folder": str(folder),
        "kind": tokenizer.definition.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "special_tokens": {
            tokenizer.token_text(token_id): token_id for token_id in sorted(tokenizer.special_ids)
        },
    }
    if text is not None:
        ids = tokenizer.encode(text)
        report["text"] = {
            "text": text,
            "ids": ids,
            "tokens": [tokenizer.token_text(token_id) for token_id in ids],
            "characters_per_token": len(text) / len(ids) if ids else 0.0,
            "decodes_to_itself": tokenizer.decode(ids) == text,
        }
    return report


def _read(item: str) -> Any:
    """Return the texts that one argument stands for."""
    from rxlm.data.data_config import BUILTIN, DataConfig
    from rxlm.data.sources import load_texts
    from rxlm.training.tokenizer_stage import TokenizerStageSettings, tokenizer_texts

    if item == BUILTIN:
        return tokenizer_texts(DataConfig(), TokenizerStageSettings())
    return load_texts(item)


def _print_report(report: dict[str, Any]) -> None:
    out = console.results()
    for name in ("folder", "kind", "vocab_size", "fingerprint"):
        out.out(f"{name:12} {report[name]}", highlight=False)
    special = "  ".join(f"{token}={number}" for token, number in report["special_tokens"].items())
    out.out(f"{'special':12} {special}", highlight=False)
    text = report.get("text")
    if text is None:
        return
    out.out("")
    for token_id, token in zip(text["ids"], text["tokens"], strict=True):
        out.out(f"{token_id:8}  {token!r}", highlight=False)
    same = "decodes to itself" if text["decodes_to_itself"] else "does not decode to itself"
    out.out(
        f"\n{len(text['ids'])} tokens, {text['characters_per_token']:.2f} characters a token, "
        f"{same}",
        highlight=False,
    )
