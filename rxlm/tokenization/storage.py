"""A tokenizer's directory: what is written, what is checked when read, what is never replaced.

    tokenizer.json | tokenizer.model   the vocabulary (tokenizers / sentencepiece)
    tokenizer_config.json              definition, format version, fingerprint, special tokens
    special_tokens_map.json            special tokens, for transformers
    chat_template.jinja                the form of an interaction, for transformers and servers

The directory may hold other files (a model folder does); they are left alone. Not here: what the
vocabulary file means (the backends check that).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from rxlm.errors import UserError
from rxlm.tokenization.backend import TokenizerDefinition, TokenizerKind
from rxlm.tokenization.chat_format import chat_template
from rxlm.tokenization.interaction import PLAIN_TEMPLATE
from rxlm.tokenization.special import SpecialTokens

FORMAT_VERSION = 1
VOCABULARY_FILE: dict[TokenizerKind, str] = {
    "byte-bpe": "tokenizer.json",
    "sentencepiece-unigram": "tokenizer.model",
    "sentencepiece-bpe": "tokenizer.model",
}
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
# The configuration is written last: a directory without it is not a tokenizer yet.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", MAP_FILE, TEMPLATE_FILE, CONFIG_FILE)
SECTION = "rxlm"
"""Key of our own part of ``tokenizer_config.json``."""


class StoredTokenizer(NamedTuple):
    """A tokenizer as files know it."""

    definition: TokenizerDefinition
    vocabulary: bytes
    fingerprint: str


def write_tokenizer(stored: StoredTokenizer, directory: Path, overwrite: bool = False) -> None:
    """Write ``stored`` into ``directory``; refuse to replace another one unless told to.

    Raises:
        UserError: when another tokenizer (or part of one) is there and ``overwrite`` is false.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; a tokenizer is saved into a directory.")
    files = _files(stored)
    if not overwrite:
        _refuse_replacement(stored, directory, files)
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if name in files:
            _write(directory / name, files[name])
        else:  # the other kind's vocabulary, left from a tokenizer that is being replaced
            (directory / name).unlink(missing_ok=True)


def read_tokenizer(directory: Path) -> StoredTokenizer:
    """Read the tokenizer's files in ``directory``.

    Raises:
        UserError: when files are missing, of an unknown format or not made by rxlm.
    """
    _check_directory(directory)
    path = directory / CONFIG_FILE
    definition, fingerprint = _read_definition(path)
    vocabulary = vocabulary_path(directory, definition)
    if not vocabulary.is_file():
        raise UserError(
            f"{vocabulary} is missing, but {path} says kind '{definition.kind}' "
            f"(found: {_listing(directory)})."
        )
    return StoredTokenizer(definition, vocabulary.read_bytes(), fingerprint)


def vocabulary_path(directory: Path, definition: TokenizerDefinition) -> Path:
    """Return where the vocabulary of a tokenizer with ``definition`` is kept."""
    return directory / VOCABULARY_FILE[definition.kind]


def special_token_names(special: SpecialTokens) -> dict[str, Any]:
    """Return the special tokens under the names that ``transformers`` knows."""
    roles = ("pad", "unk", "bos", "eos", "mask")
    known: dict[str, Any] = {f"{role}_token": getattr(special, role) for role in roles}
    known["additional_special_tokens"] = list(special.spellings()[len(roles) :])
    return known


def _files(stored: StoredTokenizer) -> dict[str, bytes]:
    """Return the content of every file by name."""
    definition = stored.definition
    names = special_token_names(definition.special)
    config: dict[str, Any] = {
        **names,
        "clean_up_tokenization_spaces": False,
        SECTION: {
            "format": FORMAT_VERSION,
            "fingerprint": stored.fingerprint,
            "definition": _definition_values(definition),
        },
    }
    if definition.kind == "byte-bpe":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        VOCABULARY_FILE[definition.kind]: stored.vocabulary,
        MAP_FILE: _json_bytes(names),
        TEMPLATE_FILE: chat_template(definition.special, definition.template).encode("utf-8"),
        CONFIG_FILE: _json_bytes(config),
    }


def _definition_values(definition: TokenizerDefinition) -> dict[str, Any]:
    """Return the definition; without the template while that is what older files meant."""
    is_plain = definition.template == PLAIN_TEMPLATE
    return definition.model_dump(mode="json", exclude={"template"} if is_plain else None)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _write(path: Path, content: bytes) -> None:
    """Replace ``path`` at once, so that a reader or a crash never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_replacement(stored: StoredTokenizer, directory: Path, files: dict[str, bytes]) -> None:
    """Raise ``UserError`` when ``directory`` holds a tokenizer other than ``stored``.

    Files may differ in form and still be the same tokenizer (an older library wrote them): then
    the fingerprints agree. Parts of this very tokenizer are what a crash while saving leaves.
    """
    present = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    different = [name for name in present if (directory / name).read_bytes() != files.get(name)]
    if not different:
        return
    try:
        if read_tokenizer(directory).fingerprint == stored.fingerprint:
            return
    except UserError:
        pass  # not readable as a tokenizer: still somebody's files
    raise UserError(
        f"{directory} already holds another tokenizer ({', '.join(different)}); save into another "
        "directory, or pass overwrite=True to replace it."
    )


def _check_directory(directory: Path) -> None:
    """Raise ``UserError`` unless ``directory`` has a tokenizer's configuration file."""
    if not directory.exists():
        raise UserError(f"{directory} does not exist; give the directory of a saved tokenizer.")
    if not directory.is_dir():
        raise UserError(f"{directory} is a file; give the directory of a saved tokenizer.")
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(
            f"{directory} holds no tokenizer: {CONFIG_FILE} is missing "
            f"(found: {_listing(directory)})."
        )


def _listing(directory: Path, limit: int = 8) -> str:
    """Return the first names in ``directory`` for an error message."""
    names = sorted(item.name for item in directory.iterdir())
    more = f", ... {len(names)} entries" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"


def _read_definition(path: Path) -> tuple[TokenizerDefinition, str]:
    """Return the definition and the fingerprint that ``tokenizer_config.json`` states."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not valid JSON ({error}); restore the file.") from None
    section = config.get(SECTION) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise UserError(
            f"{path} has no '{SECTION}' section: this tokenizer was not made by rxlm "
            "(make one with: rxlm tokenizer train)."
        )
    if section.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {section.get('format')!r} is unknown, expected "
            f"{FORMAT_VERSION}; it was probably saved by a newer rxlm."
        )
    definition = TokenizerDefinition.parse(section.get("definition"), f"{path}: definition")
    return definition, str(section.get("fingerprint"))
