"""Models of this package for lm-evaluation-harness: ``pip install 'reactive-lm[eval]'``.

    from lm_eval import simple_evaluate
    from rxlm.study.harness import HarnessModel

    simple_evaluate(model=HarnessModel.from_pretrained("runs/lm/tiny"), tasks=["wikitext"])

A language model reads ``[BOS] context continuation``. A reactive model has no plain text: the
context is the query of a first turn and the continuation its answer, read with the initial memory;
text without a context is an answer to nothing. Importing this module needs lm_eval.

Shapes: B requests, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxlm.errors import UserError
from rxlm.evaluation.answering import greedy_answers, start_of
from rxlm.lm.language_model import LanguageModel, is_language_model
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.rxt.reactive import ReactiveModel
from rxlm.storage.hub import local_folder
from rxlm.tokenization.template import encode_interaction, encode_query

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}): pip install 'reactive-lm[eval]'."
    ) from error

DEFAULT_NEW_TOKENS = 256


class Scored(NamedTuple):
    """A row to score: its ids, and from which on they are the continuation (>= 1)."""

    ids: list[int]
    start: int


class HarnessModel(LM):
    """A language model or a reactive model, by the harness's three questions."""

    def __init__(self, model: LanguageModel | ReactiveModel, batch_size: int = 16) -> None:
        """Wrap a model with its tokenizer.

        Raises:
            UserError: for a model without one.
        """
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.tokenizer = model.require_tokenizer()
        self._reactive = isinstance(model, ReactiveModel)
        limit = model.config.decoder.seq_len if self._reactive else model.config.max_seq_len  # type: ignore[union-attr]
        self.max_length = int(limit)

    @classmethod
    def from_pretrained(cls, path: str, device: str = "cpu", batch_size: int = 16) -> HarnessModel:
        """Load what ``path`` means: a model folder, a checkpoint, a run, ``hf://owner/name``.

        Raises:
            UserError: if there is no model, or it is damaged.
        """
        folder = local_folder(path)
        if is_language_model(folder):
            return cls(LanguageModel.from_pretrained(folder, device=device), batch_size)
        import rxlm

        return cls(rxlm.load(folder, device), batch_size)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood (nats) of each continuation, and whether greedy decoding would
        write it."""
        rows = [self._row(*request.args) for request in requests]
        return [(float(losses.sum()), greedy) for losses, greedy in self._score(rows)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood (nats) of each whole text; long ones are read in windows that
        overlap, so that each token is predicted once and with as much before it as fits."""
        totals = []
        for request in requests:
            rows = self._windows(request.args[0])
            totals.append(float(sum(losses.sum() for losses, _ in self._score(rows))))
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context greedily until one of its stop strings."""
        return [self._continue(*request.args) for request in requests]

    def _row(self, context: str, continuation: str) -> Scored:
        tokenizer = self.tokenizer
        if self._reactive:
            turn = encode_interaction(tokenizer, context, continuation)
            # [A] itself says only that an answer begins, [EOS] that it ends.
            return self._cut(Scored(turn.ids[:-1], turn.answer_start + 1))
        before = [tokenizer.bos_id, *(tokenizer.encode(context) if context else [])]
        ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        # A token may reach over the boundary: then it belongs to the continuation.
        start = next(
            (n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b),
            min(len(ids), len(before)),
        )
        return self._cut(Scored(ids, max(1, start)))

    def _cut(self, row: Scored) -> Scored:
        """Leave out the beginning of what is too long."""
        over = len(row.ids) - self.max_length - 1
        if over <= 0:
            return row
        return Scored(row.ids[over:], max(1, row.start - over))

    def _windows(self, text: str) -> list[Scored]:
        if self._reactive:
            turn = encode_interaction(self.tokenizer, "", text)
            head, ids = turn.ids[: turn.answer_start + 1], turn.ids[turn.answer_start + 1 : -1]
        else:
            head, ids = [self.tokenizer.bos_id], self.tokenizer.encode(text)
        room = self.max_length - len(head) + 1
        if room < 1:
            raise UserError(f"max_length={self.max_length} leaves no room for a text.")
        rows = []
        for first in range(0, len(ids), room):
            end = min(len(ids), first + room)
            begin = max(0, end - room)  # the last window looks back as far as it can
            rows.append(Scored([*head, *ids[begin:end]], len(head) + first - begin))
        return rows

    @torch.no_grad()
    def _score(self, rows: Sequence[Scored]) -> list[tuple[Tensor, bool]]:
        found: list[tuple[Tensor, bool]] = []
        with evaluation_mode(self.model):
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                ids, mask = padded([row.ids for row in part], self.tokenizer.pad_id)
                ids, mask = ids.to(self.model.device), mask.to(self.model.device)
                scores = self._logits(ids[:, :-1], mask[:, :-1]).float().log_softmax(dim=-1)
                for number, row in enumerate(part):
                    labels = ids[number, row.start : len(row.ids)]
                    own = scores[number, row.start - 1 : len(row.ids) - 1]
                    chosen = own.gather(-1, labels[:, None])[:, 0].double().cpu()
                    found.append((chosen, bool((own.argmax(dim=-1) == labels).all())))
        return found

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the scores after every token ``[B, T, V]``."""
        model = self.model
        if isinstance(model, LanguageModel):
            return model.logits(model(ids, mask)[0])
        slots = model.initial_memory(1, seed=0).expand(-1, len(ids), -1, -1)
        reading = model.decoder.read_memory(slots)
        carried = model.decoder.nothing_carried(len(ids))
        hidden, _ = model.decoder(ids, mask, memory=reading, carried=carried)
        return model.decoder.logits(hidden)

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        most = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        model = self.model
        if isinstance(model, LanguageModel):
            context = self._shortened(context, most)
            text = str(model.complete(context, max_new_tokens=most, temperature=0.0))
        else:
            used = len(encode_query(self.tokenizer, context))
            most = max(1, min(most, self.max_length - used - 1))
            answer = greedy_answers(model, start_of(model, 1), [context], most)[0]
            text = self.tokenizer.decode(answer.ids)
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text

    def _shortened(self, context: str, most: int) -> str:
        ids = self.tokenizer.encode(context)
        room = max(1, self.max_length - most - 1)
        return context if len(ids) <= room else self.tokenizer.decode(ids[-room:])
