"""What a language model is made of. No torch at import.

Not here: how it is trained (``rxlm.training``) and which mixers there are (``rxlm.nn.mixers``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError

Positions = Literal["none", "learned", "sinusoidal", "rotary", "alibi"]
"""How a token knows where it stands; recurrences know the order without any of them."""


class LMConfig(Config):
    """A decoder-only language model without a memory: tokens in, scores of the next token out."""

    vocab_size: PositiveInt = 20000
    """Number of token ids; a recipe that leaves it out takes the tokenizer's."""
    dim: PositiveInt = 512
    """Width."""
    depth: PositiveInt = 6
    """Layers; each mixes tokens, then channels."""
    attention: str | tuple[str, ...] = "gated_deltanet"
    """Token mixer of all layers (see `rxlm.nn.mixers`: softmax, gla, deltanet, ...), or a list of
    one a layer, repeated from its start when it is shorter than ``depth``."""
    positions: Positions = "rotary"
    """``rotary`` turns queries and keys in the mixers that can be turned (recurrences know the
    order themselves); ``alibi`` biases softmax attention; ``learned`` and ``sinusoidal`` are
    added to the embedding."""
    num_heads: PositiveInt = 8
    """Heads of every mixer."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads of softmax attention; ``null``: as many as ``num_heads``."""
    window: PositiveInt = 128
    """Tokens that window attention sees, the token itself included."""
    conv_size: PositiveInt | None = 4
    """Tokens of the short convolution of recurrences; ``null``: none."""
    expand_k: float | None = Field(default=None, gt=0)
    """Total key width of a recurrence divided by ``dim``; ``null``: as published."""
    expand_v: float | None = Field(default=None, gt=0)
    """Total value width of a recurrence divided by ``dim``; ``null``: as published."""
    ff_dim: PositiveInt | None = None
    """Inner width of the feed-forward network; ``null``: four times ``dim``."""
    ff_activation: Literal["relu", "gelu", "silu", "swish"] = "swish"
    """Its activation."""
    ff_gated: bool = True
    """Whether it is gated (SwiGLU with ``swish``), which costs half as many parameters again."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Normalisation before every part and before the scores."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Its epsilon."""
    tie_embeddings: bool = True
    """Whether tokens are scored by the embedding that reads them."""
    rope_base: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping embeddings, attention weights and what a layer adds."""
    max_seq_len: int = Field(default=1024, ge=3)
    """Tokens of a training row at most; also the limit of ``learned`` positions."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of new embeddings."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer of each layer, ``depth`` names."""
        names = (self.attention,) if isinstance(self.attention, str) else self.attention
        return tuple(names[index % len(names)] for index in range(self.depth))

    @property
    def inner_dim(self) -> int:
        """Inner width of the feed-forward network."""
        return 4 * self.dim if self.ff_dim is None else self.ff_dim

    @field_validator("attention")
    @classmethod
    def _known_mixers(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        from rxlm.nn.mixers import MIXERS

        names = (value,) if isinstance(value, str) else value
        unknown = [name for name in names if name not in MIXERS]
        if unknown or not names:
            raise ValueError(f"attention={value!r}: expected one or a list of {', '.join(MIXERS)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> LMConfig:
        from rxlm.nn.mixers import MIXERS

        if isinstance(self.attention, tuple) and len(self.attention) > self.depth:
            raise UserError(
                f"attention lists {len(self.attention)} mixers but depth={self.depth}: list at "
                "most one a layer."
            )
        if self.positions == "alibi":
            without = [name for name in self.layers if "alibi" not in MIXERS[name].positions]
            able = [name for name, mixer in MIXERS.items() if "alibi" in mixer.positions]
            if without:
                raise UserError(
                    f"positions='alibi' is a bias on the scores of softmax attention, which "
                    f"{', '.join(dict.fromkeys(without))} does not have: use positions='rotary' "
                    f"(recurrences know the order themselves), or attention={able[0]!r}."
                )
        return self
