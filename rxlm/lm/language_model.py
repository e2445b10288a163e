"""A language model that reads and writes text: network, tokenizer and model folder.

    model = LanguageModel.from_pretrained("runs/lm/tiny")
    print(model.complete("Hello", max_new_tokens=20, temperature=0.8, top_p=0.95))

A document is ``[BOS] text [EOS]``. Not here: the network (``model``), training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.lm.generation import TokenStream
from rxlm.lm.model import LMNetwork
from rxlm.ops.sampling import SamplingSettings
from rxlm.storage.hub import local_folder, push_folder
from rxlm.storage.model_card import front_matter
from rxlm.storage.model_folder import CONFIG_FILE, WEIGHTS_FILE, read_config_file
from rxlm.storage.weights import (
    copy_weights,
    count_parameters,
    load_tokenizer,
    save_model_folder,
    take_weights,
)
from rxlm.tokenization import Tokenizer
from rxlm.version import __version__

ARCHITECTURE = "LanguageModel"
"""What ``config.json`` calls it."""

ModelType = TypeVar("ModelType", bound="LanguageModel")


class LanguageModel(LMNetwork):
    """The network with its tokenizer."""

    def __init__(
        self, config: LMConfig | dict[str, Any], tokenizer: Tokenizer | None = None
    ) -> None:
        """Build a model with fresh weights.

        Raises:
            UserError: if the configuration is invalid or is not of the tokenizer's vocabulary.
        """
        super().__init__(config)
        self.tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Attach a tokenizer.

        Raises:
            UserError: if its vocabulary is not that of the model.
        """
        if tokenizer.vocab_size != self.config.vocab_size:
            raise UserError(
                f"the tokenizer has vocab_size={tokenizer.vocab_size} but the model has "
                f"vocab_size={self.config.vocab_size}: use the tokenizer that the model was "
                f"trained with, or build the model with vocab_size={tokenizer.vocab_size}."
            )
        self.tokenizer = tokenizer

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            UserError: if there is none.
        """
        if self.tokenizer is None:
            raise UserError("this language model has no tokenizer: call set_tokenizer first.")
        return self.tokenizer

    def complete(
        self,
        text: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
        **sampling: Any,
    ) -> str | list[str]:
        """Return how the text (or each of several) goes on, without the text itself.

        Args:
            text: the beginning of a document; may be empty.
            max_new_tokens: where a continuation is cut, if [EOS] does not end it before.
            seed: of the first text's draws; the next text's is one more.
            sampling: fields of :class:`~rxlm.ops.sampling.SamplingSettings`.

        Raises:
            UserError: for settings that do not exist, or a model without tokenizer.
        """
        tokenizer = self.require_tokenizer()
        texts = [text] if isinstance(text, str) else list(text)
        stream = TokenStream(
            self,
            [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)],
            SamplingSettings.parse(sampling, "sampling"),
            max_new_tokens=max_new_tokens,
            eos_id=tokenizer.eos_id,
            seeds=range(seed, seed + len(texts)),
        )
        for _ in stream:
            pass
        written = [tokenizer.decode(ids) for ids in stream.continuations]
        return written[0] if isinstance(text, str) else written

    def save_pretrained(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write a model folder; see :func:`rxlm.storage.weights.save_model_folder`."""
        save_model_folder(
            self,
            directory,
            config={
                "architecture": ARCHITECTURE,
                "rxlm_version": __version__,
                **self.config.model_dump(mode="json"),
            },
            card=model_card(self),
            tokenizer=self.tokenizer,
            overwrite=overwrite,
        )

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        path: str | Path,
        *,
        strict: bool = True,
        device: torch.device | str = "cpu",
    ) -> ModelType:
        """Read what ``path`` means: a model folder, a checkpoint, a run, or ``hf://owner/name``.

        The model comes in evaluation mode, its weights in their saved dtype; the global random
        generators are not touched.

        Raises:
            UserError: if there is no language model, or it is damaged.
        """
        folder = local_folder(path)
        config, tokenizer = read_lm_config(folder), load_tokenizer(folder)
        with torch.random.fork_rng(devices=[]):
            try:
                model = cls(config, tokenizer)
            except UserError as error:
                raise UserError(f"{folder}: {error}") from error
        take_weights(model, folder, strict=strict)
        return model.to(device).eval()

    def load_weights(self, directory: str | Path) -> None:
        """Copy the weights in ``directory`` into this model, in place.

        Raises:
            UserError: if the file is missing or damaged, or does not fit. Nothing is copied then.
        """
        copy_weights(self, Path(directory, WEIGHTS_FILE))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model folder; see :func:`rxlm.storage.hub.push_folder`."""
        return push_folder(self.save_pretrained, repo_id, **options)


def is_language_model(directory: str | Path) -> bool:
    """Return whether a model folder holds a language model of this package.

    Raises:
        UserError: if it holds no readable configuration.
    """
    return read_config_file(directory).get("architecture") == ARCHITECTURE


def read_lm_config(directory: str | Path) -> LMConfig:
    """Return the configuration of the language model in ``directory``.

    Raises:
        UserError: if it is no language model, or its configuration is invalid.
    """
    values = read_config_file(directory)
    path = Path(directory, CONFIG_FILE)
    architecture = values.pop("architecture", None)
    values.pop("rxlm_version", None)
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path} describes {architecture or 'a model of another library'}, not a language "
            "model without a memory: load a Reactive Transformer with rxlm.load."
        )
    return LMConfig.parse(values, str(path))


def model_card(model: LanguageModel) -> str:
    """Return the model card: what the model is, its size, how to use it."""
    config = model.config
    layers = ", ".join(dict.fromkeys(config.layers))
    rows = [f"| {part} | {count:,} |" for part, count in count_parameters(model).items()]
    return "\n".join(
        [
            front_matter(name=ARCHITECTURE, tags=("language-model", "linear-attention"))
            + f"# {ARCHITECTURE}",
            "",
            f"A decoder-only language model: {config.depth} layers ({layers}), width {config.dim}, "
            f"vocabulary {config.vocab_size}, positions {config.positions}.",
            "",
            "| part | parameters |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "from rxlm.lm import LanguageModel",
            "",
            'model = LanguageModel.from_pretrained("path/to/this/folder")',
            'print(model.complete("Hello", max_new_tokens=50, temperature=0.8))',
            "```",
            "",
        ]
    )
