"""What training costs: tokens a second by stage and size, where the time goes, peak memory.

    python benchmarks/training.py --quick                    # nano only, few steps
    python benchmarks/training.py --out docs/benchmarks      # replaces the committed page
    python benchmarks/training.py --sizes mini --keep ...    # replaces some of its rows

Not here: how well anything is learned (the recipes in ``stages/`` say that).
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from rxlm.data import DialogueGenerator, GeneratedConversations, conversation_texts
from rxlm.evaluation.timing import load_average, machine_name, quartiles
from rxlm.lm.config import LMConfig
from rxlm.lm.language_model import LanguageModel
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.models import RxTAlpha
from rxlm.tokenization import Tokenizer, TokenizerTraining, train_tokenizer
from rxlm.training.described_model import described_model
from rxlm.training.distributed.strategy import scale_and_clip
from rxlm.training.held_bytes import peak_of
from rxlm.training.objective import Objective
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.language_modeling import LMObjective, LMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)
from rxlm.training.objectives.row_windows import TextRows
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.optim import build_optimizer
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer
from rxlm.training.watching.utilization import count_forward, measured_peak

STAGES = Path(__file__).resolve().parents[1] / "stages"
SIZES = ("nano", "micro", "mini")
NAMES = ("lm", "joint_lm", "sft", "memory_pretraining", "memory_aware")
PARTS = ("data", "forward", "backward", "optimizer")
CHECKPOINTING = ("none", "layers", "turns", "both")
COLOURS = ("#E69F00", "#0072B2", "#56B4E9", "#009E73")


class Row(NamedTuple):
    """One stage at one size; seconds are medians of an update."""

    size: str
    stage: str
    parameters: int
    tokens: int
    data: float
    forward: float
    backward: float
    optimizer: float
    tokens_per_second: float
    mfu: float
    loader_over_model: float
    trainer_over_bare: float
    peak_megabytes: dict[str, float]


def build(size: str, stage: str, tokenizer: Tokenizer, dialogues: int, turns: int) -> Objective:
    """Return a stage with new weights."""
    torch.manual_seed(0)
    generator = DialogueGenerator()
    if stage == "lm":
        wide = {"nano": (64, 2), "micro": (128, 6), "mini": (256, 8)}[size]
        model = LanguageModel(
            LMConfig(
                vocab_size=tokenizer.vocab_size, dim=wide[0], depth=wide[1], num_heads=4,
                ff_dim=2 * wide[0], max_seq_len=256,
            ),
            tokenizer,
        )  # fmt: skip
        texts = list(conversation_texts(generator.conversation(i, turns) for i in range(200)))
        rows = TextRows(texts, tokenizer, 256)
        return LMObjective(model, rows, rows, LMSettings(batch_size=2 * dialogues))
    vocabulary = f"model.decoder.vocab_size={tokenizer.vocab_size}"
    network = RxTAlpha.from_config(described_model(STAGES / size, [vocabulary]), tokenizer)
    common: tuple[Any, ...] = (
        network,
        GeneratedConversations(generator, "train"),
        GeneratedConversations(generator, "valid"),
        TurnEncoder(tokenizer, turn_limit(network)),
    )
    batch = {"turns": turns, "dialogues": dialogues}
    if stage == "joint_lm":
        return JointLMObjective(*common, JointLMSettings(**batch), seed=0)
    if stage == "sft":
        return SFTObjective(*common, SFTSettings(**batch), seed=0)
    if stage == "memory_pretraining":
        return MemoryPretrainingObjective(*common, MemoryPretrainingSettings(**batch), seed=0)
    settings = MemoryAwareSettings(phases=(Phase(**batch),))
    return MemoryAwareObjective(*common, settings, seed=0)


def bare_steps(objective: Objective, settings: TrainSettings, steps: int) -> dict[str, list[float]]:
    """Train without the Trainer; return the seconds of each part of each update."""
    optimizer = build_optimizer(
        objective.trained_modules(), objective.parameter_groups(settings), settings
    )
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    objective.set_training_mode()
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(steps):
        times = [time.perf_counter()]
        batch = objective.batch(step, 0)
        times.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        output = objective.loss(batch, step)
        times.append(time.perf_counter())
        (output.loss * output.num_targets).backward()
        times.append(time.perf_counter())
        scale_and_clip(parameters, 1 / output.num_targets, settings.grad_clip)
        optimizer.step()
        float(output.loss.detach())
        times.append(time.perf_counter())
        for part, begin, end in zip(PARTS, times, times[1:], strict=False):
            seconds[part].append(end - begin)
    return seconds


def trainer_seconds(objective: Objective, settings: TrainSettings) -> float:
    """Return the wall time of a run, its folder, logs and checkpoint included."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.open(Path(folder, "run"), objective.name, {})
        begin = time.perf_counter()
        Trainer(objective, settings, run).train()
        return time.perf_counter() - begin


