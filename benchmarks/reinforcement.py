"""What the two stages after memory-aware training change: reward, recall, preferences.

    python benchmarks/reinforcement.py --init runs/nano --quick    # seconds, to see that it works
    python benchmarks/reinforcement.py --init runs/nano            # half an hour on one CPU core
    python benchmarks/reinforcement.py --init runs/nano --out docs/benchmarks

Trains `stages/nano-reinforce` and `stages/nano-preference` from a finished model (runs that are
there already are taken as they are), and measures the three models on the same dialogues of the
test split: the reward of their own answers beside its floors and its ceiling, their recall, and how
often they hold the right one of two answers for likelier. Prints a table; writes reinforcement.md
and .json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from rxlm.data.conversation_source import open_conversations
from rxlm.errors import RunError, UserError
from rxlm.evaluation.recall import evaluate_recall
from rxlm.evaluation.recall_plan import RecallSettings
from rxlm.evaluation.recall_summary import pool
from rxlm.evaluation.tables import Table, markdown_table
from rxlm.evaluation.timing import load_average, machine_name
from rxlm.rxt.dialogues import TurnEncoder
from rxlm.rxt.generation import turn_limit
from rxlm.rxt.models import RxTAlpha
from rxlm.storage.model_folder import resolve_model_dir
from rxlm.training.objectives.memory_reinforcement import MemoryReinforcementObjective
from rxlm.training.objectives.preference import PreferenceObjective
from rxlm.training.recipes import (
    MemoryReinforcementRecipe,
    PreferenceRecipe,
    read_recipe,
)
from rxlm.training.stage import run_stage

STAGES = Path(__file__).resolve().parents[1] / "stages"
RECIPES = {
    "reinforced": STAGES / "nano-reinforce" / "60_memory_reinforcement.yaml",
    "preferred": STAGES / "nano-preference" / "60_preference.yaml",
}
ROWS = (
    ("reward", "reward of its own answers"),
    ("reward_of_reference", "... of the reference answers (ceiling)"),
    ("reward_zeroed", "... with a memory of zeros (floor)"),
    ("reward_of_other", "... of another dialogue's answers (floor)"),
    ("reward_of_copying", "... of its previous answer (floor)"),
    ("sampled_reward", "reward of answers drawn as in training"),
    ("sampled_accuracy", "questions right, answers drawn"),
    ("own_accuracy", "questions right, own answers in memory"),
    ("accuracy_recall", "facts recalled, reference answers in memory"),
    ("accuracy_unknown", "facts never told: says so"),
    ("accuracy_chat", "other answers right word for word"),
    ("loss", "loss of the reference answers"),
    ("preference_accuracy", "right answer likelier than the wrong one"),
    ("recall_test", "recall test: 4 facts, distances 1 to 8"),
    ("recall_zeroed", "... with a memory of zeros"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write, print; return the exit status."""
    options = parse(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/reinforcement.py", *typed])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = compare(options, command)
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        (options.out / "reinforcement.json").write_text(text, encoding="utf-8")
        (options.out / "reinforcement.md").write_text(page(found), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    print(markdown_table(table(found)))
    print(f"written: {options.out / 'reinforcement'}.md, .json")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="The stages after memory-aware training.")
    add = parser.add_argument
    add("--init", type=Path, required=True, help="a finished model, such as runs/nano")
    add("--work", type=Path, default=Path("runs"), help="folder that holds the runs")
    add("--dialogues", type=int, default=256, help="test dialogues")
    add("--quick", action="store_true", help="two steps of each stage, few dialogues")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder that is written to")
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train both stages and measure the three models."""
    before = load_average()
    start = resolve_model_dir(options.init)
    folders, steps = {"before": start}, {}
    for name, path in RECIPES.items():
        stage = read_recipe(path, overrides(options, start))
        assert isinstance(stage.recipe, MemoryReinforcementRecipe | PreferenceRecipe)
        steps[name] = stage.recipe.train.steps
        folder = options.work / path.parent.name / path.stem
        run_stage(stage, folder)
        folders[name] = resolve_model_dir(folder)
    count = 4 if options.quick else options.dialogues
    results = {name: measure(folder, start, count) for name, folder in folders.items()}
    return {
        "command": command,
        "machine": machine_name("cpu"),
        "threads": 1,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load_average": [round(before, 1), round(load_average(), 1)],
        "dialogues": count,
        "steps": steps,
        "results": results,
    }


def overrides(options: argparse.Namespace, start: Path) -> list[str]:
    """Return what is changed in the recipes."""
    found = [f"init_from={start}"]
    if options.quick:
        found += ["train.steps=2", "train.validate_every=2", "objective.validation_dialogues=2"]
    return found


def measure(folder: Path, start: Path, count: int) -> dict[str, float]:
    """Return all figures of a model.

    Args:
        folder: of the model.
        start: of the model that all began with: its embedding is that of the reward.
        count: test dialogues.
    """
    reinforced = read_recipe(RECIPES["reinforced"]).recipe
    preferred = read_recipe(RECIPES["preferred"]).recipe
    assert isinstance(reinforced, MemoryReinforcementRecipe)
    assert isinstance(preferred, PreferenceRecipe)
    source = open_conversations(reinforced.data, "test")
    model = RxTAlpha.from_pretrained(start)
    turns = TurnEncoder(model.require_tokenizer(), turn_limit(model))
    size = {"validation_dialogues": count}
    rewarded = MemoryReinforcementObjective(
        model, source, source, turns, reinforced.objective.model_copy(update=size), seed=0
    )
    model.load_state_dict(RxTAlpha.from_pretrained(folder).state_dict())
    model.eval()
    paired = PreferenceObjective(
        model, source, source, turns, preferred.objective.model_copy(update=size), seed=0
    )
    with torch.no_grad():
        found = {**paired.validate(), **rewarded.validate()}
    recall = RecallSettings(
        distances=(1, 2, 4, 8),
        facts=(4,),
        unseen=("none",),
        update_distances=(),
        unknown_distances=(),
        conditions=("memory", "zeroed"),
        free_running=False,
        seeds=(0,),
        dialogues=max(2, count // 2),
    )
    rows = evaluate_recall(model, recall).rows
    for name, condition in (("recall_test", "memory"), ("recall_zeroed", "zeroed")):
        found[name] = pool([row for row in rows if row["condition"] == condition]).mean
    return {name: found[name] for name, _ in ROWS}


def table(found: dict[str, Any]) -> Table:
    """Return what is printed."""
    names = list(found["results"])
    rows = [
        (title, *(f"{found['results'][name][key]:.4f}" for name in names)) for key, title in ROWS
    ]
    return Table("Before and after", ("", *names), rows)


def page(found: dict[str, Any]) -> str:
    """Return the page that is committed."""
    steps = ", ".join(f"{name} {count}" for name, count in found["steps"].items())
    return (
        "# Reinforcement and preferences\n\n"
        f"Of {found['dialogues']} built-in test dialogues of 12 turns; updates: {steps}. What the "
        "rows mean is in [Reinforcement](../reinforcement.md).\n\n"
        f"{markdown_table(table(found))}\n"
        f"{found['machine']}, {found['threads']} thread, torch {found['torch']}, "
        f"{found['date']}, load average {found['load_average'][0]} before and "
        f"{found['load_average'][1]} after.\n\n"
        f"```bash\n{found['command']}\n```\n"
    )


if __name__ == "__main__":
    sys.exit(main())
