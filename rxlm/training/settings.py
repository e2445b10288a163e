"""How a stage is trained: steps, optimizer, schedule, precision, cadence. No torch.

Not here: what is trained and on which data. Batch sizes, data seeds and curricula belong to the
objective of the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from rxlm.configuration import Config
from rxlm.errors import UserError
from rxlm.training.watch import WatchSettings

NO_EFFECT_ON_RESULT = frozenset(
    {
        "data.token_cache", "train.device", "train.threads", "train.prefetch",
        "train.prefetch_workers", "train.gradient_checkpointing", "train.compile", "train.strategy",
        "train.deepspeed", "train.log_every", "train.save_every", "train.keep_last",
        "train.keep_best", "train.loggers", "train.wandb_project", "train.trackio_project",
        "train.watch",
    }
)  # fmt: skip
"""Settings of a recipe, by dotted path, that say where and how a run is made, not what is trained.
"""


LoggerName = Literal["tensorboard", "wandb", "trackio"]


class TrainSettings(Config):
    """Settings of the Trainer. One step is one optimizer update."""

    steps: int = Field(gt=0)
    """Number of optimizer updates of the whole run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the global random generators (dropout); data order has its own seed."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the matrices of layers, with AdamW's learning rate and weight decay; AdamW
    for tables, gates, norms, biases and experts. Made for GPUs: its products are bf16, which most
    CPUs compute slowly. Not with DeepSpeed, which cuts matrices up."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's average of gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decoupled decay; matrices only (biases, norms and gates do not decay)."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; ``null`` = no clipping."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up: ``wsd`` = constant, then linear decay at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up; the peak is reached at update ``warmup_steps``."""
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last update divided by the peak (cosine and wsd)."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Fraction of ``steps`` that wsd spends decaying."""

    accumulation: int = Field(default=1, gt=0)
    """Micro-batches per update; they are weighted by their targets."""
    precision: Literal["fp32", "bf16", "bf16_pure"] = "fp32"
    """``bf16`` runs the forward pass under autocast, weights stay fp32; ``bf16_pure``: the weights
    and gradients are bf16, too, and the optimizer works on fp32 masters of them."""
    gradient_checkpointing: Literal["none", "layers", "turns", "both"] = "none"
    """What is computed again in the backward pass to save memory: what happens inside each layer,
    inside each turn (memory writes; turns of a decoder that carries a state), or both."""
    compile: bool = False
    """Have `torch.compile` translate the layers: faster steps, mostly on GPUs, after a minute or
    more at the start; results are equal up to rounding. Needs a C++ compiler on a CPU. Turns of a
    decoder that carries a state run uncompiled."""
    device: str = "auto"
    """``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda``, ``cuda:1``, ..."""
    strategy: Literal["auto", "ddp", "deepspeed"] = "auto"
    """How the processes of `torchrun` share an update: `ddp`, or `deepspeed` (cuts optimizer state,
    gradients or weights up); `auto`: `ddp` if there are several processes."""
    deepspeed: str | None = None
    """Configuration file of DeepSpeed (see stages/deepspeed), with `strategy: deepspeed`."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads of torch; ``null`` leaves torch's choice."""
    prefetch: int = Field(default=1, ge=0)
    """Micro-batches built ahead in the background; 0 = none."""
    prefetch_workers: int = Field(default=1, gt=0)
    """Background threads that build them; more than one need a larger ``prefetch``. Batches are
    the same, and come in the same order, whatever their number."""

    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of ``metrics.jsonl``."""
    validate_every: int | None = Field(default=None, gt=0)
    """Steps between validations (there is also one after the last step); ``null`` = never."""
    save_every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; ``null`` = only improvements, interruptions and the end."""
    keep_last: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = Field(default=1, ge=0)
    """How many of the best checkpoints stay; 0 = improvements are not saved specially."""
    best_metric: str = "loss"
    """The validation metric that says which checkpoint is best."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``best_metric`` is better."""
    early_stop_patience: int | None = Field(default=None, gt=0)
    """Stop after this many validations without a better ``best_metric``; ``null`` = never."""
    early_stop_at: float | None = None
    """Stop at the first validation whose ``best_metric`` is as good as this; ``null`` = never."""
    max_bad_steps: int = Field(default=10, ge=0)
    """How many steps in a row may be skipped for a non-finite loss or gradient."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Where metrics go besides ``metrics.jsonl``: ``tensorboard``, ``wandb``, ``trackio``."""
    watch: WatchSettings = WatchSettings()
    """What is measured beside the loss; costs time at log lines and validations only."""
    wandb_project: str | None = None
    """Project of Weights & Biases (default ``rxlm``); giving one switches ``wandb`` on."""
    trackio_project: str | None = None
    """Project of trackio (default ``rxlm``); giving one switches ``trackio`` on."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**_with_loggers(values))

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"betas={self.betas}: both must be in [0, 1), such as [0.9, 0.95].")
        if (self.strategy == "deepspeed") != (self.deepspeed is not None):
            raise UserError(
                f"strategy={self.strategy} with deepspeed={self.deepspeed}: strategy: deepspeed "
                "needs a file, such as deepspeed: stages/deepspeed/zero2.json, and no other "
                "strategy reads one."
            )
        if self.optimizer == "muon" and self.strategy == "deepspeed":
            raise UserError(
                "optimizer=muon with strategy=deepspeed: Muon needs whole matrices, and DeepSpeed "
                "cuts them up. Use optimizer=adamw, or strategy=ddp."
            )
        if self.precision == "bf16_pure" and self.strategy == "deepspeed":
            raise UserError(
                "precision=bf16_pure with strategy=deepspeed: DeepSpeed would cut up bf16 weights "
                "without their fp32 masters. Use precision=bf16 (products in bf16; ZeRO cuts up "
                "the fp32 weights), or strategy=ddp."
            )
        if self.prefetch_workers > max(1, self.prefetch):
            raise UserError(
                f"prefetch_workers={self.prefetch_workers} with prefetch={self.prefetch}: no more "
                f"than {self.prefetch} micro-batches are built at a time. Raise prefetch to at "
                f"least {self.prefetch_workers}, better twice that."
            )
        for name in ("early_stop_patience", "early_stop_at"):
            if getattr(self, name) is not None and self.validate_every is None:
                raise UserError(
                    f"{name}={getattr(self, name)} looks at validations, but validate_every is "
                    "null: set validate_every to a number of steps."
                )
        return self


def deciding_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values that decide the result: all but :data:`NO_EFFECT_ON_RESULT`."""
    kept: dict[str, Any] = {}
    for section, value in values.items():
        if isinstance(value, Mapping):
            kept[section] = {
                key: item
                for key, item in value.items()
                if f"{section}.{key}" not in NO_EFFECT_ON_RESULT
            }
        else:
            kept[section] = value
    return kept


def _with_loggers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the loggers whose project is given; read ``tensorboard: false`` of older recipes."""
    known = dict(values)
    loggers = known.get("loggers", TrainSettings.model_fields["loggers"].default)
    if not isinstance(loggers, list | tuple):
        return known
    loggers = list(loggers)
    if known.pop("tensorboard", True) is False:
        loggers = [name for name in loggers if name != "tensorboard"]
    for name in ("wandb", "trackio"):
        if known.get(f"{name}_project") is not None and name not in loggers:
            loggers.append(name)
    return {**known, "loggers": loggers}
