"""A language model of equal size as a contestant: with the full history (F), without any (N).

It reads a conversation as the interactions of the reactive model, one after the other, so both see
the same tokens. Also here: whether it may be compared at all.

Shapes: B conversations, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from rxlm.data.conversations import Conversation
from rxlm.errors import UserError
from rxlm.evaluation.suite.contestant import Control, TokenLosses, Turns
from rxlm.lm.config import LMConfig
from rxlm.lm.generation import TokenStream
from rxlm.lm.language_model import LanguageModel
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.model import RxTNetwork
from rxlm.rxt.reactive import ReactiveModel
from rxlm.storage.weights import weights_fingerprint
from rxlm.tokenization.template import encode_query, encode_system, render_parts

logger = logging.getLogger(__name__)

SIZE_TOLERANCE = 0.03
"""Models whose sizes differ by more are not called equal."""
BATCH_TOKENS = 24_000
"""Tokens of a batch, padding included; changes no result."""
MASK_ELEMENTS = 40_000_000
"""Pairs of tokens of a batch: long rows would fill the memory with what each token sees."""


class History(NamedTuple):
    """Token ids of B conversations up to now."""

    rows: list[list[int]]


class LanguageModelContestant:
    """A language model without a memory that answers by greedy decoding.

    Args:
        model: with its tokenizer.
        max_answer_tokens: longer answers are cut.
    """

    controls: tuple[Control, ...] = ("F", "N")

    def __init__(self, model: LanguageModel, max_answer_tokens: int = 24) -> None:
        self.model, self.max_answer_tokens = model, max_answer_tokens
        self.tokenizer = model.require_tokenizer()

    def fits(self, turns: Turns) -> bool:
        """Return whether its positions reach to the end of these turns."""
        if self.model.config.positions != "learned":
            return True
        length = len(self._ids(turns)) + self.max_answer_tokens
        return length <= self.model.config.max_seq_len

    def read(self, histories: Sequence[Turns]) -> History:
        """Return the tokens of the conversations."""
        return History([self._ids(turns) for turns in histories])

    def answer(self, held: History, queries: Sequence[str], control: Control) -> list[str]:
        """Answer with the history before the query (F), or with the query alone (N)."""
        prompts = [
            [*(ids if control == "F" else ()), *encode_query(self.tokenizer, query)]
            for ids, query in zip(held.rows, queries, strict=True)
        ]
        prompts = [[*prompt, self.tokenizer.answer_id] for prompt in prompts]
        texts: list[str] = [""] * len(prompts)
        for rows in batches([len(prompt) for prompt in prompts]):
            stream = TokenStream(
                self.model,
                [prompts[row] for row in rows],
                SamplingSettings(temperature=0.0),
                max_new_tokens=self.max_answer_tokens,
                eos_id=self.tokenizer.eos_id,
            )
            for _ in stream:
                pass
            for row, ids in zip(rows, stream.continuations, strict=True):
                texts[row] = self.tokenizer.decode(ids)
        return texts

    def losses(self, conversations: Sequence[Conversation]) -> dict[Control, TokenLosses]:
        """Return the losses with the whole conversation before each answer, and with its query."""
        whole, single = [], []
        for conversation in conversations:
            turns = [
                render_parts(self.tokenizer, turn.parts()).turn
                for turn in conversation.interactions
            ]
            row, starts = self._system_ids(conversation), []
            for turn in turns:
                starts.append((len(row) + turn.answer_start + 1, len(row) + len(turn.ids)))
                row = [*row, *turn.ids]
                single.append((turn.ids, [(turn.answer_start + 1, len(turn.ids))]))
            whole.append((row, starts))
        full = self._losses(whole)
        alone = [part for (part,) in self._losses(single)]
        by_turn = iter(alone)
        return {
            "F": full,
            "N": [[next(by_turn) for _ in item.interactions] for item in conversations],
        }

    def _system_ids(self, conversation: Conversation) -> list[int]:
        if not conversation.system:
            return []
        return encode_system(self.tokenizer, conversation.system)

    def _ids(self, turns: Turns) -> list[int]:
        return [token for turn in turns for token in render_parts(self.tokenizer, turn.parts()).ids]

    @torch.no_grad()
    def _losses(
        self, rows: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]]
    ) -> TokenLosses:
        """Return the losses of the given spans of tokens of each row."""
        found: TokenLosses = [[] for _ in rows]
        with evaluation_mode(self.model):
            for part in batches([len(ids) for ids, _ in rows]):
                ids, mask = padded([rows[row][0] for row in part], 0)
                ids, mask = ids.to(self.model.device), mask.to(self.model.device)
                hidden, _ = self.model(ids[:, :-1], mask[:, :-1])
                for place, row in enumerate(part):
                    for begin, end in rows[row][1]:
                        scores = self.model.logits(hidden[place, begin - 1 : end - 1])
                        loss = nn.functional.cross_entropy(
                            scores.float(), ids[place, begin:end], reduction="none"
                        )
                        found[row].append(loss.tolist())
        return found


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the rows of batches of about equal length that fit into memory."""
    chosen: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = (len(chosen) + 1) * lengths[row]
        if chosen and (tokens > BATCH_TOKENS or tokens * lengths[row] > MASK_ELEMENTS):
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen


