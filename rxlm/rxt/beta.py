"""``RxTBeta``: a Reactive Transformer that thinks, calls tools and has titled system instructions.

The networks are those of ``RxTAlpha``; what differs is what an interaction may hold (the rich
template of :mod:`rxlm.tokenization.interaction`, saved with the tokenizer) and how an answer
begins (:mod:`rxlm.rxt.answer_form`). A tool is called in one interaction and its result opens the
next; running tools is the business of :mod:`rxlm.rxt.session`.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.alpha import RxTAlpha
from rxlm.rxt.answer_form import AnswerForm, ThinkingMode
from rxlm.rxt.batch_rows import single_row_ids
from rxlm.rxt.config import MemoryAttentionConfig, RxTComponentConfig, TokenizerConfig
from rxlm.rxt.generation import AnswerLimits
from rxlm.rxt.held import EarlyStop, MemoryUpdate
from rxlm.rxt.session import Session
from rxlm.rxt.tools import MAX_TOOL_ROUNDS, Tool
from rxlm.tokenization import (
    RICH_TEMPLATE,
    Tokenizer,
    encode_given,
    encode_system,
    parse_parts,
    render_parts,
)

DEFAULT_VARIANT = "self-interlayer"
"""Memory attention of a Beta whose configuration does not choose."""
MAX_SEQ_LEN = 8192
"""Default limit of the tokens of a turn; the model's ``seq_len`` caps it."""


