"""What a language model without a memory is worth and what it costs: the table of ``eval lm``.

Perplexity and bits per byte of given rows, bytes of the decode state and of a forward, tokens per
second of training, prefill and decoding. Before any number is given, decoding must equal the full
forward: figures of a model whose cache is wrong would describe nothing.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveInt

from rxlm.configuration import Config
from rxlm.errors import RunError, UserError
from rxlm.evaluation.measuring import Rate, measure_rate, peak_bytes, processor_name
from rxlm.evaluation.progress import Progress
from rxlm.evaluation.report import describe_environment
from rxlm.evaluation.tables import Table
from rxlm.lm.language_model import LanguageModel
from rxlm.lm.model import LMCache
from rxlm.nn.evaluation_mode import evaluation_mode
from rxlm.ops.padding import padded
from rxlm.storage.weights import count_parameters, weights_fingerprint

GATE_TOLERANCES = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1e-3, 3e-4),
    torch.float16: (1e-2, 5e-4),
    torch.bfloat16: (5e-2, 1e-2),
}
"""(absolute, relative) difference of scores that decoding may show, by dtype of the weights."""
SCHEMA = "rxlm-lm-evaluation/1"
"""Of the JSON form."""
_GATE_TOKENS = 64
_MAX_EXPONENT = 700.0


class LMEvaluationSettings(Config):
    """How much is read and measured."""

    max_documents: PositiveInt = 500
    """At most so many documents, the first ones."""
    batch_size: PositiveInt = 16
    """Rows computed at once; changes no result."""
    state_lengths: tuple[PositiveInt, ...] = (128, 1024, 4096)
    """After how many tokens the decode state is measured."""
    speed_batch: PositiveInt = 8
    """Rows of a speed measurement."""
    speed_tokens: PositiveInt = 256
    """Tokens of each of those rows (the model's ``max_seq_len`` at most)."""
    decode_tokens: PositiveInt = 32
    """Tokens decoded, one a step, after a prefill of ``speed_tokens``."""
    rounds: int = Field(default=5, ge=1)
    """Repetitions of each speed measurement; the median and the quartiles are reported."""


class EvaluatedText(NamedTuple):
    """What perplexity is measured on."""

    rows: Sequence[Sequence[int]]
    """[BOS] first, [EOS] at the end of a document; all after the first are predicted."""
    num_documents: int
    num_bytes: int
    """UTF-8 bytes of the documents."""
    source: str
    """What a report calls it."""
    sha256: str
    """Hash of the documents."""


def evaluate_language_model(
    model: LanguageModel,
    text: EvaluatedText,
    settings: LMEvaluationSettings | None = None,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return everything that was measured, as JSON-like data.

    Args:
        model: with its weights where it is to be measured.
        text: what it reads.
        settings: how much.
        name: what the report calls the model.
        progress: told before every part.

    Raises:
        UserError: if there is nothing to read.
        RunError: if decoding does not equal the full forward, or a loss is not finite.
    """
    settings = settings or LMEvaluationSettings()
    if not text.rows:
        raise UserError(f"{text.source}: holds nothing to read.")
    show = progress or (lambda done, total, doing: None)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("validation", lambda: check_decoding(model, text.rows[0])),
        ("quality", lambda: _quality(model, text, settings)),
        ("memory", lambda: _memory(model, settings)),
        ("speed", lambda: _speed(model, settings)),
    ]
    result: dict[str, Any] = {}
    with evaluation_mode(model):
        for number, (part, measure) in enumerate(parts):
            show(number, len(parts), part)
            result[part] = measure()
    show(len(parts), len(parts), "done")
    return {
        "schema": SCHEMA,
        "model": {
            "name": name,
            "weights": weights_fingerprint(model),
            "parameters": sum(count_parameters(model).values()),
            "config": model.config.model_dump(mode="json"),
        },
        "data": {
            "source": text.source,
            "sha256": text.sha256,
            "documents": text.num_documents,
            "bytes": text.num_bytes,
        },
        "settings": settings.model_dump(mode="json"),
        "environment": {
            **describe_environment(),
            "processor": processor_name(),
            "device": _device_name(model.device),
            "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        },
        **result,
    }


@torch.no_grad()
def check_decoding(model: LanguageModel, row: Sequence[int]) -> dict[str, Any]:
    """Compare prefills of 1 and of half the tokens, continued one by one, with a full forward.

    Returns:
        the largest difference of scores, and the tolerance.

    Raises:
        RunError: if they differ by more than rounding.
    """
    ids = torch.tensor([list(row)[:_GATE_TOKENS]], device=model.device)
    expected = model.logits(model(ids)[0]).float()
    atol, rtol = GATE_TOLERANCES[model.embedding.weight.dtype]
    worst = 0.0
    for prefill in (1, max(1, ids.shape[1] // 2)):
        hidden, cache = model(ids[:, :prefill])
        states = [hidden]
        for position in range(prefill, ids.shape[1]):
            hidden, cache = model(ids[:, position : position + 1], cache=cache)
            states.append(hidden)
        found = model.logits(torch.cat(states, dim=1)).float()
        worst = max(worst, float((found - expected).abs().max()))
        if not torch.allclose(found, expected, atol=atol, rtol=rtol):
            raise RunError(
                f"decoding after a prefill of {prefill} tokens differs from the full forward by "
                f"{worst:.3g} (allowed: {atol:g} + {rtol:g} x score): a mixer's cache is wrong, so "
                f"nothing is measured. Layers: {', '.join(model.config.layers)}."
            )
    return {"largest_difference": worst, "atol": atol, "rtol": rtol, "tokens": ids.shape[1]}


@torch.no_grad()
def _quality(
    model: LanguageModel, text: EvaluatedText, settings: LMEvaluationSettings
) -> dict[str, Any]:
    ordered = sorted(text.rows, key=len)
    nats, num_tokens = 0.0, 0
    for first in range(0, len(ordered), settings.batch_size):
        ids, mask = padded(ordered[first : first + settings.batch_size], 0)
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden, _ = model(ids[:, :-1], mask[:, :-1])
        labels = ids[:, 1:][mask[:, 1:]]
        loss_sum, _ = model.cross_entropy(hidden[mask[:, 1:]], labels, reduction="sum")
        nats += float(loss_sum)
        num_tokens += len(labels)
    loss = nats / num_tokens
    if not math.isfinite(loss):
        raise RunError("the loss is not a finite number: the model's training diverged.")
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, _MAX_EXPONENT)),
        "bits_per_byte": nats / math.log(2) / text.num_bytes,
        "tokens": num_tokens,
        "rows": len(ordered),
    }


@torch.no_grad()
def _memory(model: LanguageModel, settings: LMEvaluationSettings) -> dict[str, Any]:
    limit = model.config.max_seq_len if model.config.positions == "learned" else None
    lengths = [length for length in settings.state_lengths if limit is None or length <= limit]
    state = {length: _read(model, 1, length).num_bytes for length in lengths}
    tokens = _speed_tokens(model, settings)
    return {
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
        "state": {str(length): size for length, size in state.items()},
        "forward_tokens": tokens,
        "forward_peak": peak_bytes(lambda: _read(model, 1, tokens), model.device),
    }


def _speed(model: LanguageModel, settings: LMEvaluationSettings) -> dict[str, Any]:
    tokens, rows = _speed_tokens(model, settings), settings.speed_batch
    ids = _ids(model, rows, tokens + 1)

    def train() -> None:
        hidden, _ = model(ids[:, :-1])
        loss, _ = model.cross_entropy(hidden.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        model.zero_grad(set_to_none=True)

    def decode(batch: int) -> Callable[[], None]:
        cache = _read(model, batch, tokens - settings.decode_tokens)
        token = _ids(model, batch, 1)

        @torch.no_grad()
        def steps() -> None:
            past = cache
            for _ in range(settings.decode_tokens):
                hidden, past = model(token, cache=past)
                model.logits(hidden)

        return steps

    if tokens <= settings.decode_tokens:
        raise UserError(
            f"decode_tokens={settings.decode_tokens} leaves no prefill of {tokens} "
            "tokens: lower it."
        )
    calls = {
        "train": (train, rows * tokens),
        "prefill": (lambda: _read(model, rows, tokens), rows * tokens),
        "decode_1": (decode(1), settings.decode_tokens),
        "decode": (decode(rows), rows * settings.decode_tokens),
    }
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(True)
    try:
        rates: dict[str, Rate] = {
            part: measure_rate(call, count, settings.rounds, model.device)
            for part, (call, count) in calls.items()
        }
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {
        "rows": rows,
        "tokens": tokens,
        "tokens_per_second": {part: rate._asdict() for part, rate in rates.items()},
    }


@torch.no_grad()
def _read(model: LanguageModel, rows: int, tokens: int) -> LMCache:
    cache: LMCache = model(_ids(model, rows, tokens))[1]
    return cache


def _ids(model: LanguageModel, rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (rows, tokens)
    return torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)


def _speed_tokens(model: LanguageModel, settings: LMEvaluationSettings) -> int:
    return min(settings.speed_tokens, model.config.max_seq_len)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def language_model_table(result: dict[str, Any]) -> Table:
    """Return the table of a result: quality, memory and speed, and where they were measured."""
    quality, memory, speed = result["quality"], result["memory"], result["speed"]
    data, environment = result["data"], result["environment"]
    rows = [
        ("perplexity", f"{quality['perplexity']:.4g}"),
        ("bits per byte", f"{quality['bits_per_byte']:.4g}"),
        ("parameters", f"{result['model']['parameters']:,}"),
    ]
    rows += [
        (f"decode state of a sequence of {int(length):,} tokens", _size(size))
        for length, size in memory["state"].items()
    ]
    peak = memory["forward_peak"]
    where = f"forward of 1 x {memory['forward_tokens']:,} tokens, process at its peak"
    rows.append((where, "not measured" if peak is None else _size(peak)))
    shape = f"{speed['rows']} x {speed['tokens']:,}"
    titles = {
        "train": f"training (forward, backward) {shape}",
        "prefill": f"prefill {shape}",
        "decode_1": "decoding, 1 sequence",
        "decode": f"decoding, {speed['rows']} sequences",
    }
    for part, title in titles.items():
        rate = speed["tokens_per_second"][part]
        rows.append((title, f"{rate['median']:,.0f} tokens/s"))
    note = (
        f"{data['source']}: {data['documents']:,} documents, {quality['tokens']:,} tokens, sha256 "
        f"{data['sha256'][:16]}. {environment['processor']}, device {environment['device']}, "
        f"{environment['num_threads']} of {environment['num_cpus']} CPU threads, "
        f"{environment['dtype']}, torch {environment['torch']}. Medians of "
        f"{result['settings']['rounds']} rounds. Decoding equals the full forward to "
        f"{result['validation']['largest_difference']:.1g}."
    )
    return Table(f"Language model {result['model']['name']}", ("measure", "value"), rows, note)


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