def check_baseline(model: ReactiveModel, baseline: LanguageModel) -> dict[str, Any]:
    """Return the sizes of a model and of the language model that it is compared with.

    Unequal sizes are allowed, and said: in a warning, and in the result.

    Raises:
        UserError: if they do not share a tokenizer: perplexities of different tokens, and memories
            of different pieces, cannot be compared.
    """
    own, other = model.require_tokenizer(), baseline.require_tokenizer()
    if own.fingerprint != other.fingerprint:
        raise UserError(
            f"the baseline's tokenizer ({other.vocab_size} ids, fingerprint "
            f"{other.fingerprint[:12]}) is not the model's ({own.vocab_size} ids, "
            f"{own.fingerprint[:12]}): train the baseline with tokenizer_from=<the model's run>."
        )
    sizes = {
        "parameters": non_embedding_parameters(model),
        "baseline_parameters": non_embedding_parameters(baseline),
    }
    ratio = sizes["baseline_parameters"] / sizes["parameters"]
    equal = abs(ratio - 1) <= SIZE_TOLERANCE
    if not equal:
        logger.warning(
            "the baseline has %s parameters without embeddings, the model %s (%+.1f %%): more "
            "than %g %% apart, so F and N are not of equal size",
            f"{sizes['baseline_parameters']:,}",
            f"{sizes['parameters']:,}",
            100 * (ratio - 1),
            100 * SIZE_TOLERANCE,
        )
    return {
        **sizes,
        "ratio": ratio,
        "equal": equal,
        "weights": weights_fingerprint(baseline),
        "config": baseline.config.model_dump(mode="json"),
    }


def non_embedding_parameters(model: nn.Module) -> int:
    """Return the number of weights that are not looked up or scored by token.

    Embeddings, the head and learned positions are left out, as are weights that occur twice.
    """
    tokens = {
        id(weight)
        for name, weight in model.named_parameters(remove_duplicate=False)
        if "embedding" in name.split(".") or "position_embedding" in name or _is_head(name)
    }
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in tokens)


def _is_head(name: str) -> bool:
    return name.endswith(("head_weight", "head_bias")) or name == "head.weight"


def twin_config(model: RxTNetwork) -> LMConfig:
    """Return a softmax language model with the width of a decoder and all the model's parameters.

    As many layers as fit, and the inner width of the feed-forward networks that makes up the rest.
    """
    config = model.config.decoder
    wanted, dim = non_embedding_parameters(model), config.embed_dim

    def left(depth: int) -> int:
        # Of a layer: 4 D^2 of attention, two norms; at the end one norm.
        return wanted - dim - depth * (4 * dim * dim + 2 * dim)

    usual = 3 * dim * config.ff_dim
    depth = max(1, round((wanted - dim) / (4 * dim * dim + 2 * dim + usual)))
    ff_dim = max(1, round(left(depth) / (depth * 3 * dim)))
    return LMConfig(
        vocab_size=config.vocab_size,
        dim=dim,
        depth=depth,
        attention="softmax",
        positions="rotary",
        num_heads=config.att_heads,
        ff_dim=ff_dim,
        max_seq_len=1024,
    )
