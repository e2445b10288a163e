"""Continuing sequences token by token, any number at once; a single one is a batch of one.

Not here: text (``text``). Shapes: B sequences, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.lm.model import LMCache, LMNetwork
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import check_ids, padded
from rxlm.ops.sampling import SamplingSettings, sample, uniform_draw

StopReason = Literal["eos", "length"]


class TokenStream:
    """Continuations that are being written: iterate for one id a row and step.

    A row that has ended gives None, as does the step at which it ends by length; [EOS] itself is
    given. Each step is computed when it is asked for, without gradients, in evaluation mode.

    Attributes:
        continuations: what has been written so far, without [EOS].
        reasons: why each row ended; None while it goes on.
        cache: what has been read: prompts and continuations but for the newest tokens.
    """

    def __init__(
        self,
        network: LMNetwork,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        max_new_tokens: int,
        eos_id: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Check the prompts; nothing is computed yet.

        Args:
            network: the model.
            prompts: at least one id each ([BOS] for a text from its start).
            settings: how tokens are chosen.
            max_new_tokens: where continuations are cut.
            eos_id: the id that ends a continuation; None: only the length does.
            seeds: of each row's draws; default 0, 1, 2, ...

        Raises:
            UserError: for an empty prompt, ids outside the vocabulary, or a wrong count.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty: begin it with the id of [BOS].")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be positive.")
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each.")
        for prompt in prompts:
            check_ids(prompt, network.config.vocab_size, "a prompt")
        self.network, self.settings = network, settings
        self.continuations: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[StopReason | None] = [None for _ in prompts]
        self.cache: LMCache | None = None
        self._pending: list[list[int]] = [list(prompt) for prompt in prompts]
        self._limit, self._eos_id, self._seeds = max_new_tokens, eos_id, list(seeds)

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        if all(self.reasons):
            raise StopIteration
        chosen = self._choose(self._next_logits())
        step: list[int | None] = [None for _ in chosen]
        for row, token in enumerate(chosen):
            if self.reasons[row] is not None:
                continue
            step[row] = token
            if token == self._eos_id:
                self.reasons[row] = "eos"
                continue
            self.continuations[row].append(token)
            if len(self.continuations[row]) == self._limit:
                self.reasons[row] = "length"
        self._pending = [
            [] if self.reasons[row] is not None else [token] for row, token in enumerate(chosen)
        ]
        return step

    @torch.no_grad()
    def _next_logits(self) -> Tensor:
        ids, mask = padded(self._pending, 0)
        device = self.network.device
        with evaluation_mode(self.network):
            hidden, self.cache = self.network(ids.to(device), mask.to(device), self.cache)
            last = (mask.sum(dim=1) - 1).clamp(min=0).to(device)
            return self.network.logits(hidden[torch.arange(len(last), device=device), last])

    def _choose(self, logits: Tensor) -> list[int]:
        uniforms, previous = None, None
        if self.settings.temperature > 0:
            uniforms = [
                uniform_draw(seed, len(ids))
                for seed, ids in zip(self._seeds, self.continuations, strict=True)
            ]
        if self.settings.repetition_penalty != 1.0:
            previous = padded(self.continuations, -1)[0].to(logits.device)
        return sample(logits, self.settings, uniforms, previous).tolist()
