"""A toy objective for the tests of the Trainer: regression by a tiny network with dropout.

Not a test file. ``python toy.py RUN_FOLDER STEPS`` trains it slowly, for tests with signals.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rxlm.training.objective import Objective, StepOutput
from rxlm.training.rng import derive_generator
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer, TrainResult

POOL_SIZE = 256


class ToyObjective(Objective):
    """Regression on a pool of examples of which some are no targets.

    The knobs that tests turn are plain attributes: ``on_step`` (called at the end of a step),
    ``bad_steps`` (their loss is NaN), ``scores`` (what validation returns), ``growing`` (a
    curriculum that changes batches every second step).
    """

    name = "toy"

    def __init__(
        self,
        batch_size: int = 4,
        accumulation: int = 1,
        dropout: float = 0.3,
        width: int = 8,
        growing: bool = False,
    ) -> None:
        generator = derive_generator(7, "pool")
        self.inputs = torch.randn(POOL_SIZE, 3, generator=generator)
        self.is_target = torch.rand(POOL_SIZE, generator=generator) < 0.6
        self.batch_size, self.accumulation = batch_size, accumulation
        self.width, self.growing, self.level = width, growing, 0
        self.on_step: Callable[[int], None] = lambda step: None
        self.bad_steps: set[int] = set()
        self.scores: list[float] | None = None
        self.built: list[tuple[int, int]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = nn.Sequential(
                nn.Linear(3, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1)
            )

    def trained_modules(self) -> nn.Module:
        return self.model

    def batch(self, step: int, micro_step: int) -> dict[str, Tensor]:
        self.built.append((step, micro_step))
        first = (step * self.accumulation + micro_step) * self.batch_size
        rows = (torch.arange(first, first + self.batch_size) + 31 * self.level) % POOL_SIZE
        return {"inputs": self.inputs[rows], "is_target": self.is_target[rows]}

    def loss(self, batch: Any, step: int) -> StepOutput:
        inputs, is_target = batch["inputs"], batch["is_target"]
        error = (self.model(inputs)[:, 0] - inputs.sum(1).sin()) ** 2
        num_targets = int(is_target.sum())
        loss = (error * is_target).sum() / max(1, num_targets)
        if step in self.bad_steps:
            loss = loss * torch.nan
        metrics = {"error": error.detach().mean(), "never_measured": float("nan")}
        return StepOutput(loss, num_targets, metrics, len(inputs))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.growing and step % 2 == 1:
            self.level += 1
        self.on_step(step)

    def validate(self) -> dict[str, float]:
        if self.scores is not None:
            return {"loss": self.scores.pop(0)}
        # Draws from the global generators, as sampling an answer would.
        inputs = torch.randn(16, 3)
        error = (self.model(inputs)[:, 0] - inputs.sum(1).sin()) ** 2
        return {"loss": float(error.mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.level = state["level"]

    def architecture(self) -> dict[str, Any]:
        return {"model": {"width": self.width}}

    def save_model(self, directory: Path) -> None:
        save_file(self.model.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"width": self.width}))

    def load_model_weights(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))


def train(objective: Objective, folder: Path, **settings: Any) -> TrainResult:
    """Train into ``folder`` with fast defaults."""
    defaults: dict[str, Any] = {"steps": 6, "lr": 0.01, "threads": 1, "tensorboard": False}
    resolved = TrainSettings(**{**defaults, **settings})
    run = RunFolder.open(folder, objective.name, {"training": resolved.model_dump()})
    return Trainer(objective, resolved, run).train()


if __name__ == "__main__":
    toy = ToyObjective()

    def announce(step: int) -> None:
        print(f"step {step}", flush=True)
        time.sleep(0.02)

    toy.on_step = announce
    result = train(toy, Path(sys.argv[1]), steps=int(sys.argv[2]), schedule="constant", log_every=2)
    sys.exit(128 + result.signal if result.signal else 0)
