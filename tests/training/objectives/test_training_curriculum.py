"""Which phase each step of memory-aware training is in."""

from __future__ import annotations

import pytest

from rxlm.training.objectives.curriculum import Curriculum, Phase

THREE = (
    Phase(turns=2, steps=4),
    Phase(turns=4, steps=10, min_steps=3, advance_accuracy=0.9),
    Phase(turns=8),
)


def walk(curriculum: Curriculum, steps: range, accuracy: float | None) -> list[int]:
    """Return the turns that each step sees, letting the curriculum observe all of them."""
    seen = []
    for step in steps:
        seen.append(curriculum.phase(step)[1].turns)
        curriculum.observe(step, accuracy)
    return seen


def test_phases_last_exactly_their_steps() -> None:
    """A phase that is one step longer or shorter than the recipe says, or an endless one."""
    assert walk(Curriculum(THREE), range(20), 0.0) == [2] * 4 + [4] * 10 + [8] * 6


def test_accuracy_ends_a_phase_early_but_not_before_min_steps() -> None:
    """A gate that never opens, that opens at once, or that opens phases without one."""
    assert walk(Curriculum(THREE), range(10), 1.0) == [2] * 4 + [4] * 3 + [8] * 3


def test_the_gate_is_a_running_mean() -> None:
    """One lucky batch that ends a phase."""
    curriculum = Curriculum(THREE)
    walk(curriculum, range(8), 0.2)
    assert not curriculum.observe(8, 1.0)
    assert curriculum.phase(9)[0] == 1


def test_accuracy_of_the_phase_before_does_not_count() -> None:
    """An easy phase whose accuracy opens the gate of the harder one after it."""
    curriculum = Curriculum((Phase(steps=50), Phase(advance_accuracy=0.9), Phase()))
    walk(curriculum, range(50), 1.0)
    walk(curriculum, range(50, 80), 0.5)
    assert curriculum.phase(80)[0] == 1


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 13, 14, 17])
def test_a_resumed_curriculum_goes_on_as_if_never_stopped(stop: int) -> None:
    """A state that forgets when the phase began or how good the batches were."""
    accuracies = [0.1 * (step % 10) + 0.4 for step in range(30)]

    def go(curriculum: Curriculum, steps: range) -> list[int]:
        singles = [walk(curriculum, range(step, step + 1), accuracies[step]) for step in steps]
        return [turns for single in singles for turns in single]

    wanted = go(Curriculum(THREE), range(30))
    stopped = Curriculum(THREE)
    done = go(stopped, range(stop))
    resumed = Curriculum(THREE)
    resumed.load_state_dict(stopped.state_dict())
    assert done + go(resumed, range(stop, 30)) == wanted


def test_earlier_steps_keep_their_phase() -> None:
    """A batch asked for again after a phase has ended (a retry, a log) that is another one."""
    curriculum = Curriculum(THREE)
    walk(curriculum, range(20), None)
    assert [curriculum.phase(step)[0] for step in (0, 3, 4, 13, 14)] == [0, 0, 1, 1, 2]


def test_steps_without_a_measurement_count_as_steps_only() -> None:
    """A batch without questions that resets or opens the gate."""
    curriculum = Curriculum((Phase(advance_accuracy=0.5), Phase()))
    assert not curriculum.observe(0, None)
    assert curriculum.observe(1, 0.6)


def test_a_stopped_phase_is_reported_once() -> None:
    """``observe`` that says 'the next step begins the next phase' when it does not."""
    curriculum = Curriculum(THREE)
    changes = [step for step in range(20) if curriculum.observe(step, 0.0)]
    assert changes == [3, 13]
    assert curriculum.starts == [0, 4, 14]
