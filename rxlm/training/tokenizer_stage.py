"""Stage 1, the tokenizer: a run folder whose result is a vocabulary.

It is no :class:`~rxlm.training.objective.Objective`: there is nothing to differentiate and nothing
to resume, a killed run is simply made again. How a vocabulary is learned is in
:mod:`rxlm.tokenization`; here is on which texts, and what is written. No torch at import.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

from pydantic import Field

from rxlm.configuration import Config
from rxlm.data.conversation_source import conversation_texts, open_conversations
from rxlm.data.data_config import DataConfig
from rxlm.data.records import DataSummary
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer
from rxlm.training.run_folder import RunFolder, RunStatus
from rxlm.training.texts import iter_texts, stream_texts

logger = logging.getLogger(__name__)

STAGE = "tokenizer"
_WHOLE = 1_000_000_000
"""More turns than any conversation has."""
_MEASURED_DIALOGUES = 64


class TokenizerStageSettings(Config):
    """On how much text the tokenizer is trained."""

    dialogues: int = Field(default=3000, gt=0)
    """Built-in dialogues to read. Files are always read as a whole."""
    turns: int = Field(default=12, gt=0)
    """Turns of each built-in dialogue."""
    texts: int = Field(default=200_000, gt=0)
    """Documents to read where ``data.text`` is a stream."""


def tokenizer_texts(
    data: DataConfig, settings: TokenizerStageSettings, summary: DataSummary | None = None
) -> Iterator[str]:
    """Yield every training text: system texts, queries and answers, then ``data.text``.

    Raises:
        UserError: for files that are missing, empty or malformed; before the first text.
    """
    summary = DataSummary() if summary is None else summary
    source = open_conversations(data, summary=summary)
    if source.size is None:
        count, turns = settings.dialogues, settings.turns
    else:
        count, turns = source.size, _WHOLE
    conversations = (source.sample(position, turns) for position in range(count))
    texts: Iterator[str] = iter(())
    if data.streaming:
        texts = stream_texts(data, settings.texts, summary)
    elif data.text is not None or data.mixture:
        texts = iter_texts(data, "train", summary)
        # What is wrong with a text that is held in memory is found out here.
        first = list(itertools.islice(texts, 1))
        texts = itertools.chain(first, texts)
    return itertools.chain(conversation_texts(conversations), texts)


def run_tokenizer_stage(
    data: DataConfig,
    training: TokenizerTraining,
    settings: TokenizerStageSettings,
    run: RunFolder,
) -> RunStatus:
    """Train a tokenizer and write its files into the run folder; ``run.json`` is written last.

    Raises:
        UserError: for data that cannot be used.
    """
    summary = DataSummary()
    texts = tokenizer_texts(data, settings, summary)
    begin = time.perf_counter()
    run.write_config()
    run.write_environment("cpu", 1)
    run.write_status(RunStatus(stage=STAGE, status="running"))
    tokenizer = train_tokenizer(texts, training)
    tokenizer.save(run.path, overwrite=True)
    metrics: dict[str, float | None] = {
        "train/vocab_size": tokenizer.vocab_size,
        "validation/characters_per_token": characters_per_token(tokenizer, data, settings),
    }
    status = RunStatus(
        stage=STAGE,
        status="complete",
        step=1,
        metrics=metrics,
        seconds=time.perf_counter() - begin,
        data={"train": summary.to_dict()} if summary.num_records else {},
    )
    run.write_status(status)
    logger.info(
        "%s: %d ids, %.2f characters a token on validation dialogues, %.1f s",
        run.path,
        tokenizer.vocab_size,
        metrics["validation/characters_per_token"],
        status.seconds,
    )
    return status


def characters_per_token(
    tokenizer: Tokenizer, data: DataConfig, settings: TokenizerStageSettings
) -> float:
    """Return how many characters a token stands for on validation dialogues (more is better)."""
    source = open_conversations(data, "valid")
    count = min(_MEASURED_DIALOGUES, source.size or _MEASURED_DIALOGUES)
    conversations = [source.sample(position, settings.turns) for position in range(count)]
    texts = list(conversation_texts(conversations))
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(map(len, texts)) / max(1, num_tokens)
