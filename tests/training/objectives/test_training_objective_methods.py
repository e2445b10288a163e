"""Options of memory-aware training: which parts a phase trains, distillation from the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rxlm.errors import UserError
from rxlm.rxt.unroll import answer_with_history, answer_with_memory, encode_turns, scan_memory
from rxlm.training.checkpoint import find_latest
from rxlm.training.distributed.zero import ZeRO
from rxlm.training.objectives.curriculum import Phase
from rxlm.training.objectives.memory_aware import MemoryAwareObjective, MemoryAwareSettings
from rxlm.training.run_folder import RunFolder
from rxlm.training.settings import TrainSettings
from rxlm.training.trainer import Trainer

THAWING = (
    Phase(turns=2, dialogues=2, steps=2),
    Phase(turns=3, dialogues=2, trains=("decoder",), steps=2),
    Phase(turns=3, dialogues=2, trains=("memory_attention",), steps=2),
    Phase(turns=3, dialogues=2),
)


def aware(tiny: Any, *phases: Phase, model: Any = None, **values: Any) -> Any:
    chosen = {"phases": phases or (Phase(turns=4, dialogues=3),), "validation_dialogues": 2}
    accumulation = values.pop("accumulation", 1)
    settings = MemoryAwareSettings(**{**chosen, **values})
    return tiny.objective(MemoryAwareObjective, settings, model, accumulation=accumulation)


def trained_to(tiny: Any, folder: Path, steps: int, **values: Any) -> dict[str, Tensor]:
    """Train, or go on, as users do; return the weights and the optimizer's state."""
    objective = aware(tiny, *THAWING, model=tiny.model(dropout=0.1), accumulation=2)
    settings = TrainSettings(
        **{
            "steps": steps, "accumulation": 2, "schedule": "constant", "weight_decay": 0.5,
            "prefetch": 2, "loggers": (), "device": "cpu", **values,
        }
    )  # fmt: skip
    Trainer(objective, settings, RunFolder.open(folder, "memory_aware", {})).train()
    checkpoint = find_latest(folder)
    assert checkpoint is not None
    return {
        **load_file(checkpoint / "model.safetensors"),
        **load_file(checkpoint / "train" / "optimizer.safetensors"),
    }


