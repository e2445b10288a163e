"""Many conversations on one model: throughput, time to the first token, memory of the process.

    python benchmarks/serving.py --quick                # a minute, to see that it works
    python benchmarks/serving.py                        # everything; to runs/benchmarks
    python benchmarks/serving.py --out docs/benchmarks  # ... to where the docs keep it

Talks to the service itself, not over HTTP: the clients are tasks of one event loop, each asks the
next session as soon as its answer is committed. *Serial* is the same service that may answer one
turn at a time. Writes a Markdown page, a figure, a CSV and a JSON file, and prints what was asked
and what came out. The page is made in serving_report.py.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import torch
from serving_report import BATCHED, SERIAL, Round, Sample, ServingResults, bars, write

from rxlm.errors import RunError, UserError
from rxlm.evaluation.timing import load_average, machine_name
from rxlm.ops.sampling import SamplingSettings
from rxlm.rxt.alpha import RxTAlpha
from rxlm.rxt.session_events import TextDelta, TurnEnd
from rxlm.serve.interface import ServeLimits, TurnRequest
from rxlm.serve.service import ConversationService
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.described_model import described_model

NANO = Path(__file__).resolve().parents[1] / "stages" / "nano"
QUERIES = (
    "Hi, my name is Ann and I live in Oslo.",
    "What is my name?",
    "I have a dog. Her name is Bella.",
    "Where do I live?",
    "Tell me something about the weather in the north, please.",
)
NUM_SESSIONS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/serving.py", *typed])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(options)
        write(results, options.out, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for asked, measured, met in bars(results):
        print(f"{'met' if met else 'NOT MET':8} {asked}: {measured}")
    print(f"written: {options.out / 'serving'}.md, .csv, .json, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="100 sessions, few turns and rounds")
    add("--model", type=Path, help="a model folder; default: nano's shape with random weights")
    add("--sessions", type=int, help=f"conversations (default {NUM_SESSIONS})")
    add("--clients", type=int, default=64, help="turns that are asked for at once")
    add("--tokens", type=int, default=24, help="tokens of an answer (the random model's never end)")
    add("--turns", type=int, help="turns of the long run (default 10000)")
    add("--rounds", type=int, help="comparisons of batched with serial (default 7)")
    add("--threads", type=int, default=1, help="of PyTorch; others are the store's and clients'")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    options = parser.parse_args(arguments)
    for name, quick, full in (
        ("sessions", 100, NUM_SESSIONS),
        ("turns", 600, 10_000),
        ("rounds", 2, 7),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def measure(options: argparse.Namespace) -> ServingResults:
    """Run everything that the options ask for."""
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    results, load = ServingResults(), load_average()
    with tempfile.TemporaryDirectory(prefix="rxlm-serving-") as folder:
        compare(model, Path(folder), options, results)
        run_long(model, Path(folder) / "long", options, results)
    results.facts = {
        "machine": machine_name("cpu"),
        "threads": f"{options.threads} of PyTorch",
        "model": str(options.model or "stages/nano, random weights, never ends an answer"),
        "parameters": f"{sum(part.numel() for part in model.parameters()):,}",
        "sessions": str(options.sessions),
        "clients": str(options.clients),
        "tokens of an answer": f"up to {options.tokens}",
        "versions": f"torch {torch.__version__}",
        "load average": f"{load:.1f} before, {load_average():.1f} after",
        "date": time.strftime("%Y-%m-%d"),
        "not measured": "HTTP; GPUs",
    }
    return results


def load_model(folder: Path | None) -> RxTAlpha:
    """Return a trained model, or one of nano's shape that never ends an answer."""
    if folder is not None:
        return RxTAlpha.from_pretrained(folder)
    tokenizer = train_tokenizer(QUERIES * 4, TokenizerTraining(vocab_size=400))
    config = described_model(NANO, (f"tokenizer.vocab_size={tokenizer.vocab_size}",))
    torch.manual_seed(0)
    model = RxTAlpha.from_config(config, tokenizer).eval()
    model.decoder.head_bias.data[tokenizer.eos_id] = -1e4
    return model


def compare(
    model: RxTAlpha, folder: Path, options: argparse.Namespace, results: ServingResults
) -> None:
    """Time as many turns batched and one by one, alternately."""
    services = {
        name: ConversationService(
            model, folder / str(rows), limits(options, rows), model_name="benchmark"
        )
        for name, rows in ((BATCHED, options.clients), (SERIAL, 1))
    }
    ids = {name: make_sessions(service, options) for name, service in services.items()}
    turns = {BATCHED: 4 * options.clients, SERIAL: options.clients}
    try:
        for number in range(options.rounds + 1):
            for name, service in services.items():
                samples, seconds = ask_many(service, ids[name], turns[name], options)
                if number:  # The first warms up.
                    results.rounds.append(Round(name, number, seconds, tuple(samples)))
            progress(f"round {number} of {options.rounds}")
    finally:
        for service in services.values():
            service.close()


def run_long(
    model: RxTAlpha, folder: Path, options: argparse.Namespace, results: ServingResults
) -> None:
    """Let a service answer many turns, and watch the memory of the process."""
    service = ConversationService(
        model, folder, limits(options, options.clients), model_name="benchmark"
    )
    with service:
        ids = make_sessions(service, options)
        done, part = 0, max(options.clients, options.turns // 20)
        while done < options.turns:
            samples, _ = ask_many(service, ids, part, options)
            done += part
            results.long += samples
            gc.collect()
            results.resident.append((done, resident_bytes()))
            progress(f"{done} of {options.turns} turns, {resident_bytes() / 2**20:.0f} MiB")
        stats = service.stats()
        results.state_files, results.state_bytes = stats.state_files, stats.state_bytes
        results.mean_rows = stats.step_rows / max(1, stats.steps)


def limits(options: argparse.Namespace, rows: int) -> ServeLimits:
    return ServeLimits(
        max_running=rows, max_queued=2 * options.clients, max_sessions=options.sessions + 1
    )


def make_sessions(service: ConversationService, options: argparse.Namespace) -> Iterator[str]:
    """Make the sessions; return their ids, over and over."""
    ids = [service.create(seed=index).session_id for index in range(options.sessions)]
    return itertools.cycle(ids)


def ask_many(
    service: ConversationService, ids: Iterator[str], turns: int, options: argparse.Namespace
) -> tuple[list[Sample], float]:
    """Ask so many turns, ``clients`` at a time; return what each took, and all of them."""
    numbers = iter(range(turns))
    samples: list[Sample] = []

    async def client() -> None:
        for number in numbers:
            settings = SamplingSettings(temperature=0.8 if number % 2 else 0.0)
            request = TurnRequest(
                QUERIES[number % len(QUERIES)], settings, max_tokens=options.tokens
            )
            session_id = next(ids)
            started = time.perf_counter()
            first = ended = 0.0
            handle = service.submit(session_id, request)
            async for event in handle.aevents():
                if isinstance(event, TextDelta) and not first:
                    first = time.perf_counter() - started
                elif isinstance(event, TurnEnd):
                    ended = time.perf_counter() - started
            tokens = handle.result().answer_tokens
            samples.append(Sample(first or ended, ended, time.perf_counter() - started, tokens))

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(options.clients)))

    started = time.perf_counter()
    asyncio.run(clients())
    return samples, time.perf_counter() - started


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RunError("/proc/self/status does not tell the memory of this process.")


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
