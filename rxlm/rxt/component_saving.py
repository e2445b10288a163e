"""Single components (decoder, encoder, memory attention) as folders of their own.

    model.safetensors   the component's weights, its token embedding included
    config.json         its configuration, its kind ('architecture'), format version, rxlm version
    README.md           a card

Not here: whole models (:mod:`rxlm.rxt.saving`), and building a model of components
(:mod:`rxlm.rxt.assembly`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.nn.int8_linear import is_int8
from rxlm.rxt.config import FORMAT_VERSION
from rxlm.storage.hub import local_folder, push_folder
from rxlm.storage.model_card import Metrics, front_matter, metrics_table
from rxlm.storage.model_folder import CONFIG_FILE, read_config_file
from rxlm.storage.weights import count_parameters, save_model_folder, take_weights
from rxlm.version import __version__

COMPONENT_KINDS = {
    "RxTDecoder": "decoder",
    "RxTEncoder": "encoder",
    "RxTMemoryAttention": "memory_attention",
}
"""What ``config.json`` calls a component, and its name in a whole model."""

ComponentType = TypeVar("ComponentType", bound="StoredComponent")


class StoredComponent(nn.Module):
    """A component that can be saved and loaded by itself. Its constructor takes its ``config``."""

    KIND: ClassVar[str]
    """A key of :data:`COMPONENT_KINDS`."""
    CONFIG: ClassVar[type[Config]]
    """The class of ``config``."""

    config: Any

    def save_pretrained(
        self, directory: str | Path, overwrite: bool = False, metrics: Metrics | None = None
    ) -> None:
        """Write the component as a folder.

        Args:
            directory: made if missing; other files in it are left alone.
            overwrite: whether a model or component that is there may be replaced.
            metrics: measured numbers, for the card.

        Raises:
            UserError: if a file would be replaced and ``overwrite`` is false, or the component
                is of an int8 model.
            RunError: if the disk refuses.
        """
        if is_int8(self):
            raise UserError(
                "a component of an int8 model is not saved by itself: save the whole model, or "
                "the component of the model that it was made of."
            )
        save_model_folder(
            self,
            directory,
            config={
                "architecture": self.KIND,
                "rxlm_version": __version__,
                "format_version": FORMAT_VERSION,
                **self.config.model_dump(mode="json"),
            },
            card=_card(self, metrics),
            tokenizer=None,
            overwrite=overwrite,
        )

    @classmethod
    def from_pretrained(
        cls: type[ComponentType],
        directory: str | Path,
        strict: bool = True,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> ComponentType:
        """Read a component that :meth:`save_pretrained` wrote, from a folder or ``hf://owner/name``.

        It comes in evaluation mode, its weights in their saved dtype; the global random
        generators are not touched.

        Args:
            directory: the folder, or ``hf://owner/name`` (optionally ``@revision``).
            strict: whether missing and unknown weights are errors.
            device: where the component goes.
            revision: of a component on the Hub.
            token: of the Hub.

        Raises:
            UserError: if there is no component of this kind, or it is damaged.
        """
        folder = local_folder(directory, revision, token)
        config = read_component_config(folder, cls.KIND, cls.CONFIG)
        with torch.random.fork_rng(devices=[]):
            component = cls(config)
        take_weights(component, folder, strict=strict)
        return component.to(device).eval()

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload component",
        metrics: Metrics | None = None,
    ) -> str:
        """Upload the component's folder to the Hugging Face Hub; returns the commit's address.

        Raises:
            UserError: if there is no token, or it may not write there.
            RunError: if the connection fails.
        """
        return push_folder(
            lambda folder: self.save_pretrained(folder, metrics=metrics),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
        )


def read_component_config(directory: str | Path, kind: str, config_class: type[Config]) -> Config:
    """Return the configuration of the component in ``directory``.

    Args:
        directory: a component's folder.
        kind: the kind that it has to be (:data:`COMPONENT_KINDS`).
        config_class: of its configuration.

    Raises:
        UserError: if it is missing, damaged, another kind of component, a whole model, or of
            another format.
    """
    values = read_config_file(directory)
    path = Path(directory, CONFIG_FILE)
    architecture = str(values.pop("architecture", ""))
    values.pop("rxlm_version", None)
    if architecture != kind:
        raise UserError(f"{directory} holds {_described(architecture, values, kind, directory)}")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version={version!r}; this rxlm reads {FORMAT_VERSION}: use the "
            "version of rxlm that wrote it."
        )
    return config_class.parse(values, str(path))


def _described(architecture: str, values: dict[str, Any], kind: str, directory: str | Path) -> str:
    """Say what is there in place of a component, and how to load that."""
    if architecture in COMPONENT_KINDS:
        return f"an {architecture}, not an {kind}: load it with {architecture}.from_pretrained."
    if "decoder" in values and "memory_attention" in values:
        return (
            f"a whole model ({architecture}), not an {kind} alone: take "
            f"rxlm.load('{directory}').{COMPONENT_KINDS[kind]}."
        )
    return (
        f"{architecture or 'a model of another library'}, not an {kind} (kinds of components: "
        f"{', '.join(COMPONENT_KINDS)})."
    )


def _card(component: StoredComponent, metrics: Metrics | None) -> str:
    kind = component.KIND
    head = front_matter(
        name=kind,
        tags=("reactive-transformer", COMPONENT_KINDS[kind].replace("_", "-")),
        pipeline_tag=None,
        metrics=metrics,
    )
    counts = count_parameters(component)
    rows = [f"| {part} | {count:,} |" for part, count in counts.items()]
    lines = [
        f"{head}# {kind}",
        "",
        "One component of a Reactive Transformer (arXiv 2510.03561). It is of use together with "
        "the two others (decoder, encoder, memory attention).",
        "",
        "| part | parameters |",
        "|---|---:|",
        *rows,
        f"| total | {sum(counts.values()):,} |",
        "",
        *([metrics_table(metrics)] if metrics else []),
        "```python",
        f"from {type(component).__module__} import {kind}",
        "",
        f'component = {kind}.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)