def moved(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """Return the parts of which a weight or a moment differs; the shared embedding by itself."""
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    parts = {name.split(".")[0] for name in changed if "embedding" not in name}
    return parts | {"embedding" for name in changed if "embedding" in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
def test_a_phase_changes_only_what_it_trains(tiny: Any, tmp_path: Path, precision: str) -> None:
    """Weight decay, moments of earlier steps, or masters that move a part which is frozen; a part
    that stays frozen when its time has come; a resume that begins anew with the phases."""
    states = [
        trained_to(tiny, tmp_path / "parts", steps, precision=precision) for steps in (2, 4, 6, 8)
    ]
    everything = {"encoder", "decoder", "memory_attention", "embedding"}
    assert moved(states[0], states[1]) == {"decoder", "embedding"}
    assert moved(states[1], states[2]) == {"memory_attention"}
    assert moved(states[2], states[3]) == everything
    whole = trained_to(tiny, tmp_path / "whole", 8, precision=precision)
    assert whole.keys() == states[3].keys() and not moved(whole, states[3])


def test_a_part_that_is_left_out_does_not_shorten_the_gradient(tiny: Any, tmp_path: Path) -> None:
    """Clipping by the norm of gradients that are thrown away."""
    objective = aware(tiny, Phase(turns=3, dialogues=2, trains=("memory_attention",)))
    settings = TrainSettings(steps=1, log_every=1, loggers=(), device="cpu")
    result = Trainer(objective, settings, RunFolder.open(tmp_path, "memory_aware", {})).train()
    again = aware(tiny, Phase(turns=3, dialogues=2))
    again.loss(again.batch(0, 0), 0).loss.backward()
    gradients = [item.grad for item in again.model.memory_attention.parameters()]
    norm = torch.nn.utils.get_total_norm([item for item in gradients if item is not None])
    assert result.metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_phases_that_train_nothing_are_refused() -> None:
    """A recipe whose first phase burns its steps without changing a weight."""
    for fields, problem in (
        ({"trains": []}, "name at least one part"),
        ({"trains": ["decoder", "decoder"]}, "each once"),
        ({"trains": ["memory_attention"], "reads": "history"}, "nothing would change"),
        ({"trains": ["memory"]}, "memory_attention"),
    ):
        with pytest.raises(UserError, match=problem):
            Phase.parse(fields)


def test_deepspeed_refuses_to_leave_parts_out() -> None:
    """DeepSpeed that silently trains what the recipe freezes."""
    strategy = object.__new__(ZeRO)
    strategy.drop_gradients([])
    with pytest.raises(UserError, match="strategy=ddp"):
        strategy.drop_gradients([nn.Parameter(torch.zeros(1))])


def both_readings(objective: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits from memory, from the history, and labels, written out."""
    model = objective.model
    encoded = encode_turns(model.encoder, batch)
    start = model.initial_memory(batch.num_dialogues, seed=batch.memory_seed)
    memories = scan_memory(model.memory_attention, start, encoded, batch.num_turns)
    remembered = answer_with_memory(model.decoder, batch, memories)
    with torch.no_grad():
        told = answer_with_history(model.decoder, batch, encoded)
    logits = [torch.cat([item.logits for item in items]) for items in (remembered, told)]
    return *logits, torch.cat([item.labels for item in remembered])


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None
    }


@pytest.mark.parametrize("kind", ["mha", "md_gdn"])
def test_distillation_adds_the_divergence_from_the_history(tiny: Any, kind: str) -> None:
    """Teacher and student swapped, rows of one beside those of the other, a teacher that learns
    from its pupil, a mean over the vocabulary in place of the targets."""
    config = tiny.model().config.model_dump(mode="json")
    config["decoder"]["self_att_type"] = kind
    torch.manual_seed(0)
    model = type(tiny.model())(config, tiny.tokenizer)
    objective = aware(tiny, model=model, distillation=0.7)
    batch = objective.batch(1, 0)
    output = objective.loss(batch, 1)
    student, teacher, labels = both_readings(objective, batch)
    share = teacher.double().exp() / teacher.double().exp().sum(dim=1, keepdim=True)
    predicted = student.double() - student.double().exp().sum(dim=1, keepdim=True).log()
    each = (share * (share.log() - predicted)).sum(dim=1)
    expected = 0.7 * each.mean() - predicted[range(len(labels)), labels].mean()
    assert each.mean().item() > 1e-4
    assert output.num_targets == len(labels)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert float(output.metrics["distillation"]) == pytest.approx(each.mean().item(), abs=1e-5)
    ours = gradients_of(model, output.loss)
    wanted = gradients_of(model, expected)
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-3)


def test_distillation_is_silent_where_the_history_is_read(tiny: Any) -> None:
    """A warm-up that pays for a second reading, or whose loss is no longer cross-entropy; a
    validation loss that cannot be compared with that of other runs."""
    history = Phase(turns=3, dialogues=2, reads="history")
    for phase in (history, Phase(turns=3, dialogues=2)):
        plain, distilled = (aware(tiny, phase, distillation=weight) for weight in (0.0, 1.0))
        outputs = [item.loss(item.batch(0, 0), 0) for item in (plain, distilled)]
        same = phase is history
        assert torch.equal(outputs[0].loss, outputs[1].loss) is same
        assert ("distillation" in outputs[1].metrics) is not same
        assert "distillation" not in outputs[0].metrics
        with torch.no_grad():
            assert plain.validate() == distilled.validate()


def test_small_talk_weighs_less(tiny: Any) -> None:
    """Catches a weight on the questions too, one that goes by row number and not by what the row
    is, and shares of processes that do not add up to the whole batch."""

    def sums(weight: float, batch: Any = None, chat: float = 1.0) -> tuple[float, int]:
        objective = aware(tiny, chat_weight=weight, chat_answers=chat)
        objective.model.double()
        output = objective.loss(objective.batch(0, 0) if batch is None else batch, 0)
        return float(output.loss.detach()) * output.num_targets, output.num_targets

    (whole, count), (half, same), (least, _) = sums(1.0), sums(0.5), sums(1e-9)
    assert count == same and 0 < least < half < whole
    assert half == pytest.approx(0.5 * (whole - least) + least, rel=1e-6)
    questions, fewer = sums(1.0, chat=0.0)
    assert 0 < fewer < count and least == pytest.approx(questions, rel=1e-6)
    objective = aware(tiny, chat_answers=1.0)
    batch = objective.batch(0, 0)
    shares = [sums(0.5, objective.shard(batch, rank, 2))[0] for rank in range(2)]
    assert sum(shares) == pytest.approx(half, rel=1e-6)
