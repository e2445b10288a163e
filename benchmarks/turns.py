"""What a turn costs as a conversation grows: a model with memory beside a Llama that rereads.

    python benchmarks/turns.py --quick                # minutes, to see that it works
    python benchmarks/turns.py                        # turns 1 to 256; to runs/benchmarks
    python benchmarks/turns.py --out docs/benchmarks  # ... to where the docs keep it

Three contenders answer the same turns (so many tokens of a query, so many of an answer): ours,
which reads the query and its memory; a Llama of equal size that gets the whole conversation with
every request (stateless); and the same Llama whose server kept the keys and values of all earlier
turns (a prefix cache that never misses). Measured: time to the first token, time of the whole
answer, the memory update, and the bytes that a conversation needs between turns. Then: how much
later the first token of a turn comes when the memory update before it ran in the background and the
reader thought for longer than it takes. Random weights: what is written does not change what it
costs. The page is made in turns_report.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in linear_attention.py

import torch
from decode_contenders import count, llama_of, prompt_ids
from turns_report import AGAIN, CACHED, OURS, REREADS, Key, TurnResults, bars, write

from rxlm.errors import UserError
from rxlm.evaluation.timing import Call, interleave, load_average, machine_name
from rxlm.ops.sampling import GREEDY
from rxlm.rxt.alpha import RxTAlpha
from rxlm.rxt.conversation import ConversationState
from rxlm.rxt.generation import AnswerLimits
from rxlm.rxt.held import HeldConversation
from rxlm.rxt.reactive import ReactiveModel
from rxlm.training.described_model import described_model

STAGES = Path(__file__).resolve().parents[1] / "stages"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/turns.py", *typed])
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measure(options)
        write(results, options.out, command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for asked, measured, met in bars(results):
        print(f"{'met' if met else 'NOT MET':8} {asked}: {measured}")
    print(f"written: {options.out / 'turns'}.md, .csv, .png")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="nano, four numbers of turns, few rounds")
    add("--model", choices=("nano", "micro"), help="whose shape is used (default micro)")
    add("--turns", type=int, nargs="*", metavar="N", help="which turns are measured")
    add("--query", type=int, default=24, help="tokens of a query")
    add("--answer", type=int, default=24, help="tokens of an answer")
    add("--rounds", type=int, help="how often each is timed")
    add("--think-rounds", type=int, help="turns with a think time, of each kind")
    add("--budget", type=float, default=1800.0, help="seconds after which no round begins")
    add("--threads", type=int, default=1)
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the model")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    options = parser.parse_args(arguments)
    for name, quick, full in (
        ("model", "nano", "micro"),
        ("turns", [1, 4, 16, 64], [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        ("rounds", 3, 9),
        ("think_rounds", 10, 60),
    ):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def measure(options: argparse.Namespace) -> TurnResults:
    """Run everything that the options ask for."""
    torch.set_num_threads(options.threads)
    changes = ("model.decoder.seq_len=256", *options.set)
    config = described_model(STAGES / options.model, changes)
    torch.manual_seed(0)
    # RxTAlpha also for its held conversation; there is no text, so no tokenizer.
    model = RxTAlpha.from_config(config).eval()
    model.decoder.head_bias.data[config.tokenizer.eos_token_id] = -1e4
    llama = llama_of(model, count(model.decoder))
    results, load = TurnResults(), load_average()
    states = states_before(model, options)
    results.seconds = interleave(
        [
            *(group(model, llama, states[turn], turn, options, results) for turn in options.turns),
            growth_group(model, states, options),
        ],
        rounds=options.rounds,
        budget=options.budget,
        progress=progress,
    )
    progress("think time")
    results.think = after_thinking(model, options)
    results.facts = {
        "machine": machine_name("cpu"),
        "threads": str(options.threads),
        "model": f"stages/{options.model}, float32, random weights, {count(model.decoder):,} "
        f"parameters in the decoder, {count(model):,} in all",
        "Llama": f"{count(llama):,} parameters; same width, depth, heads and vocabulary",
        "a turn": f"{options.query} tokens of query, {options.answer} of answer",
        "versions": f"torch {torch.__version__}",
        "rounds": str(len(next(iter(results.seconds.values())))),
        "load average": f"{load:.1f} before, {load_average():.1f} after",
        "date": time.strftime("%Y-%m-%d"),
        "not measured": "quality: the Llama reads all that was said; GPUs",
    }
    return results


def states_before(
    model: ReactiveModel, options: argparse.Namespace
) -> dict[int, ConversationState]:
    """Talk through the conversation; return its state before each turn that is measured."""
    state, found = model.new_conversation(), {}
    for turn in range(1, max(options.turns) + 1):
        if turn in options.turns:
            found[turn] = state
        answers, state = model.generate(
            state, query(model, turn, options), GREEDY, max_new_tokens=options.answer
        )
        state = model.update_memory(state, [answers[0].turn])
        if turn % 32 == 0:
            progress(f"talked through {turn} turns")
    return found


def query(model: ReactiveModel, turn: int, options: argparse.Namespace) -> list[list[int]]:
    """Return the query of a turn; the [A] that follows it counts as one of its tokens."""
    ids: list[list[int]] = prompt_ids(
        1, options.query - 1, model.config.decoder.vocab_size
    ).tolist()
    ids[0][-1] = 20 + turn % 100
    return ids


def group(
    model: ReactiveModel,
    llama: Any,
    state: ConversationState,
    turn: int,
    options: argparse.Namespace,
    results: TurnResults,
) -> dict[Key, Call]:
    """Return what is compared at one turn, and note the bytes between turns."""
    prompts = query(model, turn, options)
    said = model.generate(state, prompts, GREEDY, max_new_tokens=options.answer).answers[0]
    history = (turn - 1) * (options.query + options.answer)
    vocab_size = model.config.decoder.vocab_size
    before = prompt_ids(1, history, vocab_size) if history else torch.zeros(1, 0, dtype=torch.long)
    asked = prompt_ids(1, options.query, vocab_size)
    cache = llama_cache(llama, before)
    results.state_bytes[turn, OURS] = sum(
        part.numel() * part.element_size() for part in state.tensors()
    )
    results.state_bytes[turn, CACHED] = cache_bytes(llama, history)
    results.state_bytes[turn, REREADS] = 0

    def ours(tokens: int) -> object:
        stream = model.stream(state, prompts, GREEDY, max_new_tokens=tokens)
        return [next(stream) for _ in range(tokens)]

    def cached(tokens: int) -> object:
        written = llama_answer(llama, asked, cache, tokens)
        cache.crop(-(options.query + tokens - 1))  # The last token was not read.
        return written

    def rereads(tokens: int) -> object:
        return llama_answer(llama, torch.cat((before, asked), dim=1), llama_cache(llama), tokens)

    calls: dict[Key, Call] = {}
    for name, answer in ((OURS, ours), (CACHED, cached), (REREADS, rereads)):
        calls[Key("first token", turn, name)] = partial(answer, 1)
        calls[Key("answer", turn, name)] = partial(answer, options.answer)
    calls[Key("update", turn, OURS)] = partial(model.update_memory, state, [said.turn])
    return calls


def growth_group(
    model: ReactiveModel, states: dict[int, ConversationState], options: argparse.Namespace
) -> dict[Key, Call]:
    """Return our first and last turn once more, to be run next to each other."""
    calls: dict[Key, Call] = {}
    for turn in (min(options.turns), max(options.turns)):
        state, prompts = states[turn], query(model, turn, options)
        said = model.generate(state, prompts, GREEDY, max_new_tokens=options.answer).answers[0]

        def answer(tokens: int, state: Any = state, prompts: Any = prompts) -> object:
            stream = model.stream(state, prompts, GREEDY, max_new_tokens=tokens)
            return [next(stream) for _ in range(tokens)]

        calls[Key("first token", turn, AGAIN)] = partial(answer, 1)
        calls[Key("answer", turn, AGAIN)] = partial(answer, options.answer)
        calls[Key("update", turn, AGAIN)] = partial(model.update_memory, state, [said.turn])
    return calls


@torch.inference_mode()
def llama_answer(llama: Any, ids: torch.Tensor, cache: Any, tokens: int) -> torch.Tensor:
    """Read ``ids`` after what is cached, then write so many tokens greedily."""
    written = []
    for _ in range(tokens):
        logits = llama(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        written.append(ids)
    return torch.cat(written, dim=1)


@torch.inference_mode()
def llama_cache(llama: Any, ids: torch.Tensor | None = None) -> Any:
    """Return a cache that holds ``ids``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=llama.config)
    if ids is not None:
        for part in ids.split(512, dim=1):
            if part.shape[1]:
                llama(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def cache_bytes(llama: Any, tokens: int) -> int:
    """Return the bytes of the keys and values of so many tokens."""
    config = llama.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * width * tokens * llama.dtype.itemsize


def after_thinking(model: RxTAlpha, options: argparse.Namespace) -> dict[str, list[float]]:
    """Time the first token after a think time: with the update in the background, and inline."""
    held = {
        name: HeldConversation(model, model.new_conversation()) for name in ("inline", "background")
    }
    limits = AnswerLimits(None, options.answer)
    samples: dict[str, list[float]] = {"inline": [], "background": []}
    update = 0.0
    for number in range(options.think_rounds + 1):
        for name in sorted(held, reverse=bool(number % 2)):
            conversation = held[name]
            prompt = query(model, number, options)[0]
            started = time.perf_counter()
            turn = conversation.begin(prompt, GREEDY, limits)
            steps = conversation.steps(turn)
            next(steps)
            if number:  # The first warms up, and has nothing before it.
                samples[name].append(time.perf_counter() - started)
            for _ in steps:
                pass
            started = time.perf_counter()
            if name == "inline":
                update = max(update, conversation.commit(turn).seconds)
            else:
                conversation.commit_in_background(turn)
            # Longer than the update, and the same for both.
            time.sleep(max(0.0, 3 * update - (time.perf_counter() - started)))
    return samples


def progress(message: str) -> None:
    """Tell on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
