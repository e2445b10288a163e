"""What every stage promises: pure batches, frozen parts, learning, and bit-exact resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rxlm.data import GeneratedConversations
from rxlm.errors import UserError
from rxlm.rxt.saving import load_model
from rxlm.tokenization import TokenizerTraining, train_tokenizer
from rxlm.training.checkpoint import find_latest
from rxlm.training.metrics import TIMING_FIELDS, read_metrics
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.joint_lm import JointLMObjective, JointLMSettings
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.objectives.memory_pretraining import (
    MemoryPretrainingObjective,
    MemoryPretrainingSettings,
)
from rxlm.training.objectives.sft import SFTObjective, SFTSettings
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer

SIZES = {"turns": 4, "dialogues": 4, "validation_dialogues": 4}
STAGES: dict[str, tuple[type, Any]] = {
    "joint_lm": (JointLMObjective, JointLMSettings(**SIZES, drop_probability=0.1)),
    "sft": (SFTObjective, SFTSettings(**SIZES, mask_replacement="80/10/10")),
    "memory_pretraining": (MemoryPretrainingObjective, MemoryPretrainingSettings(**SIZES)),
    "memory_aware": (
        MemoryAwareObjective,
        MemoryAwareSettings(
            phases=(
                Phase(turns=2, dialogues=4, reads="history", steps=2),
                Phase(turns=3, dialogues=4),
            ),
            validation_dialogues=4,
        ),
    ),
}
FROZEN = {
    "joint_lm": {"memory_attention"},
    "sft": {"memory_attention"},
    "memory_pretraining": {"encoder", "decoder"},
    "memory_aware": set(),
}

stages = pytest.mark.parametrize("stage", STAGES)


def build(tiny: Any, stage: str, **options: Any) -> Any:
    cls, settings = STAGES[stage]
    return tiny.objective(cls, options.pop("settings", settings), **options)


def flat(batch: Any) -> list[Any]:
    """Return all tensors and numbers of a batch."""
    if isinstance(batch, tuple):
        return [leaf for item in batch for leaf in flat(item)]
    return [batch]


def same(left: Any, right: Any) -> bool:
    one, two = flat(left), flat(right)
    return len(one) == len(two) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, two, strict=True)
    )


def train_by_hand(objective: Any, steps: int, lr: float = 5e-3) -> None:
    objective.set_training_mode()
    parameters = [item for item in objective.trained_modules().parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        output = objective.loss(objective.batch(step, 0), step)
        output.loss.backward()
        optimizer.step()
        objective.after_step(step, {key: float(value) for key, value in output.metrics.items()})


def validation_loss(objective: Any) -> float:
    objective.trained_modules().eval()
    with torch.no_grad():
        return float(objective.validate()["loss"])


@stages
def test_a_batch_is_a_pure_function_of_seed_and_step(stage: str, tiny: Any) -> None:
    """A resumed run, or one that builds batches ahead, that sees other data or other noise."""
    one, two = build(tiny, stage), build(tiny, stage)
    before = torch.get_rng_state()
    later = one.batch(1, 0)
    first = one.batch(0, 0)
    assert same(first, two.batch(0, 0))
    assert same(later, two.batch(1, 0))
    assert not same(first, later)
    assert torch.equal(before, torch.get_rng_state()), "a batch drew from the global generator"


@stages
def test_the_loss_repeats_for_the_same_batch(stage: str, tiny: Any) -> None:
    """Noise from the global generator, which a resume in the middle would not repeat."""
    objective = build(tiny, stage)
    batch = objective.batch(0, 0)
    assert torch.equal(objective.loss(batch, 0).loss, objective.loss(batch, 0).loss)


@stages
def test_micro_batches_tile_the_data(stage: str, tiny: Any) -> None:
    """Accumulation that repeats or skips dialogues, compared with a larger batch."""

    class Recorded(GeneratedConversations):
        def sample(self, position: int, num_turns: int) -> Any:
            asked.append(position)
            return super().sample(position, num_turns)

    asked: list[int] = []
    objective = build(tiny, stage, train=Recorded(tiny.generator), accumulation=2)
    for step in (0, 1):
        for micro_step in (0, 1):
            objective.batch(step, micro_step)
    assert asked == list(range(16))


@stages
def test_buckets_do_not_change_the_loss(stage: str, tiny: Any) -> None:
    """A result that depends on padding, or masks and noise that depend on the bucket."""
    losses = []
    for num_buckets in (1, 4):
        settings = STAGES[stage][1].model_copy(update={"num_buckets": num_buckets})
        objective = build(tiny, stage, settings=settings)
        batch = objective.batch(3, 0)
        assert len(getattr(batch, "dialogues", batch).encode) == num_buckets
        losses.append(objective.loss(batch, 3).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=2e-6, rtol=0)


@stages
def test_only_what_the_stage_trains_moves(stage: str, tiny: Any) -> None:
    """A frozen part that weight decay or a stray gradient changes; a trained part that does not."""
    objective = build(tiny, stage)
    before = copy.deepcopy(objective.model.state_dict())
    # Enough steps for memory-aware training to leave its warm-up, which writes nothing.
    train_by_hand(objective, 3)
    after = objective.model.state_dict()
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"encoder", "decoder", "memory_attention"} - FROZEN[stage]


@stages
def test_a_stage_undoes_the_freezing_of_the_one_before(stage: str, tiny: Any) -> None:
    """A pipeline in one process in which nothing but memory attention ever learns again."""
    model = tiny.model()
    build(tiny, "memory_pretraining", model=model)
    objective = build(tiny, stage, model=model)
    trainable = {
        name.split(".")[0] for name, item in model.named_parameters() if item.requires_grad
    }
    assert trainable == {"encoder", "decoder", "memory_attention"} - FROZEN[stage]
    objective.set_training_mode()
    for name in ("encoder", "decoder", "memory_attention"):
        assert getattr(model, name).training is (name not in FROZEN[stage])


@stages
def test_twenty_steps_lower_the_held_out_loss(stage: str, tiny: Any) -> None:
    """A sign, a mask or a target that is wrong: the loss is finite but nothing is learned."""
    objective = build(tiny, stage)
    before = validation_loss(objective)
    train_by_hand(objective, 20)
    assert validation_loss(objective) < 0.9 * before


@stages
def test_validation_repeats_and_does_not_depend_on_the_seed(stage: str, tiny: Any) -> None:
    """Validation on training data or with other noise each time: curves that cannot be compared."""
    one, two = build(tiny, stage), build(tiny, stage, seed=9)
    two.trained_modules().load_state_dict(one.trained_modules().state_dict())
    with torch.no_grad():
        first, again, other = one.validate(), one.validate(), two.validate()
    assert first == again == other
    assert all(value == value for value in first.values()), "a validation metric is NaN"


def run(tiny: Any, stage: str, folder: Path, steps: int) -> Any:
    """Train with dropout, accumulation, validation and batches built ahead, as users do."""
    objective = build(tiny, stage, model=tiny.model(dropout=0.1), accumulation=2)
    settings = TrainSettings(
        steps=steps,
        accumulation=2,
        schedule="constant",
        log_every=1,
        validate_every=3,
        prefetch=2,
        tensorboard=False,
        device="cpu",
    )
    # Without a configuration: the number of steps differs between the two starts.
    return Trainer(objective, settings, RunFolder.open(folder, stage, {})).train(), objective


@stages
def test_three_steps_and_three_more_equal_six(stage: str, tiny: Any, tmp_path: Path) -> None:
    """Anything that a resumed run forgets: MLM head, curriculum, optimizer, random numbers."""
    whole, objective = run(tiny, stage, tmp_path / "whole", 6)
    run(tiny, stage, tmp_path / "parts", 3)
    torch.manual_seed(12345)  # whatever a new process begins with
    parts, _ = run(tiny, stage, tmp_path / "parts", 6)
    assert (whole.step, parts.step) == (6, 6)
    folders = [find_latest(tmp_path / name) for name in ("whole", "parts")]
    files = sorted(path.name for path in folders[0].glob("*.safetensors"))
    assert files == (
        ["mlm_head.safetensors", "model.safetensors"]
        if objective.extra_modules
        else ["model.safetensors"]
    )
    for name in [*files, "train/optimizer.safetensors", "train/rng.safetensors"]:
        left, right = (load_file(folder / name) for folder in folders)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged, without what depends on the clock."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


@stages
def test_a_checkpoint_is_a_model_that_the_next_stage_can_begin_with(
    stage: str, tiny: Any, tmp_path: Path
) -> None:
    """A model folder that only the stage that wrote it can read."""
    objective = build(tiny, stage)
    objective.save_model(tmp_path)
    model = load_model(type(objective.model), tmp_path)
    for name, tensor in objective.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert (
        build(tiny, "sft", model=model).architecture()["model"]
        == (objective.architecture()["model"])
    )


def test_the_mlm_head_goes_from_joint_lm_to_sft(tiny: Any, tmp_path: Path) -> None:
    """SFT that begins with an untrained head and so disturbs the encoder."""
    first = build(tiny, "joint_lm", seed=1)
    first.save_model(tmp_path)
    second = build(tiny, "sft", seed=2)
    weight = second.extra_modules["mlm_head"].dense.weight
    assert not torch.equal(weight, first.extra_modules["mlm_head"].dense.weight)
    assert second.load_extra_modules(tmp_path) == ["mlm_head"]
    assert torch.equal(weight, first.extra_modules["mlm_head"].dense.weight)
    (tmp_path / "mlm_head.safetensors").unlink()
    assert second.load_extra_modules(tmp_path) == []
    with pytest.raises(UserError, match=r"mlm_head.safetensors does not exist"):
        second.load_model_weights(tmp_path)


def test_weights_of_another_model_are_refused(tiny: Any, tmp_path: Path) -> None:
    """A resume that loads what fits and leaves the rest at random."""
    build(tiny, "memory_pretraining", model=tiny.model(slots=4)).save_model(tmp_path)
    objective = build(tiny, "memory_pretraining")
    before = copy.deepcopy(objective.model.state_dict())
    with pytest.raises(UserError, match="slot_identity: shape"):
        objective.load_model_weights(tmp_path)
    after = objective.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_data_must_be_encoded_by_the_models_tokenizer(tiny: Any) -> None:
    """Ids of another vocabulary: training that looks normal and learns nonsense."""
    objective = build(tiny, "joint_lm")
    tiny.tokenizer = train_tokenizer(["other text"], TokenizerTraining(vocab_size=300))
    with pytest.raises(UserError, match="own tokenizer"):
        build(tiny, "joint_lm", model=objective.model)


def test_architecture_sees_changes_that_keep_all_shapes(tiny: Any) -> None:
    """A run resumed with another gate or head count, silently."""
    one = build(tiny, "memory_aware", model=tiny.model())
    two = build(tiny, "memory_aware", model=tiny.model(use_tanh_residual_gate=True))
    dropout = build(tiny, "memory_aware", model=tiny.model(dropout=0.5))
    assert one.architecture() != two.architecture()
    assert one.architecture() == dropout.architecture(), "dropout may change between starts"
