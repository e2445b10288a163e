"""A saved tokenizer: loads the same, reads elsewhere, is checked, and is never replaced unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from rxlm.errors import UserError
from rxlm.tokenization import SpecialTokens, Tokenizer, encode_interaction, render_interaction

TEXTS = ["Oslo", " Oslo", "[EOS] Ann", "\u2581 漢 😀\0\n  x", ""]


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    """Change the JSON in ``path`` in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def saved(make_tokenizer, tmp_path: Path) -> Path:
    """A directory with a byte-level BPE tokenizer."""
    make_tokenizer("byte-bpe").save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_loaded_tokenizer_is_the_saved_one(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Would catch options, spellings or the ban on special tokens lost on the way."""
    any_tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == any_tokenizer.fingerprint
    assert loaded.definition == any_tokenizer.definition
    assert loaded.encode_batch(TEXTS) == any_tokenizer.encode_batch(TEXTS)
    assert [loaded.decode(loaded.encode(text)) for text in TEXTS] == TEXTS


def test_saving_a_loaded_tokenizer_writes_the_same_files(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Would catch files that drift with every save, so that checkpoints never compare equal."""
    tokenizer.save(tmp_path / "first")
    Tokenizer.load(tmp_path / "first").save(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second
    assert len(first) == 4


def test_the_tokenizers_library_reads_the_file_alike(make_tokenizer, saved: Path) -> None:
    """Would catch a tokenizer.json that gives other tools other ids or texts."""
    ours, theirs = (
        make_tokenizer("byte-bpe"),
        tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json")),
    )
    turn = encode_interaction(ours, " Who am I?", "漢字 Ann", internal="be brief")
    rendered = render_interaction(" Who am I?", "漢字 Ann", internal="be brief")
    assert theirs.encode(rendered).ids == turn.ids
    for text in ("Oslo", " Oslo", "\u2581 漢 😀\0\n  x", ""):
        assert theirs.encode(text).ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_the_sentencepiece_library_reads_the_file_alike(make_tokenizer, tmp_path: Path) -> None:
    """Would catch a tokenizer.model that gives other tools other ids for ordinary text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = make_tokenizer("sentencepiece-unigram")
    ours.save(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("My name is Ann", " Oslo  漢", "[EOS] 😀"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.pad_id(), theirs.unk_id(), theirs.bos_id(), theirs.eos_id()) == (0, 1, 2, 3)


def test_transformers_finds_its_special_tokens(saved: Path) -> None:
    """Would catch missing names: transformers would then invent special tokens of its own."""
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["pad_token"]) == ("[BOS]", "[PAD]")
    names = json.loads((saved / "special_tokens_map.json").read_text())
    listed = [names[f"{role}_token"] for role in ("pad", "unk", "bos", "eos", "mask")]
    assert (*listed, *names["additional_special_tokens"]) == SpecialTokens().spellings()
    assert "[Q]" in (saved / "chat_template.jinja").read_text()


def test_another_tokenizer_is_not_replaced_unasked(make_tokenizer, saved: Path) -> None:
    """Would catch a run that silently changes the vocabulary under an existing model."""
    before = (saved / "tokenizer.json").read_bytes()
    other = make_tokenizer("byte-bpe", split_digits=True)
    with pytest.raises(UserError, match=r"already holds another tokenizer .*overwrite=True"):
        other.save(saved)
    assert (saved / "tokenizer.json").read_bytes() == before
    other.save(saved, overwrite=True)
    assert Tokenizer.load(saved).fingerprint == other.fingerprint


def test_saving_the_same_tokenizer_again_is_fine(make_tokenizer, saved: Path) -> None:
    """Would catch a resumed run failing because its tokenizer is already there."""
    tokenizer = make_tokenizer("byte-bpe")
    tokenizer.save(saved)
    edit_json(saved / "tokenizer_config.json", lambda value: value.pop("bos_token"))
    tokenizer.save(saved)  # same fingerprint, other form
    (saved / "tokenizer_config.json").unlink()  # as after a crash while saving
    tokenizer.save(saved)
    assert Tokenizer.load(saved).fingerprint == tokenizer.fingerprint


def test_replacing_the_kind_leaves_no_stale_vocabulary(make_tokenizer, saved: Path) -> None:
    """Would catch two vocabularies in one directory, and foreign files being removed."""
    pytest.importorskip("sentencepiece")
    (saved / "model.safetensors").write_bytes(b"weights")
    make_tokenizer("sentencepiece-bpe").save(saved, overwrite=True)
    names = {path.name for path in saved.iterdir()}
    assert "tokenizer.model" in names and "tokenizer.json" not in names
    assert (saved / "model.safetensors").read_bytes() == b"weights"


def test_a_directory_without_a_tokenizer_is_described(saved: Path, tmp_path: Path) -> None:
    """Would catch 'file not found' without saying what is there instead."""
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        Tokenizer.load(saved / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer_config.json is missing \(found: tokenizer\)"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Tokenizer.load(saved).save(saved / "tokenizer.json")
    (saved / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing, but .* kind 'byte-bpe'"):
        Tokenizer.load(saved)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{ cut", b"\xff\xfe"], ids=["cut", "binary"])
def test_damaged_json_is_named(saved: Path, name: str, content: bytes) -> None:
    """Would catch a traceback that does not say which file is damaged."""
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not valid JSON"):
        Tokenizer.load(saved)


def test_a_damaged_sentencepiece_model_is_named(make_tokenizer, tmp_path: Path) -> None:
    """Would catch the library's parse error escaping as a RuntimeError."""
    pytest.importorskip("sentencepiece")
    make_tokenizer("sentencepiece-bpe").save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"tokenizer.model: sentencepiece cannot read it"):
        Tokenizer.load(tmp_path)


def set_in_section(key: str, value: object) -> Callable[[dict], None]:
    """Return a change of our section of ``tokenizer_config.json``."""
    return lambda config: config["rxlm"].__setitem__(key, value)


def set_definition(**values: object) -> Callable[[dict], None]:
    """Return a change of the definition in ``tokenizer_config.json``."""
    return lambda config: config["rxlm"]["definition"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("rxlm"), "no 'rxlm' section"),
        (set_in_section("format", 99), "format version 99 is unknown"),
        (set_in_section("definition", None), "definition: expected a mapping"),
        (set_in_section("fingerprint", "0" * 64), "do not belong together"),
        (set_definition(kind="wordpiece"), "definition: kind"),
        (set_definition(colour=1), "no field 'colour'"),
        (set_definition(add_prefix_space=False), "its normalizer is not"),
        (set_definition(split_digits=True), "its pre_tokenizer is not"),
        (set_definition(special={"eos": "[END]"}), "its special tokens are"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_does_not_fit_is_refused(
    saved: Path, change: Callable[[dict], None], message: str
) -> None:
    """Would catch a tokenizer loaded with other options than it was trained with."""
    edit_json(saved / "tokenizer_config.json", change)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(saved)


def drop_merge(state: dict) -> None:
    """Remove the last merge, so that ids change but everything stays well formed."""
    state["model"]["merges"].pop()


def swap_special(state: dict) -> None:
    """Give [A] and [Q] each other's ids."""
    state["added_tokens"][5]["content"], state["added_tokens"][6]["content"] = "[A]", "[Q]"
    state["model"]["vocab"].update({"[A]": 5, "[Q]": 6})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_merge, "do not belong together"),
        (swap_special, "its special tokens are"),
        (lambda state: state.update(normalizer={"type": "Lowercase"}), "its normalizer is not"),
        (lambda state: state["model"].update(dropout=0.5), "dropout must be unset"),
        (lambda state: state.update(model={"type": "x"}), "the tokenizers library cannot read it"),
    ],
    ids=["merge", "special", "normalizer", "dropout", "model"],
)
def test_a_changed_vocabulary_is_refused(
    saved: Path, change: Callable[[dict], None], message: str
) -> None:
    """Would catch an edited or mixed-up file giving a trained model wrong ids."""
    edit_json(saved / "tokenizer.json", change)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(saved)


def test_vocabulary_and_configuration_of_two_tokenizers_do_not_mix(
    make_tokenizer, tmp_path: Path
) -> None:
    """Would catch half-copied directories: here the SentencePiece options disagree."""
    pytest.importorskip("sentencepiece")
    make_tokenizer("sentencepiece-bpe").save(tmp_path / "a")
    make_tokenizer("sentencepiece-bpe", add_prefix_space=False).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "tokenizer.model", tmp_path / "a" / "tokenizer.model")
    with pytest.raises(UserError, match="does not add a prefix space"):
        Tokenizer.load(tmp_path / "a")
