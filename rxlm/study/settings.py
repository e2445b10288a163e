"""What a study is: which mechanisms, how large, how long, on what. No torch.

Presets: ``smoke`` (under a minute, every kind of file), ``cpu`` (under an hour on two cores),
``gpu``, ``paper``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from rxlm.configuration import Config
from rxlm.errors import UserError

Stage = Literal[
    "gates", "train", "prefill", "decode", "op", "memory", "scale", "profile", "pretrain", "tasks"
]
STAGES: tuple[Stage, ...] = (
    "gates",
    "train",
    "prefill",
    "decode",
    "op",
    "memory",
    "scale",
    "profile",
    "pretrain",
    "tasks",
)
"""In the order in which they are measured; timing comes first, while nothing else runs."""
PresetName = Literal["smoke", "cpu", "gpu", "paper"]


class TimingSettings(Config):
    """How times are measured: interleaved rounds, as many as it takes, within limits."""

    rounds: PositiveInt = 15
    """Most rounds of each comparison."""
    fewest_rounds: PositiveInt = 5
    """Fewest rounds."""
    target_spread: float = Field(default=0.05, gt=0)
    """Rounds end when the quartiles of every call lie within this share of its median."""
    group_seconds: float = Field(default=30.0, gt=0)
    """After which no further round of a comparison begins."""
    call_seconds: float = Field(default=20.0, gt=0)
    """A call whose first run is longer is not repeated; its row says so."""


class TaskTraining(Config):
    """How a task is learned: a curriculum of sizes, one run."""

    sizes: tuple[PositiveInt, ...] = ()
    """Sizes, the easy ones first; empty: those of the task's table."""
    vocab_size: PositiveInt = 256
    """Token ids."""
    steps: PositiveInt = 800
    """Most updates."""
    tokens_per_step: PositiveInt = 2048
    """Tokens of an update, whatever the length of its rows."""
    learning_rates: tuple[float, ...] = (4e-3,)
    """Peaks that are tried; the best by validation counts, all are reported."""
    validate_every: PositiveInt = 50
    """Updates between validations."""
    test_rows: PositiveInt = 512
    """Rows of each size in the final test."""
    stop_at: float = Field(default=0.99, gt=0, le=1)
    """Share of right answers, of the worst size of a validation, at which training ends."""


class TextTraining(Config):
    """How a language model is pretrained."""

    data: str | None = None
    """Text: a file, folder or glob of .txt, .jsonl or .parquet with a field ``text``; with
    ``.train.`` in a name, the ``.valid.`` file beside it is for validation. None: the bundled
    excerpt."""
    max_bytes: PositiveInt | None = None
    """Read at most so much of each split."""
    tokens: Literal["char", "bpe"] = "char"
    """One token a character, or byte-level BPE trained on the training split."""
    vocab_size: PositiveInt = 5000
    """Most token ids."""
    seq_len: PositiveInt = 256
    """Tokens of a row."""
    batch_tokens: PositiveInt = 4096
    """Tokens of an update."""
    steps: PositiveInt = 600
    """Updates."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Its peak."""
    validate_every: PositiveInt = 100
    """Updates between validations."""
    validation_tokens: PositiveInt = 32768
    """Tokens of a validation, the first ones."""


