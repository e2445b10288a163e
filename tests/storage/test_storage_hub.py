"""The real client of the Hugging Face Hub against a Hub in this process (see ``conftest``)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import rxlm
import rxlm.storage.hub as hub_module
from rxlm.errors import RunError, UserError
from rxlm.rxt.components import RxTDecoder, RxTEncoder
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.hub import push_model_folder
from rxlm.storage.model_card import write_card

NAME = "ann/nano"


def test_what_is_pushed_can_be_loaded(hub: Any, hub_token: str, model: RxTAlpha) -> None:
    """Catches an upload that misses a file, is public although it should not be, or whose
    address is not returned."""
    address = model.push_to_hub(NAME, private=True, token=hub_token, metrics={"recall": 0.5})
    assert address == f"{hub.url}/{NAME}/commit/{hub.sha(NAME)}"
    assert hub.private[NAME] and hub.messages == ["Upload model"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(
        hub.files[NAME]
    )
    assert hub.heads[0]["library_name"] == "rxlm"
    assert b"value: 0.5" in hub.files[NAME]["README.md"]
    loaded = RxTAlpha.from_pretrained(f"hf://{NAME}", token=hub_token)
    assert loaded.fingerprint() == model.fingerprint()
    again = model.push_to_hub(NAME, token=hub_token, commit_message="The same")
    assert again.startswith(f"{hub.url}/{NAME}/commit/") and hub.messages[1] == "The same"


def test_a_revision_is_asked_for(hub: Any, hub_token: str, model: RxTAlpha) -> None:
    """Catches a revision that is ignored, and one that cannot be named in an address."""
    model.push_to_hub(NAME, token=hub_token)
    commit = hub.sha(NAME)
    del hub.files[NAME]["README.md"]  # Now there is another commit.
    assert rxlm.load(f"hf://{NAME}@v1").fingerprint() == model.fingerprint()
    assert RxTAlpha.from_pretrained(f"hf://{NAME}", revision="main") is not None
    with pytest.raises(UserError, match="no such revision"):
        RxTAlpha.from_pretrained(f"hf://{NAME}", revision=commit)
    with pytest.raises(UserError, match="no such revision"):
        rxlm.load(f"hf://{NAME}@v9")
    with pytest.raises(UserError, match="write one revision"):
        RxTAlpha.from_pretrained(f"hf://{NAME}@v1", revision="main")


def test_a_component_goes_to_the_hub_and_back(hub: Any, hub_token: str, model: RxTAlpha) -> None:
    """Catches components that can be pushed and not loaded, or loaded as another kind."""
    model.decoder.push_to_hub("ann/decoder", token=hub_token)
    loaded = RxTDecoder.from_pretrained("hf://ann/decoder")
    assert loaded.head_weight.equal(model.decoder.head_weight)
    with pytest.raises(UserError, match="holds an RxTDecoder, not an RxTEncoder"):
        RxTEncoder.from_pretrained("hf://ann/decoder")


def test_a_checkpoint_is_pushed_without_what_training_needs(
    hub: Any, hub_token: str, model: RxTAlpha, tmp_path: Path
) -> None:
    """Catches optimizer states on the Hub, and a card with results that is replaced."""
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    model.save_pretrained(checkpoint)
    write_card(checkpoint, "---\nlibrary_name: rxlm\n---\nmeasured")
    (checkpoint / "train").mkdir()
    (checkpoint / "train" / "optimizer.safetensors").write_bytes(b"x")
    (checkpoint / "COMPLETE").write_text('{"step": 1, "score": null}')
    push_model_folder(tmp_path, f"hf://{NAME}", token=hub_token)
    names = set(hub.files[NAME])
    assert not [name for name in names if name.startswith("train") or name == "COMPLETE"]
    assert b"measured" in hub.files[NAME]["README.md"]
    assert rxlm.load(f"hf://{NAME}").fingerprint() == model.fingerprint()


def test_no_token_and_a_wrong_one_say_what_to_do(hub: Any, hub_token: str, model: RxTAlpha) -> None:
    """Catches the client's traceback, and a private model reported as a network failure."""
    with pytest.raises(UserError, match=r"no token to upload to hf://ann/nano.*HF_TOKEN"):
        model.push_to_hub(NAME)
    with pytest.raises(UserError, match="status 401"):
        model.push_to_hub(NAME, token="hf_wrong")
    assert hub.files == {}
    model.push_to_hub(NAME, token=hub_token, private=True)
    for path in (f"hf://{NAME}", "hf://ann/nothing"):
        with pytest.raises(UserError, match=r"no such model, or it is not public.*token"):
            rxlm.load(path)
    with pytest.raises(UserError, match="Expected owner/name"):
        rxlm.load("hf://a b")


def test_no_connection_is_a_failed_run(
    hub: Any, hub_token: str, model: RxTAlpha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback where the machine is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="hf://ann/nano could not be downloaded"):
        rxlm.load(f"hf://{NAME}")
    with pytest.raises(RunError, match="could not be uploaded"):
        model.push_to_hub(NAME, token=hub_token)


def test_a_missing_client_is_named(model: RxTAlpha, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError without the name of the package to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: model.push_to_hub(NAME), lambda: rxlm.load(f"hf://{NAME}")):
        with pytest.raises(UserError, match="pip install huggingface-hub"):
            use()


def test_only_hub_addresses_are_downloaded(
    model: RxTAlpha, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mistyped path that becomes a download, and a revision without effect."""

    def no_download(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("a download was tried")

    client = importlib.import_module("huggingface_hub")
    monkeypatch.setattr(client, "snapshot_download", no_download)
    with pytest.raises(UserError, match="hf://owner/name"):
        rxlm.load("ann/nano")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"revision='v1'.*a folder on this machine"):
        RxTAlpha.from_pretrained(tmp_path / "model", revision="v1")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_right_that_is_missing(hub: Any, hub_token: str, status: int) -> None:
    """Catches a download that asks for a token that may write."""
    hub.refused = status
    with pytest.raises(UserError, match=rf"status {status}\): make one that may read"):
        rxlm.load(f"hf://{NAME}")
    with pytest.raises(UserError, match=rf"status {status}\): make one that may write"):
        hub_module.push_folder(lambda folder: None, NAME, token=hub_token)
