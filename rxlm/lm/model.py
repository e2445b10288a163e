"""A decoder-only language model whose token mixers are names in a table.

    x      = embed(ids) [+ positions]
    x      = x + mix(norm(x));  x = x + feed_forward(norm(x))      (each layer)
    scores = head(norm(x))

It holds no memory from one call to the next: what was read is a cache, passed in and returned. It
trains through the same Trainer as the Reactive Transformer and is its baseline. Not here: text in
and out (``text``), files (``saving``), choosing tokens (``generation``).

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.lm.config import LMConfig
from rxlm.nn.feed_forward import FeedForward
from rxlm.nn.mixers import MixerSettings, build_mixer
from rxlm.nn.norms import make_norm
from rxlm.nn.packing import PackedLayout
from rxlm.ops.losses import Reduction, linear_cross_entropy


class LMCache(NamedTuple):
    """What B sequences have read: a cache a layer, and their numbers of real tokens ``[B]``."""

    layers: tuple[Any, ...]
    lengths: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> LMCache:
        """Return the sequences ``rows``, in that order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        layers = tuple(layer.select(index) for layer in self.layers)
        return LMCache(layers, self.lengths.index_select(0, index))

    @property
    def num_bytes(self) -> int:
        """Size of the value in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self))


class LMLayer(nn.Module):
    """One layer: tokens are mixed, then channels, each added to what comes in."""

    def __init__(self, mixer: nn.Module, feed_forward: nn.Module, config: LMConfig) -> None:
        super().__init__()
        rms = config.norm == "rms_norm"
        self.mixer_norm = make_norm(config.dim, rms=rms, eps=config.norm_eps)
        self.mixer = mixer
        self.feed_forward_norm = make_norm(config.dim, rms=rms, eps=config.norm_eps)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """Map ``[B, T, D]`` to ``[B, T, D]``, and the layer's cache to that with these tokens."""
        mixed, cache = self.mixer(self.mixer_norm(x), key_mask=key_mask, cache=cache)
        return self._after_mixing(x, mixed), cache

    def forward_packed(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map packed rows ``[B, T, D]`` to ``[B, T, D]``, each sequence by itself."""

        def mix(tokens: Tensor, key_mask: Tensor) -> Tensor:
            mixed: Tensor = self.mixer(tokens, key_mask=key_mask)[0]
            return mixed

        return self._after_mixing(x, layout.apply(mix, self.mixer_norm(x)))

    def _after_mixing(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        channels: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + channels


class LMNetwork(nn.Module):
    """The networks. New weights of a part depend on the global seed and on that part's name only,
    so models with different mixers begin with the same embedding and feed-forward networks."""

    def __init__(self, config: LMConfig | dict[str, Any]) -> None:
        """Build a network with fresh weights.

        Raises:
            UserError: if the configuration is invalid, or a mixer refuses the sizes.
        """
        super().__init__()
        self.config = config = LMConfig.parse(config, "LMConfig")
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.embedding = _seeded(seed, "embedding", lambda: self._new_embedding(config.vocab_size))
        if config.positions == "learned":
            self.position_embedding = _seeded(
                seed, "positions", lambda: self._new_embedding(config.max_seq_len)
            )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            self._new_layer(seed, index, name) for index, name in enumerate(config.layers)
        )
        self.norm = make_norm(config.dim, rms=config.norm == "rms_norm", eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            self.head.weight = _seeded(
                seed, "head", lambda: self._new_embedding(config.vocab_size)
            ).weight
        # Not a map from one width to another: Muon leaves it to AdamW.
        self.head.weight._scores_tokens = True  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(
        self, ids: Tensor, key_mask: Tensor | None = None, cache: LMCache | None = None
    ) -> tuple[Tensor, LMCache]:
        """Read tokens.

        Args:
            ids: int64 ``[B, T]``.
            key_mask: bool ``[B, T]``, True at real tokens, on either side; None: all are.
            cache: of the tokens before; None: there are none. Unchanged.

        Returns:
            hidden states ``[B, T, D]``, ready for :meth:`logits`, and the cache with ``ids``.

        Raises:
            UserError: if ``positions='learned'`` and a sequence gets longer than ``max_seq_len``.
        """
        if cache is None:
            nothing = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
            cache = LMCache((None,) * len(self.layers), nothing)
        if key_mask is None:
            counts = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand_as(ids)
        else:
            counts = key_mask.long().cumsum(dim=1)
        x = self._embed(ids, (counts - 1).clamp(min=0) + cache.lengths[:, None])
        layers = []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x, present = layer(x, key_mask, past)
            layers.append(present)
        lengths = cache.lengths + counts[:, -1] if ids.shape[1] else cache.lengths
        return self.norm(x), LMCache(tuple(layers), lengths)

    def read_packed(self, ids: Tensor, segments: Tensor) -> Tensor:
        """Read rows of several sequences each; none sees another, and each begins at position 0.

        Args:
            ids: int64 ``[B, T]``.
            segments: int ``[B, T]``, see :meth:`~rxlm.nn.packing.PackedLayout.of_segments`.

        Returns:
            hidden states ``[B, T, D]`` as :meth:`forward` gives for each sequence alone; of no
            meaning at padding.

        Raises:
            UserError: as :meth:`forward`.
        """
        layout = PackedLayout.of_segments(segments)
        x = self._embed(ids, layout.position)
        for layer in self.layers:
            assert isinstance(layer, LMLayer)
            x = layer.forward_packed(x, layout)
        hidden: Tensor = self.norm(x)
        return hidden

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        if self.config.positions == "learned":
            self._check_length(positions)
            x = x + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            # As large as a new embedding, so that neither hides the other.
            scale = self.config.init_std * math.sqrt(2.0)
            x = x + (scale * sinusoids(positions, self.config.dim)).to(x.dtype)
        dropped: Tensor = self.dropout(x)
        return dropped

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of the next token, ``[..., V]``, of hidden states ``[..., D]``."""
        scores: Tensor = self.head(hidden)
        return scores

    def cross_entropy(
        self, hidden: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
    ) -> tuple[Tensor, Tensor]:
        """Return loss and number of right predictions, without holding all of :meth:`logits`.

        Args:
            hidden: of M tokens, ``[M, D]``.
            labels: the token that follows each, int64 ``[M]``.
            reduction: see :func:`~rxlm.ops.losses.linear_cross_entropy`.
        """
        head = self.head
        return linear_cross_entropy(
            hidden, head.weight, head.bias, labels, reduction=reduction, return_correct=True
        )

    def _check_length(self, positions: Tensor) -> None:
        longest = int(positions.max()) + 1 if positions.numel() and not positions.is_meta else 0
        if longest > self.config.max_seq_len:
            raise UserError(
                f"a sequence has {longest} tokens, but positions='learned' knows "
                f"max_seq_len={self.config.max_seq_len}: shorten it, or train a model with other "
                "positions."
            )

    def _new_embedding(self, num_rows: int) -> nn.Embedding:
        embedding = nn.Embedding(num_rows, self.config.dim)
        nn.init.normal_(embedding.weight, std=self.config.init_std)
        return embedding

    def _new_layer(self, seed: int, index: int, name: str) -> LMLayer:
        config = self.config
        settings = mixer_settings(config)
        mixer = _seeded(seed, f"mixer {index}", lambda: build_mixer(name, settings))
        feed_forward = _seeded(seed, f"feed forward {index}", lambda: _new_feed_forward(config))
        return LMLayer(mixer, feed_forward, config)


def mixer_settings(config: LMConfig) -> MixerSettings:
    """Return what the model tells its mixers."""
    return MixerSettings(
        dim=config.dim,
        num_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        rotary=config.positions == "rotary",
        rope_base=config.rope_base,
        alibi=config.positions == "alibi",
        dropout=config.dropout,
        window=config.window,
        conv_size=config.conv_size,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        norm_eps=config.norm_eps,
    )


def state_bytes(config: LMConfig, num_tokens: int) -> int:
    """Return the size of the cache of one sequence of ``num_tokens`` tokens, in fp32.

    Found by running one mixer of each kind, not the whole model.
    """
    x = torch.zeros(1, num_tokens, config.dim)
    sizes = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name in set(config.layers):
            _, cache = build_mixer(name, mixer_settings(config)).eval()(x)
            sizes[name] = sum(part.numel() * part.element_size() for part in _tensors(cache))
    counter = torch.zeros(1, dtype=torch.long)
    return sum(sizes[name] for name in config.layers) + counter.element_size()


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Return the table of Vaswani et al. 2017 (arXiv 1706.03762, 3.5): fp32 ``[B, T, D]``.

    Args:
        positions: ``[B, T]``.
        dim: D; sines fill the first half, cosines the second, the last of them if D is odd.
    """
    half = torch.arange((dim + 1) // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * 10000.0 ** (-2.0 * half / dim)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :dim]


def _new_feed_forward(config: LMConfig) -> nn.Module:
    module = FeedForward(
        config.dim,
        config.inner_dim,
        activation=config.ff_activation,
        gated=config.ff_gated,
        dropout=0.0,
    )
    # Each layer adds twice to the residual stream (Radford et al. 2019, section 2.3).
    with torch.no_grad():
        module.down.weight.mul_((2 * config.depth) ** -0.5)
    return module


def _seeded(seed: int, part: str, build: Callable[[], Any]) -> Any:
    """Return what ``build`` makes when its random numbers depend on ``seed`` and ``part`` only."""
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        return build()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