class StudySettings(Config):
    """Everything that decides the result of a study."""

    preset: str = "cpu"
    """The preset that it began with."""
    stages: tuple[Stage, ...] = STAGES
    """What is measured."""
    attention: tuple[str, ...] = ("softmax", "gla", "deltanet", "gated_deltanet", "kda")
    """Mechanisms, keys of ``rxlm.nn.mixers.MIXERS``; ratios are to ``baseline``."""
    baseline: str = "softmax"
    """What the others are compared with, if it is among them."""
    plugins: tuple[str, ...] = ()
    """Python files (or modules) that register more mechanisms and tasks."""
    params: PositiveInt = 400_000
    """Parameters of every model, embeddings left out."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Share of ``params`` by which a model may differ."""
    depth: PositiveInt = 2
    """Layers."""
    dim: PositiveInt | None = None
    """Width; None: so that feed-forward networks are about 8/3 as wide as the model."""
    head_dim: PositiveInt = 32
    """Width of a head."""
    window: PositiveInt = 64
    """Tokens that window attention sees."""
    conv_size: PositiveInt = 4
    """Tokens of the short convolutions."""
    equal_convolution: bool = True
    """Whether mechanisms that bring no short convolution get one of the same width in front."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of trainings."""
    device: str = "cpu"
    """Where it is measured; ``auto``: CUDA if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations when timing; trainings in bfloat16 use autocast."""
    backend: Literal["auto", "torch", "fla"] = "auto"
    """Who computes linear attention."""
    strict_backend: bool = False
    """Whether a backend that cannot run is an error instead of a row that says so."""
    threads: PositiveInt | None = None
    """CPU threads when timing; None: as torch chooses."""
    processes: PositiveInt = 2
    """Trainings at a time, one CPU thread each (one at a time on a GPU)."""
    seq_lens: tuple[PositiveInt, ...] = (128, 256, 512, 1024)
    """Lengths of rows in training steps."""
    batch_tokens: PositiveInt = 2048
    """Tokens of a training step, whatever the length of its rows."""
    contexts: tuple[PositiveInt, ...] = (128, 512, 2048)
    """Lengths of prefills, and of what a decoding step continues."""
    op_lens: tuple[PositiveInt, ...] = (256, 512, 1024, 2048)
    """Lengths at which the operator alone is measured."""
    memory_lens: tuple[PositiveInt, ...] = (256, 512, 1024, 2048)
    """Lengths at which memory is measured."""
    memory_limit_mb: float | None = Field(default=None, gt=0)
    """Most MB that a memory measurement may take; more is an outcome ("oom"), not an error."""
    scale_params: tuple[PositiveInt, ...] = (250_000, 1_000_000)
    """Sizes of the scaling curve."""
    scale_tolerance: float = Field(default=0.02, gt=0, lt=1)
    """As ``tolerance``, on the scaling curve."""
    profile_len: PositiveInt = 256
    """Tokens of the row that is profiled."""
    tasks: dict[str, TaskTraining] = Field(default_factory=dict)
    """Tasks, keys of ``rxlm.data.synthetic_tasks.TASKS``, and how each is learned."""
    text: TextTraining = TextTraining()
    """Pretraining."""
    timing: TimingSettings = TimingSettings()
    """Times."""
    time_budget: float | None = Field(default=None, gt=0)
    """Seconds after which no further point begins; its row says so."""

    @field_validator("attention", "seeds")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"{list(value)}: give at least one, each once")
        return value

    @field_validator("seq_lens", "contexts", "op_lens", "memory_lens", "scale_params")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))