def trainer_overhead(make: Any, steps: int, rounds: int) -> float:
    """Return the time of the Trainer's updates over that of bare ones, a median over rounds.

    Setting up and the final checkpoint drop out: a run of ``steps`` is taken off one of three times
    as many. Both build batches in the calling thread.
    """
    ratios = []
    common: dict[str, Any] = {
        "prefetch": 0, "log_every": max(1, steps // 2), "loggers": [], "schedule": "constant",
    }  # fmt: skip
    for _ in range(rounds):
        wall = [
            trainer_seconds(make(), TrainSettings(steps=count, **common))
            for count in (steps, 3 * steps)
        ]
        parts = bare_steps(make(), TrainSettings(steps=1), 3 * steps)
        bare = sum(sum(values[steps:]) for values in parts.values())
        ratios.append((wall[1] - wall[0]) / bare)
    return statistics.median(ratios)


def checkpointing_peaks(make: Any, stage: str) -> dict[str, float]:
    """Return MB of a forward and backward pass under each setting."""
    if stage == "lm":
        return {}
    device = torch.device("cpu")
    peaks = {}
    for setting in CHECKPOINTING:
        if setting in ("turns", "both") and stage in ("joint_lm", "sft"):
            continue  # without an effect: nothing is written from turn to turn
        objective = make()
        objective.set_gradient_checkpointing(
            layers=setting in ("layers", "both"), turns=setting in ("turns", "both")
        )
        objective.set_training_mode()
        batch = objective.batch(0, 0)

        def passes(objective: Objective = objective, batch: Any = batch) -> None:
            objective.loss(batch, 0).loss.backward()

        peaks[setting] = peak_of(passes, device) / 1e6
    return peaks


def measure(size: str, stage: str, tokenizer: Tokenizer, options: argparse.Namespace) -> Row:
    """Measure one stage at one size."""

    def make() -> Objective:
        return build(size, stage, tokenizer, options.dialogues, options.turns)

    objective = make()
    settings = TrainSettings(steps=1)
    seconds = bare_steps(objective, settings, options.steps + 1)
    middle = {part: quartiles(values[1:]).median for part, values in seconds.items()}
    device = torch.device("cpu")
    counted = count_forward(objective, objective.batch(0, 0), 0, device, "fp32")
    computing = middle["forward"] + middle["backward"] + middle["optimizer"]
    speed = counted.num_tokens / computing
    peak = measured_peak(device, "fp32", torch.get_num_threads())
    small = size == "nano" and not options.no_overhead
    return Row(
        size=size,
        stage=stage,
        parameters=sum(item.numel() for item in objective.trained_modules().parameters()),
        tokens=counted.num_tokens,
        **middle,
        tokens_per_second=speed,
        mfu=counted.per_token * speed / peak.flops_per_second,
        loader_over_model=computing / middle["data"],
        trainer_over_bare=(
            trainer_overhead(make, options.steps, options.rounds) if small else float("nan")
        ),
        peak_megabytes=checkpointing_peaks(make, stage),
    )


def read_csv(path: Path) -> list[Row]:
    """Return the rows of an earlier run."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            numbers = {name: float(line[name]) for name in Row._fields[4:-1]}
            peaks = {name: line[f"peak_megabytes_{name}"] for name in CHECKPOINTING}
            rows.append(
                Row(
                    line["size"],
                    line["stage"],
                    int(line["parameters"]),
                    int(line["tokens"]),
                    **numbers,
                    peak_megabytes={name: float(value) for name, value in peaks.items() if value},
                )
            )
    return rows


def write_csv(rows: list[Row], path: Path) -> None:
    """Write all figures."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [name for name in Row._fields if name != "peak_megabytes"]
        writer.writerow([*fields, *(f"peak_megabytes_{name}" for name in CHECKPOINTING)])
        for row in rows:
            values = [getattr(row, name) for name in fields]
            shown = [f"{value:.6g}" if isinstance(value, float) else value for value in values]
            peaks = [row.peak_megabytes.get(name) for name in CHECKPOINTING]
            writer.writerow([*shown, *("" if value is None else f"{value:.1f}" for value in peaks)])


def write_figure(rows: list[Row], path: Path) -> None:
    """Draw where the time of an update goes."""
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.size} {row.stage}" for row in rows]
    left = [0.0] * len(rows)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        shares = [
            100 * getattr(row, part) / sum(getattr(row, name) for name in PARTS) for row in rows
        ]
        axes.barh(names, shares, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("share of an update (%)")
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, facecolor="white")


