"""Synthetic tasks: rows, oracle and chance, learning, curricula; the same losses twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rxlm.data.mqar import IGNORED
from rxlm.data.synthetic_tasks import (
    DELIMITER,
    FIRST_SYMBOL,
    PAD,
    POP,
    PUSH,
    TASKS,
    SequenceTask,
    build_task,
)
from rxlm.errors import UserError
from rxlm.study.calibration import build, plan_model
from rxlm.study.comparing import compare_studies
from rxlm.study.objectives import TaskObjective, score_task
from rxlm.study.runner import Study
from rxlm.study.settings import TaskTraining, preset
from rxlm.study.training import tasks_of

VOCAB = 64
each_task = pytest.mark.parametrize("name", list(TASKS))


def make(name: str, size: int = 8) -> SequenceTask:
    return build_task(name, size, VOCAB)


def solve(name: str, row: list[int], place: int) -> int:
    """Answer as someone who reads ``row`` up to ``place`` and knows the rules."""
    seen = row[: place + 1]
    if name == "mqar":
        return seen[seen.index(seen[-1]) + 1]
    if name in ("copy", "palindrome"):
        ask = seen.index(DELIMITER)
        told = [token for token in seen[:ask] if token != PAD]
        return (told if name == "copy" else told[::-1])[place - ask]
    if name == "selective-copy":
        ask = seen.index(DELIMITER)
        return [token for token in seen[:ask] if token >= FIRST_SYMBOL][place - ask]
    if name == "stack":
        held: dict[int, list[int]] = {}
        for start in range(0, place - 1, 3):
            action, stack, symbol = seen[start : start + 3]
            if action == PUSH:
                held.setdefault(stack, []).append(symbol)
            else:
                assert action == POP
                held[stack].pop()
        return held[seen[-1]][-1]
    if name == "needle":
        first = seen.index(DELIMITER)
        ask = len(seen) - 1 - seen[::-1].index(DELIMITER)
        return seen[first + 1 + place - ask]
    assert name == "parity"
    return 1 + sum(token - 1 for token in seen) % 2


def oracle(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def predict(ids: Tensor, asked: Tensor) -> Tensor:
        rows, places = asked.nonzero(as_tuple=True)
        pairs = zip(rows.tolist(), places.tolist(), strict=True)
        return torch.tensor([solve(name, ids[row].tolist(), place) for row, place in pairs])

    return predict


@each_task
def test_oracle_scores_all_and_chance_scores_chance(name: str) -> None:
    """Catches a target that does not follow from what was read, a score that misses right
    answers, and a chance level that nobody has."""
    task = make(name)
    score = score_task(oracle(name), task, seed=3, num_rows=40)
    assert score.right_tokens == score.tokens > 0 and score.right_rows == score.rows == 40
    answers = sorted(set(task.rows(5, range(200)).targets[0].tolist()) - {IGNORED})
    assert answers
    generator = torch.Generator().manual_seed(0)
    known = np.unique(task.rows(5, range(400)).targets)
    known = known[known != IGNORED]

    def guess(ids: Tensor, asked: Tensor) -> Tensor:
        if name == "mqar":  # someone who guesses among the values that this row told
            rows, _ = asked.nonzero(as_tuple=True)
            picks = torch.randint(task.size, (len(rows),), generator=generator)
            return ids[rows, 1 + 2 * picks]
        count = int(asked.sum())
        return torch.from_numpy(known)[torch.randint(len(known), (count,), generator=generator)]

    found = score_task(guess, task, seed=4, num_rows=600)
    error = (task.chance * (1 - task.chance) / found.tokens) ** 0.5
    assert abs(found.accuracy - task.chance) < 5 * error


@each_task
def test_rows_depend_on_seed_and_position_only(name: str) -> None:
    """Catches a global generator, and rows that a batch changes."""
    task = make(name)
    np.random.seed(1)
    together = task.rows(7, range(6))
    np.random.seed(2)
    alone = task.rows(7, [4])
    np.testing.assert_array_equal(together.tokens[4], alone.tokens[0])
    np.testing.assert_array_equal(together.targets[4], alone.targets[0])
    assert not np.array_equal(together.tokens[0], task.rows(8, [0]).tokens[0])
    assert together.tokens.shape == (6, task.length)
    assert together.tokens.min() >= 0 and together.tokens.max() < VOCAB


@pytest.mark.parametrize("name", ["copy", "palindrome", "needle"])
def test_no_position_gives_an_answer_away(name: str) -> None:
    """Catches a fixed offset: what is asked must not always stand as far from its answer, or at
    the same place."""
    task = make(name)
    rows = task.rows(0, range(100))
    starts = (rows.tokens == DELIMITER).argmax(axis=1)
    assert len(set(starts.tolist())) > 4


def test_copying_is_learned(tmp_path: Path) -> None:
    """Catches a loss on what nobody can predict, targets that are shifted, and a curriculum that
    never moves on."""
    from rxlm.training.run_folder import RunFolder
    from rxlm.training.settings import TrainSettings
    from rxlm.training.trainer import Trainer

    settings = preset("smoke", params=30_000)
    training = TaskTraining(sizes=(2, 3), vocab_size=12, tokens_per_step=256)
    plan = plan_model(settings, "softmax", 12)
    objective = TaskObjective(build(settings, plan), tasks_of("copy", training), 0, 256)
    run = RunFolder.open(tmp_path / "run", stage=objective.name, config={})
    train = TrainSettings(steps=150, lr=1e-2, validate_every=50, best_metric="accuracy",
                          best_mode="max", early_stop_at=0.9, loggers=(), warmup_steps=10,
                          keep_best=0)  # fmt: skip
    result = Trainer(objective, train, run).train()
    assert result.metrics["validation/accuracy"] is not None
    assert result.metrics["validation/accuracy"] > 0.6
    assert objective.state_dict()["hardest"] == 1


def test_a_batch_is_a_function_of_step_and_curriculum() -> None:
    """Catches rows that a resumed run would see again, or other ones."""
    settings = preset("smoke")
    plan = plan_model(settings, "elu", 32)
    tasks = tasks_of("mqar", TaskTraining(sizes=(2, 4), vocab_size=32))
    objectives = [TaskObjective(build(settings, plan), tasks, 5, 128) for _ in range(2)]
    objectives[1].batch(0, 0)
    for objective in objectives:
        objective.load_state_dict({"hardest": 1, "recent": 0.5})
    batches = [objective.batch(9, 0) for objective in objectives]
    assert torch.equal(batches[0][0], batches[1][0])
    sizes = {objectives[0].batch(step, 0)[0].shape[1] for step in range(12)}
    assert len(sizes) == 1 or len(sizes) == 2
    seen = [tuple(row) for step in range(4) for row in objectives[0].batch(step, 0)[0].tolist()]
    assert len(set(seen)) == len(seen)


def test_same_seed_gives_identical_losses_twice(
    tmp_path: Path, tiny_study: Callable[..., Study]
) -> None:
    """Catches randomness outside the seeds, and a comparison that finds differences in noise (or
    finds none where there is one)."""
    stages = ("pretrain", "tasks")
    for name, changes in (("a", {}), ("b", {}), ("c", {"seeds": (0, 1)}), ("d", {"params": 9000})):
        tiny_study(tmp_path / name, stages=stages, tolerance=0.05, **changes).run()
    same = compare_studies(tmp_path / "a", tmp_path / "b")
    assert same["identical"] and same["compared"] == 8
    assert same["verdict"].startswith("No difference found")
    other = compare_studies(tmp_path / "a", tmp_path / "d")
    assert not other["identical"] and other["settings"]["params"] == [12_000, 9000]
    seeds = compare_studies(tmp_path / "c", tmp_path / "c")
    assert seeds["identical"]
    losses = [row for row in seeds["results"] if row["metric"] == "final_loss"]
    assert losses and all(row["seeds"] == [2, 2] for row in losses)


def test_two_real_variants_give_effect_sizes(
    tmp_path: Path, tiny_study: Callable[..., Study]
) -> None:
    """Catches a comparison that looks only for equal names."""
    for name in ("softmax", "elu"):
        study = tiny_study(tmp_path / name, stages=("pretrain",), attention=(name,), seeds=(0, 1))
        study.run()
    found = compare_studies(tmp_path / "softmax", tmp_path / "elu")
    (loss,) = [row for row in found["results"] if row["metric"] == "final_loss"]
    assert loss["mechanism"] == "ELU + 1 against softmax"
    assert loss["low"] <= loss["difference"] <= loss["high"] and loss["hedges_g"] is not None


def test_unknown_task_and_sizes_are_refused() -> None:
    """Catches a task that is left out silently."""
    with pytest.raises(UserError, match="task 'sorting' does not exist"):
        build_task("sorting", 3, VOCAB)
    with pytest.raises(UserError, match="symbols"):
        build_task("copy", 3, 4)
    with pytest.raises(UserError, match="size=0"):
        build_task("copy", 0, VOCAB)
    assert build_task("ar", 4, VOCAB).name == "mqar"
