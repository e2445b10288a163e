"""Recall over two interactions with the memory slots switched off: what the carried state holds.

    python benchmarks/two_turn_recall.py --quick                   # seconds, to see that it works
    python benchmarks/two_turn_recall.py                           # minutes; to runs/benchmarks
    python benchmarks/two_turn_recall.py --out docs/benchmarks     # ... to where the docs keep it

Pairs are told in interaction 1 and asked in interaction 2, by a decoder of MD-GDN layers without
memory cross-attention: interaction 2 can know of the first only through the state that such layers
carry over. The trained model is tested three times on the same rows: with the state carried, with
the state reset between the interactions, and with the state of another conversation. A control is
trained for as many steps with the state reset. Rows are those of multi-query associative recall,
cut where the pairs end (``rxlm/data/mqar.py``). Prints a table; writes two_turn_recall.md and
.json.

Shapes: B rows, T tokens, Q questions of all rows, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from mqar_training import TEST_SEED, Score, batch, score
from torch import Tensor

from rxlm.data.mqar import MqarSettings
from rxlm.errors import RunError, UserError
from rxlm.evaluation.statistics import wilson_interval
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import load_average, machine_name
from rxlm.rxt.components import RxTDecoder

Between = Literal["carried", "reset", "another's"]
"""What interaction 2 starts from."""
GOAL = 0.99


@dataclass(frozen=True)
class Settings:
    """Model, task and training.

    Attributes:
        pairs: told in interaction 1, in the order of the curriculum.
        vocab_size: half keys, half values.
        max_steps: of one training; the learning rate falls over its second half.
        unlock: share of answers at which the next number of pairs is added.
        target: share of answers to the most pairs, lately, at which training ends.
        questions: of each test.
    """

    pairs: tuple[int, ...] = (4, 8, 16)
    vocab_size: int = 128
    dim: int = 64
    num_heads: int = 1
    num_layers: int = 2
    learning_rate: float = 4e-3
    warm_up: int = 50
    tokens_per_step: int = 2048
    max_steps: int = 900
    unlock: float = 0.9
    target: float = 0.999
    questions: int = 8192

    def task(self, pairs: int) -> MqarSettings:
        return MqarSettings(pairs, 4 * pairs, self.vocab_size)


QUICK = Settings(
    pairs=(2,), vocab_size=16, dim=16, tokens_per_step=256, max_steps=20, questions=512
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/two_turn_recall.py", *typed])
    settings = QUICK if options.quick else Settings()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if options.steps is not None:
            settings = dataclasses.replace(settings, max_steps=options.steps)
        check(settings, options.seeds)
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(settings, options.seeds, command)
        text = json.dumps(found, indent=1) + "\n"
        (options.out / "two_turn_recall.json").write_text(text, encoding="utf-8")
        (options.out / "two_turn_recall.md").write_text(page(found), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    print(markdown_table(table(found)))
    print(f"written: {options.out / 'two_turn_recall'}.md, .json")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Recall over two interactions without slots.")
    add = parser.add_argument
    add("--quick", action="store_true", help="two pairs, a small model, few steps")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N")
    add("--steps", type=int, help="most steps of a training")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    return parser.parse_args(arguments)


def check(settings: Settings, seeds: Sequence[int]) -> None:
    """Refuse what cannot be run.

    Raises:
        UserError: with the remedy.
    """
    if settings.max_steps < 2 or min(seeds) < 0:
        raise UserError(
            f"--steps {settings.max_steps} --seeds {list(seeds)}: expected at least 2 steps and "
            "seeds from 0."
        )


def measure(settings: Settings, seeds: Sequence[int], command: str) -> dict[str, Any]:
    """Train and test all; return what the files hold."""
    before, results = load_average(), []
    conditions: tuple[Between, ...] = ("carried", "reset")
    for seed in seeds:
        steps = settings.max_steps
        for trained in conditions:
            limited = dataclasses.replace(settings, max_steps=steps)
            decoder, facts = train(limited, seed, trained)
            steps = facts["steps"]  # the control is given as many
            tests: tuple[Between, ...] = ("carried", "reset", "another's")
            for between in tests if trained == "carried" else ("reset",):
                results.append(
                    {
                        "seed": seed, "trained": trained, "tested": between, **facts,
                        "scores": {
                            pairs: test(decoder, settings, pairs, seed, between)
                            for pairs in settings.pairs
                        },
                    }
                )  # fmt: skip
    return {
        "command": command,
        "machine": machine_name("cpu"),
        "threads": 1,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load_average": [round(before, 1), round(load_average(), 1)],
        "settings": dataclasses.asdict(settings),
        "results": results,
    }


def make_decoder(settings: Settings) -> RxTDecoder:
    """Build the decoder: MD-GDN layers, no slots to read."""
    return RxTDecoder(
        {
            "num_layers": settings.num_layers,
            "vocab_size": settings.vocab_size,
            "embed_dim": settings.dim,
            "ff_dim": 2 * settings.dim,
            "att_heads": settings.num_heads,
            "seq_len": max(4 * pairs for pairs in settings.pairs),
            "tie_embeddings": True,
            "use_head_norm": True,
            "head_norm_type": "rms_norm",
            "skip_memory_cross_attention": True,
            "use_linear_self_attn": True,
            "linear_attn_type": "md_gdn",
            "linear_attn_use_short_conv": True,
        }
    )


def answer(
    decoder: RxTDecoder, tokens: Tensor, asked: Tensor, cut: int, between: Between
) -> Tensor:
    """Return the logits ``[Q, V]`` where ``asked``.

    Args:
        decoder: see :func:`make_decoder`.
        tokens: ``[B, T]``, both interactions.
        asked: bool ``[B, T]``, only in interaction 2.
        cut: tokens of interaction 1.
        between: what interaction 2 starts from; another's is that of the next row.
    """
    carried = None
    if between != "reset":
        _, cache = decoder(tokens[:, :cut])
        carried = decoder.carry(cache, None)
        assert carried is not None
        if between == "another's":
            carried = carried.select(torch.arange(1, tokens.shape[0] + 1) % tokens.shape[0])
    hidden, _ = decoder(tokens[:, cut:], carried=carried)
    return decoder.logits(hidden[asked[:, cut:]])


def train(settings: Settings, seed: int, between: Between) -> tuple[RxTDecoder, dict[str, Any]]:
    """Train one decoder with the loss of interaction 2; return it, and what it took.

    Raises:
        RunError: if the loss is no number any more.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    torch.manual_seed(seed)
    decoder = make_decoder(settings)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=settings.learning_rate, weight_decay=0.1, betas=(0.9, 0.98)
    )
    recent = [0.0] * len(settings.pairs)
    hardest = rows_seen = step = 0
    for step in range(1, settings.max_steps + 1):
        # The hardest so far in every other step, the others in turn between.
        chosen = hardest if step % 2 else (step // 2) % (hardest + 1)
        task = settings.task(settings.pairs[chosen])
        num_rows = max(1, settings.tokens_per_step // task.length)
        tokens, asked, answers = batch(task, seed, range(rows_seen, rows_seen + num_rows))
        rows_seen += num_rows
        logits = answer(decoder, tokens, asked, task.context_length, between)
        loss = F.cross_entropy(logits, answers)
        if not torch.isfinite(loss):
            raise RunError(f"trained {between}: the loss is {loss.item()} at step {step}.")
        left = min(1.0, 2.0 * (1.0 - step / settings.max_steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / settings.warm_up) * left
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        share = (logits.argmax(dim=-1) == answers).float().mean().item()
        recent[chosen] = 0.9 * recent[chosen] + 0.1 * share
        if step % 100 == 0:
            print(f"  {between}, step {step}: {recent[hardest]:.1%} of "
                  f"{settings.pairs[hardest]} pairs", file=sys.stderr)  # fmt: skip
        if hardest + 1 < len(recent) and recent[hardest] >= settings.unlock:
            hardest += 1
        elif recent[-1] >= settings.target:
            break
    facts = {
        "steps": step,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
    }
    return decoder.eval(), facts


def test(decoder: RxTDecoder, settings: Settings, pairs: int, seed: int, between: Between) -> Score:
    """Return how many questions about rows that training never had are answered."""
    task = settings.task(pairs)

    def predict(tokens: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad():
            logits = answer(decoder, tokens, asked, task.context_length, between)
        return logits.argmax(dim=-1)

    return score(predict, task, TEST_SEED + seed, settings.questions)


def table(found: dict[str, Any]) -> Table:
    """Accuracy by number of pairs."""
    pairs = found["settings"]["pairs"]
    body = []
    for row in found["results"]:
        cells = []
        for correct, asked in row["scores"].values():
            low, high = wilson_interval(correct, asked)
            cells.append(f"{100 * correct / asked:.2f} ({100 * low:.1f}-{100 * high:.1f})")
        body.append((row["tested"], row["trained"], f"{row['seed']}", *cells, f"{row['steps']:,}",
                     f"{row['cpu_seconds']:.0f}"))  # fmt: skip
    chance = f"{200 / found['settings']['vocab_size']:.2f}"
    body.append(("chance", "-", "-", *[chance] * len(pairs), "-", "-"))
    header = ("state when asked", "in training", "seed", *(f"{count} pairs" for count in pairs),
              "steps", "CPU seconds of training")  # fmt: skip
    return Table("Right answers in % (95 % interval)", header, body)


def page(found: dict[str, Any]) -> str:
    """Return the Markdown page."""
    settings = found["settings"]
    worst, best = 1.0, 0.0
    for row in found["results"]:
        shares = [correct / asked for correct, asked in row["scores"].values()]
        if row["tested"] == "carried":
            worst = min(worst, *shares)
        else:
            best = max(best, *shares)
    cpu = sum({(r["seed"], r["trained"]): r["cpu_seconds"] for r in found["results"]}.values())
    chance = 2 / settings["vocab_size"]
    asked = Table("", ("asked", "measured", "met"), [
        (f"carried state: at least {GOAL:.0%} at every number of pairs",
         f"least {100 * worst:.2f} %", "yes" if worst >= GOAL else "NO"),
        (f"no carried state: chance, {100 * chance:.2f} % (up to 1 point more)",
         f"at most {100 * best:.2f} %", "yes" if best <= chance + 0.01 else "NO"),
        ("under five minutes on one core", f"{cpu / 60:.1f} CPU minutes of training",
         "yes" if cpu < 300 else "NO"),
    ], prose=True)  # fmt: skip
    facts = Table("", ("", "this run"), [
        ("machine", f"{found['machine']}; one thread"),
        ("torch", found["torch"]),
        ("date", found["date"]),
        ("load average", "{} before, {} after".format(*found["load_average"])),
        ("model", f"{settings['num_layers']} layers, D = {settings['dim']}, heads: "
         f"{settings['num_heads']}, {found['results'][0]['parameters']:,} parameters"),
        ("vocabulary", f"{settings['vocab_size']}, half keys and half values"),
    ], prose=True)  # fmt: skip
    return f"""# Recall over two interactions without memory slots

Written by `{found["command"]}`; every figure below comes from that run, all values are in
[two_turn_recall.json](two_turn_recall.json). Pairs of key and value are told in interaction 1; in
interaction 2 every key is asked. The decoder (`RxTDecoder`, MD-GDN layers, no memory
cross-attention) reads each interaction by itself: of the first, the second has only the state that
MD-GDN carries over. The same trained model is tested with that state, without it, and with the
state of another conversation; a control is trained without it for as many steps.

{markdown_table(facts)}
{markdown_table(asked)}
## Right answers in % (95 % interval)

{markdown_table(table(found))}"""


if __name__ == "__main__":
    sys.exit(main())
