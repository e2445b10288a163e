"""DeepSpeed: optimizer state (ZeRO 1), gradients (2) and weights (3) cut up between processes.

DeepSpeed is used for the cutting and the exchange alone. The optimizer, the learning rates, the
batch, clipping, logging and checkpoints are those of every other run: a checkpoint holds the whole
model and the whole optimizer state, and continues under any strategy and number of processes.
The optional package is imported when a run asks for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rxlm.errors import RunError, UserError
from rxlm.training.distributed.sharding import num_local_micro_batches
from rxlm.training.distributed.strategy import LossModule, Strategy
from rxlm.training.objective import StepOutput
from rxlm.training.optim import trainable_parameters
from rxlm.training.settings import TrainSettings

OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "fp16", "bf16",
)  # fmt: skip
"""What a DeepSpeed file must not say, since the recipe does."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Return the configuration in a JSON file of DeepSpeed.

    Raises:
        UserError: if it cannot be read, sets what the recipe sets, or asks for no ZeRO stage.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"deepspeed={path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"deepspeed={path}: expected a JSON object.")
    ours = sorted(set(OURS) & content.keys())
    if ours:
        raise UserError(
            f"deepspeed={path}: sets {', '.join(ours)}, which the recipe's section train decides "
            "(accumulation, grad_clip, lr, precision, ...). Leave it out of the file."
        )
    stage = content.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(
            f"deepspeed={path}: zero_optimization.stage is {stage}, expected 1, 2 or 3."
        )
    return content


def check_deepspeed(settings: TrainSettings) -> None:
    """Raise ``UserError`` if the settings ask for DeepSpeed and it or its file cannot be used."""
    if settings.strategy == "deepspeed":
        require_deepspeed()
        assert settings.deepspeed is not None, "checked by TrainSettings"
        read_deepspeed_file(settings.deepspeed)


