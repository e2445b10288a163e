"""Learning rate as a pure function of the update number. Nothing to save, nothing to resume."""

from __future__ import annotations

import math

from rxlm.training.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the learning rate of one update.

    Args:
        settings: the schedule and its numbers.
        step: index of the update, from 0. Beyond ``settings.steps`` the final value holds.
    """
    return settings.lr * learning_rate_factor(settings, step)


def learning_rate_factor(settings: TrainSettings, step: int) -> float:
    """Return :func:`learning_rate` as a fraction of the peak, in (0, 1].

    Warm-up is linear, ``(step + 1) / warmup_steps``, so that no update is wasted on a rate of 0.
    ``cosine``: Loshchilov & Hutter 2017 (SGDR, eq. 5) without restarts, ending at
    ``final_lr_ratio``. ``wsd``: warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4.2), with
    a linear decay over the last ``decay_fraction * steps`` updates.
    """
    number = min(step + 1, settings.steps)
    if number < settings.warmup_steps:
        return number / settings.warmup_steps
    final = settings.final_lr_ratio
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        done = _fraction(number, settings.warmup_steps, settings.steps)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    decay_steps = max(1, round(settings.decay_fraction * settings.steps))
    begin = max(settings.warmup_steps, settings.steps - decay_steps)
    return 1.0 + (final - 1.0) * _fraction(number, begin, settings.steps)


def _fraction(number: int, begin: int, end: int) -> float:
    """Return how far ``number`` is on the way from ``begin`` to ``end``, clamped to [0, 1]."""
    return min(1.0, max(0.0, (number - begin) / max(1, end - begin)))
