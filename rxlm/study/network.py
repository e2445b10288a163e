"""The one network of a study: ``rxlm.lm``'s, with a short convolution for everyone.

Recurrences are published with a short convolution, softmax attention is not; a comparison in which
only some can see their neighbours at once is one of convolutions. With ``equal_convolution`` every
mixer that brings none gets one in front, ``mixer(x + conv(x))``, of the same width.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.lm.config import LMConfig
from rxlm.lm.model import LMLayer, LMNetwork
from rxlm.nn.short_conv import ShortConvolution
from rxlm.study.mechanisms import set_backend


class ConvolvedCache(NamedTuple):
    """Inputs of the convolution at the last tokens ``[B, W - 1, D]``, and the mixer's cache."""

    recent: Tensor
    inner: Any

    def select(self, rows: Sequence[int] | Tensor) -> ConvolvedCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.recent.device)
        return ConvolvedCache(self.recent.index_select(0, index), self.inner.select(index))


class ConvolvedMixer(nn.Module):
    """A mixer that reads ``x + conv(x)``. Without padding: rows of a study are full."""

    def __init__(self, mixer: nn.Module, dim: int, width: int) -> None:
        super().__init__()
        self.short_convolution = ShortConvolution(dim, width)
        self.mixer = mixer

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, cache: ConvolvedCache | None = None
    ) -> tuple[Tensor, ConvolvedCache]:
        """Mix ``x`` ``[B, T, D]``, going on from ``cache``."""
        recent, inner = (None, None) if cache is None else cache
        near, recent = self.short_convolution(x, key_mask, recent)
        y, inner = self.mixer(x + near, key_mask=key_mask, cache=inner)
        return y, ConvolvedCache(recent, inner)


class StudyNetwork(LMNetwork):
    """A language model of one mechanism.

    New weights depend on the global seed and on their part's name only, so that networks of two
    mechanisms begin with the same embedding.
    """

    def __init__(
        self,
        config: LMConfig | dict[str, Any],
        *,
        equal_convolution: bool = True,
        backend: str = "auto",
        strict_backend: bool = False,
    ) -> None:
        self._convolve = equal_convolution
        super().__init__(config)
        set_backend(self, backend, strict_backend)

    def _new_layer(self, seed: int, index: int, name: str) -> LMLayer:
        layer = super()._new_layer(seed, index, name)
        if self._convolve and self.config.conv_size and not brings_convolution(layer.mixer):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed + index) % 2**62)
                layer.mixer = ConvolvedMixer(layer.mixer, self.config.dim, self.config.conv_size)
        return layer


def brings_convolution(mixer: nn.Module) -> bool:
    """Return whether a mixer sees convolved tokens already."""
    return any(isinstance(part, ShortConvolution) for part in mixer.modules())
