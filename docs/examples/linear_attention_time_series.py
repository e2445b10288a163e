"""Forecasting with ``LinearAttention``: windows of a series, the next value, and what persistence
(the last value again) would have said.

    python docs/examples/linear_attention_time_series.py
    python docs/examples/linear_attention_time_series.py --plot forecast.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from linear_attention_minimal import MySequenceModel
from torch import Tensor, nn

from rxlm.nn.drop_in.scaler import StandardScaler

WINDOW, NUM_TRAINING = 24, 400


class Forecast(NamedTuple):
    """What came out, in the units of the series.

    Attributes:
        time: ``[N]``, index in the series of what was predicted.
        true: ``[N]``.
        predicted: ``[N]``.
        losses: of every training step, normalised.
        error: mean squared error of the predictions.
        persistence_error: of the last value of each window.
    """

    time: Tensor
    true: Tensor
    predicted: Tensor
    losses: list[float]
    error: float
    persistence_error: float


def series(length: int = 600) -> Tensor:
    """Two waves, a little noise, far from zero: ``[length]``."""
    t = torch.arange(length, dtype=torch.float32)
    waves = 8 * torch.sin(2 * math.pi * t / 17) + 3 * torch.sin(2 * math.pi * t / 40)
    noise = torch.randn(length, generator=torch.Generator().manual_seed(0))
    return 50 + waves + 0.3 * noise


def windows(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a series ``[T]``.

    Returns:
        Windows ``[N, WINDOW, 1]``, the value after each ``[N, 1]``, and its index ``[N]``.
    """
    x = values.unfold(0, WINDOW, 1)[:-1]
    time = torch.arange(WINDOW, len(values))
    return x.unsqueeze(-1), values[time].unsqueeze(-1), time


def forecast(steps: int = 50) -> Forecast:
    """Train on the beginning of the series, predict the rest one step ahead."""
    torch.manual_seed(0)
    values = series()
    # Fitted on what training may see; one feature, so the series is a column.
    scaler = StandardScaler.fit(values[:NUM_TRAINING, None])
    x, y, time = windows(scaler.transform(values[:, None])[:, 0])
    training = time < NUM_TRAINING
    model = MySequenceModel(input_dim=1, hidden_dim=32, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        rows = torch.randint(int(training.sum()), (64,), generator=generator)
        loss = nn.functional.mse_loss(model(x[training][rows])[:, -1], y[training][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        predicted = scaler.inverse_transform(model(x[~training])[:, -1])[:, 0]
    time = time[~training]
    true, last = values[time], values[time - 1]
    return Forecast(
        time,
        true,
        predicted,
        losses,
        float((predicted - true).square().mean()),
        float((last - true).square().mean()),
    )


def plot(found: Forecast, file: Path) -> None:
    """Draw truth and prediction."""
    import matplotlib.pyplot as plt

    plt.plot(found.time, found.true, label="True")
    plt.plot(found.time, found.predicted, label="Predicted")
    plt.legend()
    plt.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Forecast a series with linear attention.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--plot", type=Path, help="image to write")
    options = parser.parse_args()
    result = forecast(options.steps)
    print(f"loss: {result.losses[0]:.3f} at the first step, {result.losses[-1]:.3f} at the last")
    print(f"mean squared error: {result.error:.2f}; persistence: {result.persistence_error:.2f}")
    if options.plot is not None:
        plot(result, options.plot)
