"""What every stage that trains a Reactive Transformer has in common: the model and its files.

Not here: losses and batches (one file a stage). The model is trained in place; which of its
components train is decided anew by each objective that is built around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rxlm.errors import UserError
from rxlm.rxt.config import NOT_ARCHITECTURE
from rxlm.rxt.reactive import ReactiveModel
from rxlm.rxt.saving import save_model
from rxlm.storage.files import write_tensors
from rxlm.storage.model_folder import WEIGHTS_FILE
from rxlm.storage.weights import copy_weights, distinct_tensors
from rxlm.tokenization import Tokenizer
from rxlm.training.device import move_to_device
from rxlm.training.objective import MemorySaving, Objective

COMPONENTS = ("encoder", "decoder", "memory_attention")
"""The components of the model that a stage can train."""
_WHOSE = "the weights of this run"


class ModelObjective(Objective):
    """A stage around one model, with extra modules that only training needs (an MLM head).

    Args:
        model: trained in place.
        tokenizer: the one that encodes the data; it becomes the model's if that has none.
        trains: the components that learn; the others are frozen and run in evaluation mode. The
            token embedding, which encoder and decoder share, learns if either does.
        extra_modules: by name; they learn, and are saved beside the model as
            ``<name>.safetensors``.

    Raises:
        UserError: if the tokenizer is not the model's, or its vocabulary is not.
    """

    memory_saving = MemorySaving(
        "objective.dialogues",
        "a smaller objective.turns or a shorter seq_len of the model",
        ("layers", "both"),
    )

    def __init__(
        self,
        model: ReactiveModel,
        tokenizer: Tokenizer,
        *,
        trains: Sequence[str] = COMPONENTS,
        extra_modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if model.tokenizer is None:
            model.set_tokenizer(tokenizer)
        elif model.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the data is encoded by {tokenizer!r}, but the model was trained with "
                f"{model.tokenizer!r}: use the model's own tokenizer."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.trains = tuple(trains)
        self.extra_modules = dict(extra_modules or {})
        self.checkpoint_turns = False
        self._trained: nn.Module = model
        if self.extra_modules:
            self._trained = nn.ModuleDict({"model": model, **self.extra_modules})
        # A model goes from stage to stage: what the stage before froze is set here, too.
        model.requires_grad_(False)
        for name in self.trains:
            getattr(model, name).requires_grad_(True)

    def trained_modules(self) -> nn.Module:
        """Return the model, together with the extra modules if there are any."""
        return self._trained

    def set_training_mode(self) -> None:
        """Put everything into training mode but the frozen components (no dropout there)."""
        self._trained.train()
        for name in COMPONENTS:
            getattr(self.model, name).train(name in self.trains)

    def set_gradient_checkpointing(self, *, layers: bool, turns: bool) -> None:
        """Set it in the components that train; see :mod:`rxlm.rxt.unroll` for turns."""
        for component in (self.model.encoder, self.model.decoder):
            component.checkpoint_layers = layers
        self.checkpoint_turns = turns

    def layers(self) -> list[nn.Module]:
        """Return the layers of encoder and decoder."""
        return [*self.model.encoder.all_layers, *self.model.decoder.all_layers]

    def share_of(self, num_dialogues: int, rank: int, size: int) -> range:
        """Return which of the dialogues of a micro-batch process ``rank`` of ``size`` takes.

        Raises:
            UserError: when there are more processes than dialogues.
        """
        if num_dialogues < size:
            raise UserError(
                f"stage {self.name}: a micro-batch has {num_dialogues} dialogues, too few for "
                f"{size} processes. Set objective.dialogues to at least {size}, or "
                f"train.accumulation to a multiple of {size}."
            )
        return range(num_dialogues * rank // size, num_dialogues * (rank + 1) // size)

    def to_device(self, batch: Any) -> Any:
        """Return ``batch`` with all its tensors moved to where the model is."""
        return move_to_device(batch, self.model.device)

    def architecture(self) -> dict[str, Any]:
        """Return the configuration that weights depend on, tokenizer included."""
        # Fields at their default are left out, so a field added later leaves old runs resumable.
        parts = {
            name: getattr(self.model.config, name).model_dump(
                mode="json", exclude=set(NOT_ARCHITECTURE), exclude_defaults=True
            )
            for name in COMPONENTS
        }
        shapes = {
            name: {key: list(value.shape) for key, value in module.state_dict().items()}
            for name, module in self.extra_modules.items()
        }
        return {"model": parts, "vocabulary": self.tokenizer.fingerprint, **shapes}

    def save_model(self, directory: Path) -> None:
        """Write the model folder, and the extra modules into it."""
        save_model(self.model, directory)
        for name, module in self.extra_modules.items():
            write_tensors(_extra_file(directory, name), distinct_tensors(module), kind=name)

    def load_model_weights(self, directory: Path) -> None:
        """Load the model and the extra modules in place.

        Raises:
            UserError: if a file is missing, damaged, or does not hold exactly these weights.
        """
        copy_weights(self.model, directory / WEIGHTS_FILE, _WHOSE)
        for name, module in self.extra_modules.items():
            copy_weights(module, _extra_file(directory, name), _WHOSE)

    def load_extra_modules(self, directory: Path) -> list[str]:
        """Begin with the extra modules of an earlier stage; return the names of those it had.

        Args:
            directory: the model folder from which this stage's model comes.

        Raises:
            UserError: as :meth:`load_model_weights`.
        """
        names = [name for name in self.extra_modules if _extra_file(directory, name).exists()]
        for name in names:
            copy_weights(self.extra_modules[name], _extra_file(directory, name), _WHOSE)
        return names


def _extra_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.safetensors"