_ALL = (
    "softmax",
    "local",
    "elu",
    "taylor",
    "gla",
    "deltanet",
    "gated_deltanet",
    "kda",
)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "attention": ("softmax", "elu", "gated_deltanet"),
        "params": 30_000,
        "head_dim": 16,
        "window": 16,
        "tolerance": 0.01,
        "seq_lens": (16, 32, 64),
        "batch_tokens": 64,
        "contexts": (16, 32, 64),
        "op_lens": (32, 64, 128, 256),
        "memory_lens": (32, 64, 128),
        "scale_params": (20_000, 40_000),
        "profile_len": 64,
        "processes": 1,
        "threads": 1,
        "timing": {"rounds": 3, "fewest_rounds": 3, "group_seconds": 1.0},
        "text": {
            "seq_len": 64,
            "batch_tokens": 256,
            "steps": 20,
            "validate_every": 10,
            "validation_tokens": 1024,
            "vocab_size": 80,
        },
        "tasks": {
            "mqar": {
                "sizes": (2, 4),
                "vocab_size": 32,
                "steps": 20,
                "tokens_per_step": 256,
                "validate_every": 10,
                "test_rows": 32,
            },
            "copy": {
                "sizes": (3,),
                "vocab_size": 16,
                "steps": 10,
                "tokens_per_step": 128,
                "validate_every": 10,
                "test_rows": 32,
            },
        },
    },
    "cpu": {
        "attention": _ALL,
        "seeds": (0, 1, 2),
        "threads": 1,
        "params": 100_000,
        "head_dim": 64,
        "seq_lens": (128, 256, 512, 1024, 2048),
        "contexts": (64, 256, 1024, 4096),
        "op_lens": (256, 512, 1024, 2048, 4096),
        "memory_lens": (256, 512, 1024, 2048, 4096),
        "scale_params": (100_000, 250_000, 1_000_000, 2_500_000),
        "timing": {"rounds": 15, "fewest_rounds": 5, "group_seconds": 12.0},
        "text": {
            "data": "$RXLM_DATA/text/books.train.txt.gz",
            "max_bytes": 4_000_000,
            "steps": 400,
            "batch_tokens": 2048,
            "validate_every": 100,
            "vocab_size": 256,
        },
        "tasks": {
            "mqar": {"steps": 800, "learning_rates": (4e-3,)},
            "copy": {"steps": 300, "vocab_size": 64, "sizes": (5, 10, 20, 30, 50)},
        },
    },
    "gpu": {
        "attention": (*_ALL, "based"),
        "seeds": (0, 1, 2),
        "device": "cuda",
        "dtype": "bfloat16",
        "params": 5_000_000,
        "depth": 4,
        "head_dim": 64,
        "window": 256,
        "processes": 1,
        "batch_tokens": 32768,
        "seq_lens": (512, 1024, 2048, 4096, 8192, 16384),
        "contexts": (1024, 4096, 16384, 65536),
        "op_lens": (1024, 2048, 4096, 8192, 16384, 32768),
        "memory_lens": (1024, 2048, 4096, 8192, 16384, 32768),
        "scale_params": (1_000_000, 5_000_000, 15_000_000, 30_000_000),
        "profile_len": 2048,
        "text": {
            "data": "$RXLM_DATA/text/books.train.txt.gz",
            "steps": 3000,
            "seq_len": 512,
            "batch_tokens": 32768,
            "validate_every": 250,
            "validation_tokens": 262144,
        },
        "tasks": {
            "mqar": {
                "steps": 4000,
                "vocab_size": 8192,
                "tokens_per_step": 16384,
                "learning_rates": (1e-3, 3e-3),
            },
            "copy": {"steps": 2000, "tokens_per_step": 16384, "learning_rates": (1e-3, 3e-3)},
            "palindrome": {"steps": 2000, "tokens_per_step": 16384},
            "stack": {"steps": 2000, "tokens_per_step": 16384},
            "needle": {"steps": 2000, "tokens_per_step": 16384},
        },
    },
    "paper": {
        "attention": (*_ALL, "based"),
        "seeds": (0, 1, 2, 3, 4),
        "device": "cuda",
        "dtype": "bfloat16",
        "params": 30_000_000,
        "depth": 8,
        "head_dim": 64,
        "window": 256,
        "processes": 1,
        "batch_tokens": 65536,
        "seq_lens": (1024, 2048, 4096, 8192, 16384, 32768),
        "contexts": (1024, 4096, 16384, 65536, 262144),
        "op_lens": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        "memory_lens": (1024, 2048, 4096, 8192, 16384, 32768, 65536),
        "scale_params": (1_000_000, 5_000_000, 15_000_000, 30_000_000, 100_000_000),
        "profile_len": 4096,
        "text": {
            "data": "$RXLM_DATA/text/books.train.txt.gz",
            "tokens": "bpe",
            "vocab_size": 16384,
            "steps": 20480,
            "seq_len": 2048,
            "batch_tokens": 65536,
            "learning_rate": 1e-3,
            "validate_every": 1024,
            "validation_tokens": 1048576,
        },
        "tasks": {
            name: {
                "steps": 20000,
                "vocab_size": 8192,
                "tokens_per_step": 32768,
                "learning_rates": (1e-4, 4.64e-4, 2.15e-3, 1e-2),
                "test_rows": 1000,
            }
            for name in ("mqar", "copy", "selective-copy", "palindrome", "stack", "needle")
        },
    },
}
"""What each preset changes of the defaults."""


def preset(name: str, **changes: Any) -> StudySettings:
    """Return the settings of a preset, with some fields replaced.

    Raises:
        UserError: for a preset or a field that does not exist, or a bad value.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist: use one of {', '.join(PRESETS)}.")
    return StudySettings.parse({"preset": name, **PRESETS[name], **changes}, f"preset {name}")
