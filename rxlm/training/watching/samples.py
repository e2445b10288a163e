"""Conversations that the model holds at a validation: the quickest way to see what it has learned.

One line of ``samples.jsonl`` per conversation and validation:

    {"step": 500, "dialogue": 0, "turns": [{"query": ..., "expected": ..., "answer": ...}, ...]}

Answers are greedy (the likeliest token each time), so the same weights always say the same. A
resumed run cuts off the lines after its checkpoint. Only the file is free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxlm.training.metrics import read_metrics, truncate_metrics
from rxlm.training.watch import Sample, WatchSettings

if TYPE_CHECKING:
    from rxlm.data.conversations import ConversationSource
    from rxlm.lm.language_model import LanguageModel
    from rxlm.rxt.reactive import ReactiveModel

SAMPLES_FILE = "samples.jsonl"
_PROMPT_SHARE = 0.5


class SampleFile:
    """Writes ``samples.jsonl``.

    Args:
        folder: the run folder; None: nothing is written (another process does).
        after_step: updates made before; lines of later ones are cut off.
    """

    def __init__(self, folder: Path | None, after_step: int) -> None:
        self._path = None if folder is None else folder / SAMPLES_FILE
        if self._path is not None:
            truncate_metrics(self._path, after_step)

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Add the samples of one validation."""
        if self._path is None or not samples:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for number, turns in enumerate(samples):
                line = {"step": step, "dialogue": number, "turns": turns}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``samples.jsonl``; none if it has no such file."""
    path = folder / SAMPLES_FILE
    return read_metrics(path) if path.is_file() else []


def held_conversations(
    model: ReactiveModel, source: ConversationSource, settings: WatchSettings
) -> list[Sample]:
    """Let the model hold the first validation conversations: its own answers enter its memory.

    Args:
        model: with its tokenizer, in evaluation mode.
        source: asks the questions.
        settings: how many conversations and turns, and how long the answers.
    """
    from rxlm.evaluation.answering import greedy_answers, start_of

    dialogues = [
        source.sample(number, settings.sample_turns).interactions
        for number in range(settings.sample_dialogues)
    ]
    if not dialogues:
        return []
    tokenizer = model.require_tokenizer()
    state = start_of(model, len(dialogues))
    samples: list[Sample] = [[] for _ in dialogues]
    for n in range(max(len(dialogue) for dialogue in dialogues)):
        present = [b for b, dialogue in enumerate(dialogues) if len(dialogue) > n]
        queries = [dialogues[b][n].query for b in present]
        answers = greedy_answers(model, state.select(present), queries, settings.sample_tokens)
        turns: list[list[int]] = [[] for _ in dialogues]
        for b, answer in zip(present, answers, strict=True):
            turns[b] = answer.turn
            asked = dialogues[b][n]
            said = tokenizer.decode(answer.ids)
            samples[b].append({"query": asked.query, "expected": asked.answer, "answer": said})
        state = model.update_memory(state, turns)
    return samples


def continued_texts(
    model: LanguageModel, rows: Sequence[Sequence[int]], settings: WatchSettings
) -> list[Sample]:
    """Let a language model continue the first half of validation rows.

    Args:
        model: with its tokenizer.
        rows: token ids, [BOS] first.
        settings: how long the continuations.
    """
    from rxlm.lm.generation import TokenStream
    from rxlm.ops.sampling import SamplingSettings

    tokenizer = model.require_tokenizer()
    cuts = [max(1, min(len(row) - 1, round(len(row) * _PROMPT_SHARE))) for row in rows]
    prompts = [list(row[:cut]) for row, cut in zip(rows, cuts, strict=True)]
    if not prompts:
        return []
    stream = TokenStream(
        model,
        prompts,
        SamplingSettings(temperature=0.0),
        max_new_tokens=min(
            settings.sample_tokens, model.config.max_seq_len - max(map(len, prompts))
        ),
        eos_id=tokenizer.eos_id,
    )
    for _ in stream:
        pass
    return [
        [
            {
                "query": tokenizer.decode(prompt),
                "expected": tokenizer.decode(list(row[cut:])[: settings.sample_tokens]),
                "answer": tokenizer.decode(written),
            }
        ]
        for row, cut, prompt, written in zip(rows, cuts, prompts, stream.continuations, strict=True)
    ]
