"""Masked language modelling (BERT, Devlin et al. 2019): which tokens are hidden, and the head.

Shapes: R rows, T tokens, M masked tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from rxlm.tokenization import Tokenizer

MaskReplacement = Literal["mask", "80/10/10"]


class MLMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the token embedding as output matrix, with a bias.

    The embedding is passed in, so it stays the model's and is not saved twice.
    """

    def __init__(self, dim: int, vocab_size: int, generator: torch.Generator) -> None:
        """Build the head.

        Args:
            dim: D.
            vocab_size: V.
            generator: of the initial weights, so that they depend on the stage's seed only.
        """
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        nn.init.normal_(self.dense.weight, std=dim**-0.5, generator=generator)
        nn.init.zeros_(self.dense.bias)
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Score the vocabulary: ``[M, D]`` and the embedding ``[V, D]`` to ``[M, V]``."""
        transformed = self.norm(nn.functional.gelu(self.dense(hidden)))
        return nn.functional.linear(transformed, embedding, self.bias)


class TokenMasker:
    """Chooses tokens to hide from the encoder. Special tokens and padding are never chosen."""

    def __init__(
        self, tokenizer: Tokenizer, probability: float, replacement: MaskReplacement
    ) -> None:
        """Prepare the masking.

        Args:
            tokenizer: knows the special ids.
            probability: of each ordinary token. A row in which chance chose none gets one.
            replacement: ``mask`` puts [MASK] in place of all chosen tokens; ``80/10/10`` of 80 %
                of them, a random ordinary token in place of 10 %, and leaves 10 % as they are.
        """
        self.probability = probability
        self.replacement = replacement
        self.mask_id = tokenizer.mask_id
        self._special = torch.tensor(sorted(tokenizer.special_ids))
        ids = torch.arange(tokenizer.vocab_size)
        self._ordinary = ids[~torch.isin(ids, self._special)]

    def __call__(self, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Hide tokens.

        Args:
            ids: token ids ``[R, T]``, padded with [PAD] (which is special).
            draws: independent uniform numbers in [0, 1), ``[R, T, 3]``.

        Returns:
            what the encoder sees ``[R, T]``, and bool ``[R, T]``: tokens that it has to restore.
        """
        eligible = ~torch.isin(ids, self._special)
        rank = draws[..., 0].masked_fill(~eligible, 1.0)
        chosen = rank < self.probability
        # A row without a hidden token would teach the encoder nothing: hide its first in rank.
        missed = eligible.any(dim=1) & ~chosen.any(dim=1)
        chosen[missed, rank.argmin(dim=1)[missed]] = True
        replaced = torch.full_like(ids, self.mask_id)
        if self.replacement == "80/10/10":
            index = (draws[..., 2] * len(self._ordinary)).long()
            replaced = torch.where(draws[..., 1] < 0.8, replaced, self._ordinary[index])
            replaced = torch.where(draws[..., 1] < 0.9, replaced, ids)
        return torch.where(chosen, replaced, ids), chosen
