"""A Reactive Transformer that speaks: its networks, its tokenizer, and conversations as values.

Every method takes what it needs and returns what came of it; nothing is remembered between calls.
The convenience of one held conversation is in :mod:`rxlm.rxt.alpha`.

Shapes: L layers, B conversations, T tokens, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.nn.recurrent_cache import CarriedState
from rxlm.ops.padding import check_ids, padded
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.answer_form import AnswerForm, ThinkingMode
from rxlm.rxt.assembly import Component, Embedding, load_components, open_parts
from rxlm.rxt.config import RxTConfig, TokenizerConfig
from rxlm.rxt.conversation import ConversationState, check_carried
from rxlm.rxt.fingerprint import ModelFingerprint
from rxlm.rxt.generation import (
    Answer,
    AnswerLimits,
    AnswerStream,
    turn_limit,
)
from rxlm.rxt.model import RxTNetwork
from rxlm.storage.weights import weights_fingerprint
from rxlm.tokenization import Tokenizer, encode_query, encode_system

ModelType = TypeVar("ModelType", bound="ReactiveModel")

Prompt = str | Sequence[int]
"""A query as text, or as the ids ``[BOS] [Q] query`` ([A] is added if missing)."""


class Generated(NamedTuple):
    """What :meth:`ReactiveModel.generate` returns: an answer a row, and the state after them."""

    answers: list[Answer]
    state: ConversationState


class ReactiveModel(RxTNetwork):
    """Networks and tokenizer, with the operations that a conversation consists of."""

    thinks: ClassVar[bool] = False
    """Whether answers have a form with thinking and tool calls (see RxTBeta)."""

    def __init__(
        self, config: RxTConfig | dict[str, Any], tokenizer: Tokenizer | None = None
    ) -> None:
        """Build a model with fresh weights.

        Raises:
            UserError: if the configuration is invalid, needs what is not built, or does not fit
                the tokenizer.
        """
        super().__init__(config)
        self.tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)

    @classmethod
    def from_config(
        cls: type[ModelType],
        config: RxTConfig | dict[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> ModelType:
        """Return a model with fresh weights; see the constructor."""
        return cls(config, tokenizer)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Attach a tokenizer.

        Raises:
            UserError: if its vocabulary or its special ids are not those of the model.
        """
        check_tokenizer(tokenizer, self.config)
        self.tokenizer = tokenizer

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raise ``UserError`` if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer: pass tokenizer=... when it is built, or call "
                "set_tokenizer()."
            )
        return self.tokenizer

    def fingerprint(self) -> ModelFingerprint:
        """Return what a memory of this model is bound to."""
        return ModelFingerprint(
            self.config.architecture_fingerprint(),
            "" if self.tokenizer is None else self.tokenizer.fingerprint,
            weights_fingerprint(self),
        )

    def answer_form(
        self, thinking_mode: ThinkingMode | None = None, tool_calls: bool = True
    ) -> AnswerForm | None:
        """Return the form of this model's answers; None: it answers after [A].

        Raises:
            UserError: if a mode is given to a model that does not think.
        """
        if thinking_mode is not None:
            raise UserError(
                f"thinking_mode={thinking_mode!r}: {type(self).__name__} answers at once; only "
                "RxTBeta thinks (model.architecture: beta in a recipe). Leave thinking_mode out."
            )
        return None

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """(L, S, D) of this model's memory ``[L, B, S, D]``."""
        memory = self.config.memory_attention
        return memory.num_layers, memory.stm_size, memory.embed_dim

    def new_conversation(
        self, batch_size: int = 1, seed: int = 0, system: str | None = None
    ) -> ConversationState:
        """Return conversations before their first turn.

        Args:
            batch_size: B.
            seed: row b starts and draws as a single conversation with ``seed + b`` does.
            system: a system prompt, written into the memory of every row.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be positive.")
        with torch.no_grad():
            slots = self.initial_memory(batch_size, seed=seed).detach()
        state = ConversationState.start(slots, seed, self.decoder.nothing_carried(batch_size))
        if system is None:
            return state
        ids = encode_system(self.require_tokenizer(), system)
        written = self.update_memory(state, [ids] * batch_size)
        return written.replaced(num_turns=state.num_turns)

    def stream(
        self,
        state: ConversationState,
        prompts: Sequence[Prompt],
        settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
        *,
        max_seq_len: int | None = None,
        max_new_tokens: int | None = None,
        compile_decode: bool = False,
        thinking_mode: ThinkingMode | None = None,
    ) -> AnswerStream:
        """Return the answers to ``prompts`` as they are written, one token a row and step.

        Args:
            state: one conversation a prompt; left unchanged.
            prompts: one query a row.
            settings: how tokens are chosen, for all rows or one a row; None: temperature 1.
            max_seq_len: tokens of the whole turn; None or more: the model's ``seq_len``.
            max_new_tokens: tokens of the answer without [EOS]; None: as many as fit.
            compile_decode: compile the decode step: a minute at the first use of a number of rows
                and a length of turns, then the same tokens twice as fast or more. Needs a C++
                compiler on a CPU; with CUDA graphs on CUDA.
            thinking_mode: of a model that thinks; None: 'fast'.

        Raises:
            UserError: if a query leaves no room for an answer, or there is no compiler; nothing is
                computed then.
        """
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        limits = AnswerLimits(max_seq_len, max_new_tokens)
        chosen = SamplingSettings() if settings is None else settings
        form = self.answer_form(thinking_mode)
        return AnswerStream(self, state, ids, chosen, limits, form, compile_decode=compile_decode)

    def generate(
        self,
        state: ConversationState,
        prompts: Sequence[Prompt],
        settings: SamplingSettings | Sequence[SamplingSettings] | None = None,
        *,
        max_seq_len: int | None = None,
        max_new_tokens: int | None = None,
        compile_decode: bool = False,
        thinking_mode: ThinkingMode | None = None,
    ) -> Generated:
        """Answer ``prompts``; arguments and errors are those of :meth:`stream`.

        Returns:
            the answers, and the state with the draws made. Its memory does not hold the turn yet:
            ``update_memory(state, [answer.turn for answer in answers])`` writes it.
        """
        stream = self.stream(
            state,
            prompts,
            settings,
            max_seq_len=max_seq_len,
            max_new_tokens=max_new_tokens,
            compile_decode=compile_decode,
            thinking_mode=thinking_mode,
        )
        # Entered once here, so that the stream's own, one a token, has nothing to switch.
        with evaluation_mode(self):
            for _ in stream:
                pass
        return Generated(stream.answers(), stream.state)

    @torch.no_grad()
    def update_memory(
        self, state: ConversationState, turns: Sequence[Sequence[int]]
    ) -> ConversationState:
        """Write finished turns into memory (and into the state that the decoder carries).

        Args:
            state: the conversations; left unchanged.
            turns: the ids of one whole turn a row, ``[BOS] ... [EOS]``; an empty turn leaves its
                row as it is.

        Raises:
            UserError: if the counts differ, or a turn is too long or not of this vocabulary.
        """
        if len(turns) != state.batch_size:
            raise UserError(
                f"{len(turns)} turns for {state.batch_size} conversations: give one each."
            )
        limit = turn_limit(self)
        for turn in turns:
            check_ids(turn, self.config.decoder.vocab_size, "a turn")
            if len(turn) > limit:
                raise UserError(
                    f"a turn has {len(turn)} tokens but the model's seq_len is {limit}: shorten it."
                )
        if not any(turns):
            return state
        ids, mask = padded(turns, self.config.tokenizer.pad_token_id)
        weight = self.encoder.embedding.weight
        slots = state.slots.to(device=weight.device, dtype=self.memory_dtype)
        ids, mask = ids.to(weight.device), mask.to(weight.device)
        with evaluation_mode(self):
            written = self.write_memory(slots, ids, mask)
            carried = self._carry(slots, ids, mask, state.carried)
        counts = zip(state.num_turns, turns, strict=True)
        return state.replaced(
            slots=written,
            num_turns=tuple(count + bool(turn) for count, turn in counts),
            carried=carried,
        )

    def _carry(
        self, slots: Tensor, ids: Tensor, mask: Tensor, before: CarriedState | None
    ) -> CarriedState | None:
        """Let the decoder read the whole turns, as it does in training; return what it carries on.

        The slots are those *before* the turn: gates and state belong to one memory. The answer's
        last token has not been read by anyone before, and a turn may never have been generated.
        """
        if not self.decoder.carries_state:
            if before is not None:
                check_carried(before, None, len(ids))
            return None
        before = None if before is None else before.to(ids.device)
        reading = self.decoder.read_memory(slots)
        _, cache = self.decoder(ids, mask, memory=reading, carried=before)
        return self.decoder.carry(cache, before)

    @classmethod
    def from_components(
        cls: type[ModelType],
        decoder: nn.Module | str | Path,
        encoder: nn.Module | str | Path,
        memory_attention: nn.Module | str | Path,
        tokenizer: Tokenizer | None = None,
        embedding: Embedding = "equal",
    ) -> ModelType:
        """Return a model with copies of the weights of three components, in evaluation mode.

        Args:
            decoder: the component, or a folder that its ``save_pretrained`` wrote (or
                ``hf://owner/name``); as the next two.
            encoder: see there.
            memory_attention: see there.
            tokenizer: of the model; decides the ids of special tokens.
            embedding: whose token embedding it gets where the two differ.

        Raises:
            UserError: if a part is of another kind or damaged, or the parts do not fit together.
        """
        parts = open_parts(decoder, encoder, memory_attention)
        special = TokenizerConfig() if tokenizer is None else tokenizer_config_of(tokenizer)
        config, dtype = parts.config(special), parts.dtype
        with torch.random.fork_rng(devices=[]):
            model = cls.from_config(config, tokenizer).to(dtype)
        model.load_pretrained_weights(**parts._asdict(), embedding=embedding)
        return model.eval()

    def load_pretrained_weights(
        self,
        decoder: Component | None = None,
        encoder: Component | None = None,
        memory_attention: Component | None = None,
        embedding: Embedding = "equal",
    ) -> None:
        """Copy the weights of whole components: modules, folders or state dicts.

        Decoder and encoder share one token embedding here; given one of the two, both get its.

        Raises:
            UserError: if one is of another kind or has other settings, weights are missing,
                unknown or of another shape, or decoder and encoder bring different token
                embeddings and ``embedding`` does not choose one. Nothing is copied then.
        """
        load_components(
            self,
            decoder=decoder,
            encoder=encoder,
            memory_attention=memory_attention,
            embedding=embedding,
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return encode_query(self.require_tokenizer(), prompt)
        return [int(token) for token in prompt]


def check_tokenizer(tokenizer: Tokenizer, config: RxTConfig) -> None:
    """Raise ``UserError`` unless ``tokenizer`` yields exactly the ids that the model knows."""
    if tokenizer.vocab_size != config.decoder.vocab_size:
        raise UserError(
            f"the tokenizer has vocab_size={tokenizer.vocab_size} but the model has "
            f"vocab_size={config.decoder.vocab_size}: use the tokenizer that the model was "
            f"trained with, or build the model with vocab_size={tokenizer.vocab_size}."
        )
    wrong = [
        f"{field}={token_id} (tokenizer: {theirs})"
        for field, token_id in config.tokenizer.ids().items()
        if (theirs := getattr(tokenizer, field.replace("_token_id", "_id"))) != token_id
    ]
    if wrong:
        raise UserError(
            "the tokenizer's special ids are not those of the model's tokenizer_config: "
            + ", ".join(wrong)
        )


def tokenizer_config_of(tokenizer: Tokenizer) -> TokenizerConfig:
    """Return the special ids of ``tokenizer`` as a model's configuration."""
    fields = TokenizerConfig.model_fields
    return TokenizerConfig(
        **{name: getattr(tokenizer, name.replace("_token_id", "_id")) for name in fields}
    )