class RxTBeta(RxTAlpha):
    """A Reactive Transformer with thinking modes, tools and system instructions.

    Example::

        model = RxTBeta.from_pretrained("runs/beta")
        model.init_model("You are a helpful assistant.")
        for token_id in model.interact(**model.tokenize_query("2 + 3?"), thinking_mode="extended"):
            print(model.stringify_token(token_id), end="")
    """

    thinks: ClassVar[bool] = True
    turn_length: ClassVar[int] = MAX_SEQ_LEN

    def __init__(
        self,
        decoder_config: RxTComponentConfig | dict[str, Any],
        encoder_config: RxTComponentConfig | dict[str, Any],
        memory_attention_config: MemoryAttentionConfig | dict[str, Any],
        tokenizer_config: TokenizerConfig | dict[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        memory_attention_variant: str | None = None,
        system_prompt_title: str | None = None,
    ) -> None:
        """Build a model with fresh weights.

        Args:
            decoder_config: of the component that answers.
            encoder_config: of the component that reads finished turns.
            memory_attention_config: of the part that writes memory.
            tokenizer_config: ids of the special tokens; None: the tokenizer's, else the defaults.
            tokenizer: text to ids; one with the plain template is given the rich one.
            memory_attention_variant: replaces that of ``memory_attention_config``; None: what is
                set there, else 'self-interlayer'.
            system_prompt_title: heads system instructions; '': nothing does; None: the
                tokenizer's, else 'SYSTEM INSTRUCTIONS'. Saved with the tokenizer.

        Raises:
            UserError: if a configuration is invalid, names what is not built, has no ids for
                thinking and tools, or the parts or the tokenizer do not fit together.
        """
        if memory_attention_variant is None:
            memory = MemoryAttentionConfig.parse(memory_attention_config, "memory_attention_config")
            if "variant" not in memory.model_fields_set:
                memory_attention_variant = DEFAULT_VARIANT
        self._title = system_prompt_title
        super().__init__(
            decoder_config,
            encoder_config,
            memory_attention_config,
            tokenizer_config,
            tokenizer,
            memory_attention_variant,
        )
        AnswerForm(self.config.tokenizer)  # refuses ids without thinking and tools

    @property
    def system_prompt_title(self) -> str:
        """What heads system instructions; '' if nothing does."""
        if self.tokenizer is not None:
            return self.tokenizer.template.system_title or ""
        return (RICH_TEMPLATE.system_title if self._title is None else self._title) or ""

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Attach a tokenizer, with the rich template if it has the plain one.

        Raises:
            UserError: if its vocabulary or its special ids are not those of the model.
        """
        template = tokenizer.template
        if template.parts != RICH_TEMPLATE.parts:
            template = RICH_TEMPLATE
        if self._title is not None:
            template = template.model_copy(update={"system_title": self._title})
        if template != tokenizer.template:
            tokenizer = tokenizer.with_template(template)
        super().set_tokenizer(tokenizer)

    def init_model(
        self,
        system_prompt: str | None = None,
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str | None = None,
    ) -> None:
        """Move the model to ``device`` and start the held conversation anew.

        Args:
            system_prompt: written into memory under its title; None: an empty conversation.
            max_seq_len: longest prompt in tokens.
            device: where the model goes; None: it stays.
        """
        if device is not None:
            self.to(device)
        self.share_components()
        self.reset_stm_state()
        if system_prompt is not None:
            self.init_stm_state(**self.tokenize_system_prompt(system_prompt, max_seq_len))

    def answer_form(
        self, thinking_mode: ThinkingMode | None = None, tool_calls: bool = True
    ) -> AnswerForm:
        """Return the form of answers in a mode; None: 'fast'.

        Raises:
            UserError: for an unknown mode.
        """
        return AnswerForm(self.config.tokenizer, thinking_mode or "fast", tool_calls)

    # Talking.

    def interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int = MAX_SEQ_LEN,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        memory_update: MemoryUpdate = "inline",
        on_early_stop: EarlyStop = "commit",
        thinking_mode: ThinkingMode = "auto",
    ) -> Iterator[int]:
        """Answer a query or a tool's result; arguments and errors as of ``RxTAlpha.interact``.

        Args:
            input_ids: from :meth:`tokenize_query` or :meth:`tokenize_tool_result`.
            attention_mask: see there; this and the next nine.
            max_seq_len: see there.
            temperature: see there.
            top_k: see there.
            top_p: see there.
            min_p: see there.
            repetition_penalty: see there.
            seed: see there.
            memory_update: see there.
            on_early_stop: see there.
            thinking_mode: 'fast': answer at once; 'extended': think first; 'auto': the model
                chooses with its first token, the likelier of [A] and [T].

        Returns:
            iterator of ids: [T] first if it thinks ([A] first if it chose not to), thinking, [A],
            the answer, perhaps [C] and a tool call, [EOS], then -1 and -2.
        """
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
        self._require_single("interact")
        ids = single_row_ids(input_ids, attention_mask)
        limits = AnswerLimits(max_seq_len)
        form = self.answer_form(thinking_mode)
        return self._say(ids, settings, limits, form, seed, memory_update, on_early_stop)

    def parse_answer(self, ids: Iterable[int]) -> dict[str, str]:
        """Return what was said by part: 'answer', and if they are there 'think', 'tool_call'.

        Args:
            ids: as yielded by :meth:`interact` (-1 and -2 may be among them).
        """
        said = [token for token in ids if token >= 0]
        if self.answer_form().opening_of(said[:1]) is None:
            said.insert(0, self.config.tokenizer.answer_token_id)
        return parse_parts(self.require_tokenizer(), said)

    def session(
        self,
        system: str | None = None,
        seed: int = 0,
        settings: SamplingSettings | dict[str, Any] | None = None,
        name: str | None = None,
        *,
        thinking_mode: ThinkingMode = "auto",
        tools: Mapping[str, Tool] | None = None,
        max_tool_rounds: int = MAX_TOOL_ROUNDS,
        compile_decode: bool = False,
    ) -> Session:
        """Return a new conversation with text, history and files of its own.

        Args:
            system: a system prompt, written into memory first.
            seed: of the session's random draws.
            settings: how tokens are chosen; None: temperature 1.
            name: for people.
            thinking_mode: of turns that do not choose one.
            tools: what the model may call, by name; None: calls are reported, not run.
            max_tool_rounds: calls that may follow one query.
            compile_decode: run the steps of answers compiled.
        """
        return Session(
            self,
            system=system,
            seed=seed,
            settings=settings,
            name=name,
            thinking_mode=thinking_mode,
            tools=tools,
            max_tool_rounds=max_tool_rounds,
            compile_decode=compile_decode,
        )

    # Text to ids.

    def tokenize_system_prompt(
        self,
        system: str,
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Return ``[BOS] [I] title, empty line, text [EOS]``, for :meth:`init_stm_state`."""
        return self._as_tensors(
            [encode_system(self.require_tokenizer(), system)], max_seq_len, device
        )

    def tokenize_query(
        self,
        text: str,
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str = "cpu",
        internal: str | None = None,
    ) -> dict[str, Tensor]:
        """Return ``[BOS] ([I] internal) [Q] text`` as ids and mask, each ``[1, T]``.

        Raises:
            UserError: if it has more than ``max_seq_len`` tokens.
        """
        return self._given([{"query": text, "internal": internal}], max_seq_len, device)

    def tokenize_tool_result(
        self,
        text: str,
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str = "cpu",
        internal: str | None = None,
    ) -> dict[str, Tensor]:
        """Return ``[BOS] ([I] internal) [U] text``: what a called tool said, for the next turn."""
        return self._given([{"tool_use": text, "internal": internal}], max_seq_len, device)

    def tokenize_batch(
        self,
        texts: Sequence[str | None],
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str = "cpu",
        internal: str | None = None,
    ) -> dict[str, Tensor]:
        """Return queries as right-padded ids and mask ``[B, T]``; see :meth:`tokenize_query`.

        None: no query, so that the row has no real ids and sits the turn out.
        """
        rows = [None if text is None else {"query": text, "internal": internal} for text in texts]
        return self._given(rows, max_seq_len, device)

    def tokenize_full_interaction(
        self,
        query: str | None = None,
        answer: str | None = None,
        max_seq_len: int = MAX_SEQ_LEN,
        device: torch.device | str = "cpu",
        *,
        think: str | None = None,
        tool_call: str | None = None,
        tool_use: str | None = None,
        internal: str | None = None,
    ) -> dict[str, Tensor]:
        """Return ``[BOS] [I].. ([U].. | [Q]..) [T].. [A].. [C].. [EOS]`` as ids and mask.

        Raises:
            UserError: unless there is one of ``query`` and ``tool_use``, and ``answer`` or
                ``tool_call``; and if there are more than ``max_seq_len`` tokens.
        """
        parts = {
            "query": query,
            "answer": answer,
            "think": think,
            "tool_call": tool_call,
            "tool_use": tool_use,
            "internal": internal,
        }
        return self._as_tensors(
            [render_parts(self.require_tokenizer(), parts).ids], max_seq_len, device
        )

    def _given(
        self,
        rows: Sequence[Mapping[str, str | None] | None],
        max_seq_len: int,
        device: torch.device | str,
    ) -> dict[str, Tensor]:
        tokenizer = self.require_tokenizer()
        return self._as_tensors(
            [[] if parts is None else encode_given(tokenizer, parts) for parts in rows],
            max_seq_len,
            device,
        )