def page(rows: list[Row], command: str) -> str:
    """Return the page in Markdown."""
    lines = [
        "# What training costs",
        "",
        f"Written by `{command}`: {machine_name('cpu')}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), fp32; load average {load_average():.1f} at the end. "
        "Medians. The model is new, the data are the built-in dialogues. With `--keep`, rows that "
        "a run does not measure are those of earlier runs.",
        "",
        "![Where the time of an update goes](training.png)",
        "",
        "| size | stage | parameters | tokens an update | tokens/s | MFU | data ms | forward ms "
        "| backward ms | optimizer ms | loader / model |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = " | ".join(f"{1000 * getattr(row, part):.1f}" for part in PARTS)
        lines.append(
            f"| {row.size} | {row.stage} | {row.parameters:,} | {row.tokens:,} "
            f"| {row.tokens_per_second:,.0f} | {row.mfu:.1%} | {times} "
            f"| {row.loader_over_model:.1f} x |"
        )
    lines += [
        "",
        "Tokens/s are those of forward pass, backward pass and optimizer. *loader / model*: how "
        "many times faster batches are built than used (goal: 10). *MFU*: see "
        "[Watching a run](../watching.md).",
        "",
        "## The Trainer beside a bare loop",
        "",
        "Time of an update in the Trainer (logging, metrics, checks for bad numbers) over that of "
        "the same update in a plain loop, both building batches in line; median over rounds "
        "(goal: at most 1.05). The share is largest for the smallest model.",
        "",
        "| size | stage | Trainer / bare loop |",
        "|---|---|---:|",
        *(
            f"| {row.size} | {row.stage} | {row.trainer_over_bare:.3f} |"
            for row in rows
            if row.trainer_over_bare == row.trainer_over_bare
        ),
        "",
        "## Peak memory with gradient checkpointing",
        "",
        "MB that a forward and backward pass holds at its highest point, on top of weights and "
        "optimizer (tensors; what an operator takes for itself is not counted).",
        "",
        "| size | stage | none | layers | turns | both |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.peak_megabytes:
            peaks = (row.peak_megabytes.get(name) for name in CHECKPOINTING)
            shown = " | ".join("-" if value is None else f"{value:,.0f}" for value in peaks)
            lines.append(f"| {row.size} | {row.stage} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--steps", type=int, default=10, help="measured updates")
    parser.add_argument("--rounds", type=int, default=5, help="of the Trainer beside a bare loop")
    parser.add_argument("--dialogues", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-overhead", action="store_true", help="leave the Trainer out")
    parser.add_argument(
        "--keep", action="store_true", help="keep the other rows of an earlier run in --out"
    )
    parser.add_argument("--quick", action="store_true", help="nano, 3 updates, 1 round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.steps, options.rounds = ["nano"], 3, 1
    torch.set_num_threads(options.threads)
    generator = DialogueGenerator()
    texts = conversation_texts(generator.conversation(index, 8) for index in range(300))
    tokenizer = train_tokenizer(texts, TokenizerTraining(vocab_size=2048))
    rows: dict[tuple[str, str], Row] = {}
    if options.keep:
        rows = {row[:2]: row for row in read_csv(options.out / "training.csv")}
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "benchmarks/training.py", *sys.argv[1:]])
    for size in options.sizes:
        for stage in options.stages:
            row = measure(size, stage, tokenizer, options)
            rows[size, stage] = row
            print(f"{size} {stage}: {row.tokens_per_second:,.0f} tokens/s", flush=True)
            # After each row, so that a run that is stopped leaves what it has measured.
            found = sorted(
                rows.values(), key=lambda row: (SIZES.index(row.size), NAMES.index(row.stage))
            )
            write_csv(found, options.out / "training.csv")
            (options.out / "training.md").write_text(page(found, command), encoding="utf-8")
            write_figure(found, options.out / "training.png")


if __name__ == "__main__":
    main()