def require_deepspeed() -> None:
    """Raise ``UserError`` unless DeepSpeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "strategy=deepspeed: the package is not installed. Use "
            "`pip install 'reactive-lm[deepspeed]'`, or strategy=ddp."
        )


class _OneModule(nn.Module):
    """The loss as a module without parts, which has all parameters itself.

    ZeRO 3 gathers the weights of a module when that begins, in all processes at once. Processes
    run different numbers of turns and buckets, so they could not do that layer by layer: the
    weights are whole during a pass, and cut up between passes.
    """

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        self._hidden = (loss,)  # in a tuple, so that it is not found as a part
        for name, param in loss.named_parameters():
            self.register_parameter(name.replace(".", "/"), param)

    def forward(self, batch: Any, step: int) -> StepOutput:
        output: StepOutput = self._hidden[0](batch, step)
        return output


class ZeRO(Strategy):
    """DeepSpeed's engine around the loss, as a strategy."""

    name = "deepspeed"

    def start(self) -> None:
        """Cut everything up; the weights of process 0 count."""
        assert self._settings.deepspeed is not None, "checked by TrainSettings"
        config = read_deepspeed_file(self._settings.deepspeed)
        self._stage: int = config["zero_optimization"]["stage"]
        deepspeed = _import_deepspeed(self._device)
        self._engine, *_ = deepspeed.initialize(
            model=_OneModule(self._loss),
            optimizer=self.optimizer,
            dist_init_required=False,
            config={
                "zero_allow_untested_optimizer": True,
                # torch's AdamW also where the state is kept on the CPU: nothing to compile.
                "zero_force_ds_cpu_optimizer": False,
                **config,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": num_local_micro_batches(
                    self._settings.accumulation, self.world.size
                ),
                "gradient_clipping": self._settings.grad_clip or 0.0,
            },
        )
        self._make_optimizer_state()

    def begin_update(self, batches: list[Any]) -> None:
        """Count the targets of all processes: DeepSpeed clips what it gets, so it divides first."""
        counts = [self.objective.count_targets(batch) for batch in batches]
        self._num_targets = sum(self.world.gather(sum(counts)))

    def compute(self, batch: Any, step: int, *, is_last: bool) -> StepOutput:
        """As :meth:`Strategy.compute`."""
        output: StepOutput = self._engine(batch, step)
        if output.num_targets == 0:
            raise RunError(
                f"step {step}: process {self.world.rank} has nothing to learn, and DeepSpeed needs "
                "a gradient from every process. Use a larger objective.dialogues, or strategy=ddp."
            )
        loss = output.loss * (output.num_targets * self.world.size / self._num_targets)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the micro-batch; the weights wait for the last one
        return output

    def drop_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """As :meth:`Strategy.drop_gradients`; DeepSpeed moves all parameters or none."""
        if parameters:
            raise UserError(
                "strategy=deepspeed: an update changes all parameters, but a phase trains only "
                "some of them. Leave `trains` out of objective.phases, or use strategy=ddp."
            )

    def finish_gradient(self, num_targets: int) -> Tensor:
        """Make the step as well: DeepSpeed does both at once, and skips bad gradients itself."""
        assert num_targets == self._num_targets, "count_targets differs from the loss"
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)

    def step(self) -> None:
        """Nothing is left to do."""

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """As :meth:`Strategy.whole_weights`; ZeRO 3 gathers them."""
        if self._stage != 3:
            yield
            return
        import deepspeed

        parameters = list(self.objective.trained_modules().parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As :meth:`Strategy.optimizer_tensors`: gathered one parameter after the other."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._flat_state()[0]["step"]
        found: dict[str, Tensor] = {}
        for name, param in trainable_parameters(self.objective.trained_modules()).items():
            moments = {key: safe_get_full_optimizer_state(param, key) for key in MOMENTS}
            if self.world.is_main:
                for key, value in moments.items():
                    found[f"{name}/{key}"] = value.detach().cpu().clone()
                found[f"{name}/step"] = step.detach().cpu().clone()
        return found

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`Strategy.load_optimizer_tensors`.

        Raises:
            UserError: when a saved tensor does not fit its parameter.
        """
        steps = [value for key, value in tensors.items() if key.endswith("/step")]
        for state in self._flat_state():
            # One counter for many parameters: those that trained longest have the right one.
            state["step"].fill_(max((float(step) for step in steps), default=0.0))
        for name, param in trainable_parameters(self.objective.trained_modules()).items():
            for key in MOMENTS:
                saved = tensors.get(f"{name}/{key}")
                if saved is not None:
                    self._set_moment(name, param, key, saved)

    def _set_moment(self, name: str, param: nn.Parameter, key: str, saved: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        shape = getattr(param, "ds_shape", param.shape)  # ZeRO 3 leaves a part in its place
        if tuple(saved.shape) != tuple(shape):
            raise UserError(
                f"optimizer state {name}/{key} has shape {tuple(saved.shape)}, but the parameter "
                f"has {tuple(shape)}: this checkpoint is of another model."
            )
        if self._stage != 3:
            safe_set_full_optimizer_state(param, saved.to(param.device), key)
            return
        # Parts are equally large: the last one is filled up with zeros.
        size = param.ds_tensor.ds_numel  # type: ignore[attr-defined]
        flat = nn.functional.pad(saved.flatten(), (0, size * self.world.size - saved.numel()))
        safe_set_local_optimizer_state(
            param, flat.narrow(0, size * self.world.rank, size).to(param.device), key
        )

    def _flat_state(self) -> list[dict[str, Tensor]]:
        """Return AdamW's state of each of DeepSpeed's flat pieces of this process."""
        return [self.optimizer.state[piece] for piece in self._flat_pieces()]

    def _make_optimizer_state(self) -> None:
        """Make AdamW's state now, as its first step would: a resumed run fills it in."""
        for state, piece in zip(self._flat_state(), self._flat_pieces(), strict=True):
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(piece.detach())
        if self._stage != 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_pieces(self) -> list[Tensor]:
        zero = self._engine.optimizer
        pieces: list[Tensor] = list(
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        return pieces


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, quietly, without compiling anything."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # A C++ extension for inference only, which would be compiled for a minute at first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
