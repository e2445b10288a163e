"""Methods that freeze parts of a model, under the names of the public RxLM reference.

Networks, components and memory attention have them. They are thin: what belongs to which group is
decided in :mod:`rxlm.rxt.parameter_groups`, which also has :func:`train_only`. Not here: which
parts a training stage trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from rxlm.nn.int8_linear import require_trainable
from rxlm.rxt.parameter_groups import Group, parameter_groups, set_trainable

Module = TypeVar("Module", bound="FreezingMethods")


class FreezingMethods(nn.Module):
    """``freeze_*`` and ``*_parameters`` of a network or of one of its components.

    Each method changes what it names and leaves all other parameters as they are. Those that a
    component does not have (an encoder has no memory, for example) are no error.
    """

    def requires_grad_(self: Module, requires_grad: bool = True) -> Module:
        """Freeze every parameter, or let all train.

        Raises:
            UserError: if int8 weights should train.
        """
        if requires_grad:
            require_trainable(self)
        return super().requires_grad_(requires_grad)

    def memory_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that read and write memory, without the norms before them."""
        return self._of("memory")

    def not_memory_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but those of :meth:`memory_parameters`."""
        return self._of("memory_norms", "embedding", "head", "body")

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Return the token embedding."""
        return self._of("embedding")

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the output layer and its norm; a tied output layer is the embedding."""
        return self._of("head")

    def body_parameters(self) -> list[nn.Parameter]:
        """Return everything but memory, its norms, the embedding and the head."""
        return self._of("body")

    def freeze_memory(self, with_norms: bool = True) -> None:
        """Freeze what reads and writes memory, and the norms before it unless told otherwise."""
        set_trainable(self, _memory(with_norms), False)

    def unfreeze_memory(self, with_norms: bool = True) -> None:
        """Undo :meth:`freeze_memory`."""
        set_trainable(self, _memory(with_norms), True)

    def freeze_without_memory(self, unfreeze_norms: bool = True) -> None:
        """Freeze everything but the memory, which trains from now on.

        Args:
            unfreeze_norms: whether the norms before it train, too.
        """
        self.freeze_all()
        self.unfreeze_memory(with_norms=unfreeze_norms)

    def freeze_embedding(self) -> None:
        """Freeze the token embedding (and with it a tied output layer)."""
        set_trainable(self, ("embedding",), False)

    def unfreeze_embedding(self) -> None:
        """Undo :meth:`freeze_embedding`."""
        set_trainable(self, ("embedding",), True)

    def freeze_head(self) -> None:
        """Freeze the output layer and its norm."""
        set_trainable(self, ("head",), False)

    def unfreeze_head(self) -> None:
        """Undo :meth:`freeze_head`."""
        set_trainable(self, ("head",), True)

    def freeze_all(self) -> None:
        """Freeze every parameter."""
        self.requires_grad_(False)

    def unfreeze_all(self, freeze_memory: bool = False, freeze_memory_norms: bool = True) -> None:
        """Let every parameter train.

        Args:
            freeze_memory: whether the memory is left out, and frozen.
            freeze_memory_norms: with ``freeze_memory``: whether its norms are, too.
        """
        self.requires_grad_(True)
        if freeze_memory:
            self.freeze_memory(with_norms=freeze_memory_norms)

    def _of(self, *groups: Group) -> list[nn.Parameter]:
        found = parameter_groups(self)
        return [parameter for group in groups for parameter in found[group].values()]


def _memory(with_norms: bool) -> Iterable[Group]:
    return ("memory", "memory_norms") if with_norms else ("memory",)
