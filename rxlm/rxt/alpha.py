"""``RxTAlpha``: a Reactive Transformer that users build and talk to.

It adds to :class:`~rxlm.rxt.reactive.ReactiveModel` the conveniences: one held conversation with
the ``interact`` protocol, text to ids and back, sessions, folders. A batch of held conversations is
in :mod:`rxlm.rxt.batched`. Conversations as values (``new_conversation``, ``generate``,
``update_memory``) are inherited and do not touch what is held.
Import it from :mod:`rxlm.rxt.models`. Thinking and tools are in :mod:`rxlm.rxt.beta`.

Shapes: L layers, T tokens, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt import saving
from rxlm.rxt.answer_form import AnswerForm
from rxlm.rxt.batch_rows import row_ids, single_row_ids
from rxlm.rxt.batch_text import MEMORY_NOTES, MEMORY_UPDATE_BEGINS, MEMORY_UPDATED
from rxlm.rxt.batched import BatchModel
from rxlm.rxt.config import (
    MemoryAttentionConfig,
    RxTComponentConfig,
    RxTConfig,
    TokenizerConfig,
)
from rxlm.rxt.conversation import ConversationState, check_slots
from rxlm.rxt.generation import AnswerLimits, answer_room, opened_prompt
from rxlm.rxt.held import (
    EarlyStop,
    HeldConversation,
    HeldConversations,
    MemoryUpdate,
    check_choice,
)
from rxlm.rxt.held_batch import checked_rows
from rxlm.rxt.reactive import tokenizer_config_of
from rxlm.rxt.session import Session
from rxlm.storage.hub import local_folder
from rxlm.storage.model_card import Metrics
from rxlm.storage.model_folder import architecture_of
from rxlm.tokenization import Tokenizer, encode_interaction
from rxlm.tokenization.stream import TextStream

ModelType = TypeVar("ModelType", bound="RxTAlpha")


class RxTAlpha(BatchModel):
    """A Reactive Transformer with one conversation held for convenience.

    Example::

        model = RxTAlpha.from_pretrained("runs/nano/5-memory-aware")
        for token_id in model.interact(**model.tokenize_query("Hi, I am Ann.")):
            print(model.stringify_token(token_id), end="")
    """

    def __init__(
        self,
        decoder_config: RxTComponentConfig | dict[str, Any],
        encoder_config: RxTComponentConfig | dict[str, Any],
        memory_attention_config: MemoryAttentionConfig | dict[str, Any],
        tokenizer_config: TokenizerConfig | dict[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        memory_attention_variant: str | None = None,
    ) -> None:
        """Build a model with fresh weights.

        Args:
            decoder_config: of the component that answers.
            encoder_config: of the component that reads finished turns.
            memory_attention_config: of the part that writes memory.
            tokenizer_config: ids of the special tokens; None: the tokenizer's, else the defaults.
            tokenizer: text to ids; may be attached later with :meth:`set_tokenizer`.
            memory_attention_variant: replaces ``memory_attention_config.variant`` if given.

        Raises:
            UserError: if a configuration is invalid, names what is not built, or the parts or
                the tokenizer do not fit together.
        """
        memory = MemoryAttentionConfig.parse(memory_attention_config, "memory_attention_config")
        if memory_attention_variant not in (None, memory.variant):
            memory = MemoryAttentionConfig.parse(
                {**memory.model_dump(), "variant": memory_attention_variant},
                "memory_attention_variant",
            )
        if tokenizer_config is None:
            tokenizer_config = (
                TokenizerConfig() if tokenizer is None else tokenizer_config_of(tokenizer)
            )
        parts = {
            "decoder": RxTComponentConfig.parse(decoder_config, "decoder_config"),
            "encoder": RxTComponentConfig.parse(encoder_config, "encoder_config"),
            "memory_attention": memory,
            "tokenizer": TokenizerConfig.parse(tokenizer_config, "tokenizer_config"),
        }
        super().__init__(RxTConfig.parse(parts), tokenizer)
        self._held: HeldConversation | None = None
        self._text: TextStream | None = None

    @classmethod
    def from_config(
        cls: type[ModelType],
        config: RxTConfig | dict[str, Any],
        tokenizer: Tokenizer | None = None,
    ) -> ModelType:
        """Return a model with fresh weights, described by one configuration."""
        config = RxTConfig.parse(config)
        return cls(
            config.decoder,
            config.encoder,
            config.memory_attention,
            config.tokenizer,
            tokenizer,
            memory_attention_variant=config.memory_attention.variant,
        )

    # Talking: one conversation, held.

    def interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        memory_update: MemoryUpdate = "inline",
        on_early_stop: EarlyStop = "commit",
    ) -> Iterator[int]:
        """Answer one query of the held conversation, then write the turn into its memory.

        Args:
            input_ids: the query, ``[1, T]`` or ``[T]``, from :meth:`tokenize_query`.
            attention_mask: which ids are real, same shape; None = all.
            max_seq_len: tokens of the whole turn at which the answer is cut (capped by the
                model's ``seq_len``).
            temperature: 0 = greedy; this and the next four: see
                :class:`~rxlm.ops.sampling.SamplingSettings`.
            top_k: see there.
            top_p: see there.
            min_p: see there.
            repetition_penalty: see there.
            seed: start a new stream of draws; None: go on with the conversation's.
            memory_update: 'inline': between -1 and -2; 'background': on a worker thread, the
                iterator ends after -1, and the next use of the conversation waits.
            on_early_stop: whether an answer that is not read to its end is committed as far as
                it was read (the memory gets what was said), or the turn is dropped.

        Returns:
            iterator of the answer's ids ([EOS] included if the model ended it), then -1, then
            (inline) -2.

        Raises:
            UserError: at once, if the query does not fit or the model is in batch mode; nothing is
                changed.
        """
        self._require_single("interact")
        settings = SamplingSettings.parse(
            {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
            },
            "interact",
        )
        ids = single_row_ids(input_ids, attention_mask)
        limits = AnswerLimits(max_seq_len)
        return self._say(ids, settings, limits, None, seed, memory_update, on_early_stop)

    def _say(
        self,
        ids: list[int],
        settings: SamplingSettings,
        limits: AnswerLimits,
        form: AnswerForm | None,
        seed: int | None,
        memory_update: MemoryUpdate,
        on_early_stop: EarlyStop,
    ) -> Iterator[int]:
        """Check the turn at once; return what :meth:`interact` yields."""
        check_choice("memory_update", memory_update, get_args(MemoryUpdate))
        check_choice("on_early_stop", on_early_stop, get_args(EarlyStop))
        prompt = opened_prompt(ids, self.config.tokenizer.answer_token_id, form)
        answer_room(self, prompt, limits, form)

        def answer() -> Iterator[int]:
            held = self._single
            turn = held.begin(
                prompt, settings, limits, on_early_stop=on_early_stop, seed=seed, form=form
            )
            self._text = None
            with held.reading(turn):
                if form is not None and prompt[-1] == form.think_id:
                    yield form.think_id
                yield from held.tokens(turn)
                if memory_update == "background":
                    held.commit_in_background(turn)
                    yield MEMORY_UPDATE_BEGINS
                    return
                yield MEMORY_UPDATE_BEGINS
                held.commit(turn)
                yield MEMORY_UPDATED

        return answer()

    def wait_for_memory(self) -> None:
        """Wait for the update of what is held; raises what the update raised."""
        self._conversation.settle()

    def init_stm_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Start the held conversation anew, with a system prompt in its memory.

        Args:
            input_ids: the prompt as a whole turn, ``[1, T]``, for example from
                :meth:`tokenize_full_interaction`. In batch mode one for all rows, or ``[B, T]``.
            attention_mask: which ids are real, same shape; None = all.
        """
        seeds = self._conversation.state.seeds
        if self._batch is not None and input_ids.dim() == 2 and len(input_ids) == 1:
            turns = [single_row_ids(input_ids, attention_mask)] * len(seeds)
        else:
            turns = self._turns(input_ids, attention_mask)
        fresh = ConversationState.stack([self.new_conversation(seed=seed) for seed in seeds])
        written = self.update_memory(fresh, turns)
        self._hold(written.replaced(num_turns=fresh.num_turns))

    def update_stm(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Write a whole turn ``[1, T]`` into the memory of the held conversation.

        In batch mode one a row, ``[B, T]``; a row without real ids stays as it is.
        """
        state = self._conversation.state
        self._hold(self.update_memory(state, self._turns(input_ids, attention_mask)))

    def reset_stm_state(self, seed: int = 0, rows: Sequence[int] | None = None) -> None:
        """Start the held conversation anew.

        Args:
            seed: in batch mode row b starts as a single conversation with ``seed + b`` does.
            rows: in batch mode: only these conversations. The others go on undisturbed, even in
                the middle of an answer; one of ``rows`` ends there and does not enter memory.

        Raises:
            UserError: if ``rows`` are not rows of the batch, or the model is not in batch mode.
        """
        if rows is None:
            self._hold(self.new_conversation(self.batch_size or 1, seed=seed))
            return
        batch = self._require_batch("reset_stm_state(rows=...)")
        chosen = checked_rows(rows, batch.batch_size)
        fresh = [self.new_conversation(seed=seed + row) for row in chosen]
        batch.start_anew(chosen, ConversationState.stack(fresh))

    def export_stm_state(self) -> Tensor:
        """Return a copy of the held memory, ``[L, B, S, D]`` (B = 1 without batch mode); waits for
        its update."""
        return self.export_conversation().slots.detach().clone()

    def export_conversation(self) -> ConversationState:
        """Return the held conversation (in batch mode: all of them) as a value; waits for its
        update. It is of the model's device and type, also after the model was converted."""
        state = self._conversation.state
        if (state.slots.device, state.slots.dtype) == (self.device, self.memory_dtype):
            return state
        return state.to(self.device, self.memory_dtype)

    def load_stm_state(self, state: Tensor | ConversationState) -> None:
        """Go on with another memory ``[L, B, S, D]``, or with another conversation.

        B is 1, or in batch mode the size of the batch. Slots alone are half of a conversation where
        the decoder carries a state: it starts afresh.

        Raises:
            UserError: if the shape is not this model's, a value is not finite, or it holds another
                number of conversations. What was held is unchanged then.
        """
        if not isinstance(state, ConversationState):
            check_slots(state, self.memory_shape, dtype=self.memory_dtype)
            # A tensor knows no randomness: the conversation keeps its own.
            slots = state.detach().clone()
            fresh = self.decoder.nothing_carried(slots.shape[1])
            held = self._batch or self._held
            if held is None or held.batch_size != slots.shape[1]:
                state = ConversationState.start(slots, 0, fresh)
            else:
                state = held.state.replaced(slots=slots, carried=fresh)
        self._hold(self._fitting(state))

    @property
    def _conversation(self) -> HeldConversations:
        """What the model holds now: the batch, or the single conversation."""
        return self._single if self._batch is None else self._batch

    @property
    def _single(self) -> HeldConversation:
        # Made at first use: it starts from the weights as they are then, not as they were built.
        if self._held is None:
            self._held = HeldConversation(self, self.new_conversation())
        return self._held

    def _hold(self, state: ConversationState) -> None:
        if self._batch is not None:
            self._batch.replace(state)
        elif self._held is None:
            self._held = HeldConversation(self, state)
        else:
            self._held.replace(state)

    def _turns(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
        """Return the real ids of one row a held conversation."""
        if self._batch is None:
            return [single_row_ids(input_ids, attention_mask)]
        pad_id = self.config.tokenizer.pad_token_id
        return row_ids(input_ids, attention_mask, self._batch.batch_size, pad_id)

    def session(
        self,
        system: str | None = None,
        seed: int = 0,
        settings: SamplingSettings | dict[str, Any] | None = None,
        name: str | None = None,
        *,
        compile_decode: bool = False,
    ) -> Session:
        """Return a new conversation with text, history and files of its own; see `Session`."""
        return Session(
            self,
            system=system,
            seed=seed,
            settings=settings,
            name=name,
            compile_decode=compile_decode,
        )

    # Text to ids and back.

    def tokenize_query(
        self, text: str, max_seq_len: int = 256, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Return ``[BOS] [Q] text`` as ``input_ids`` and ``attention_mask``, each ``[1, T]``.

        Raises:
            UserError: if it has more than ``max_seq_len`` tokens.
        """
        return self.tokenize_batch([text], max_seq_len, device)

    def tokenize_full_interaction(
        self,
        query: str,
        answer: str,
        max_seq_len: int = 256,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Return ``[BOS] [Q] query [A] answer [EOS]`` as :meth:`tokenize_query` does."""
        turn = encode_interaction(self.require_tokenizer(), query, answer)
        return self._as_tensors([turn.ids], max_seq_len, device)

    def stringify_token(
        self, token_id: int, skip_special_tokens: bool = True, show_memory_update: bool = False
    ) -> str:
        """Return the text that one id of a running answer completes.

        Ids of one answer are given in order: bytes of an unfinished character are held back until
        it is complete. The next answer starts afresh.

        Args:
            token_id: as yielded by :meth:`interact`, -1 and -2 included.
            skip_special_tokens: whether special tokens give ''.
            show_memory_update: whether -1 and -2 give a note.
        """
        note = MEMORY_NOTES.get(token_id, "") if show_memory_update else ""
        if token_id in MEMORY_NOTES:
            rest = "" if self._text is None else self._text.flush()
            self._text = None
            return rest + note
        if self._text is None:
            self._text = self.require_tokenizer().stream(skip_special_tokens)
        return self._text.push(token_id)

    # Folders.

    def save_pretrained(
        self, directory: str | Path, overwrite: bool = False, metrics: Metrics | None = None
    ) -> None:
        """Write weights, configuration, tokenizer and card; see :mod:`rxlm.rxt.saving`."""
        saving.save_model(self, directory, overwrite, metrics)

    @classmethod
    def from_pretrained(
        cls: type[ModelType],
        directory: str | Path,
        strict: bool = True,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> ModelType:
        """Read a model from a model, checkpoint, run or pipeline folder, or ``hf://owner/name``.

        A folder of an ``RxTBeta`` gives one also when ``RxTAlpha`` is asked for (it is one).

        Args:
            directory: see :func:`rxlm.storage.hub.local_folder`.
            strict: whether missing and unknown weights are errors.
            device: where the model goes.
            revision: of a model on the Hub: a branch, a tag or a commit.
            token: of the Hub, for a model that is not public.

        Returns:
            the model in evaluation mode.

        Raises:
            UserError: if there is no model, or it is damaged or inconsistent.
        """
        folder = local_folder(directory, revision, token)
        return saving.load_model(_class_of(cls, folder), folder, strict=strict, device=device)

    def load_weights(self, directory: str | Path) -> None:
        """Copy the weights of a model folder into this model, in place and strictly."""
        saving.load_weights(self, directory)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload model",
        metrics: Metrics | None = None,
    ) -> str:
        """Upload the model folder to the Hub; see :func:`rxlm.rxt.saving.push_model`."""
        return saving.push_model(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            metrics=metrics,
        )


def _class_of(cls: type[ModelType], folder: Path) -> type[ModelType]:
    """Return ``cls``, or the special case of it that wrote ``folder``."""
    name = architecture_of(folder)
    return next((item for item in cls.__subclasses__() if item.__name__ == name), cls)
