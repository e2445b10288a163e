"""A sequence model of ``LinearAttention`` layers: 50 training steps on a task that needs memory.

The first token of a sequence carries a number; the model repeats it at the last one.

    python docs/examples/linear_attention_minimal.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rxlm.nn import LinearAttention


class MySequenceModel(nn.Module):
    """Projection, linear attention layers, norm, projection."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        output_dim: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_dim, hidden_dim)
        self.attn_layers = nn.ModuleList(
            [LinearAttention(hidden_dim, num_heads, dropout=dropout) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map ``[batch, tokens, input_dim]`` to ``[batch, tokens, output_dim]``."""
        x = self.input_proj(x)
        for layer in self.attn_layers:
            x = layer(x, attn_mask=attn_mask)
        return self.output_proj(self.norm(x))


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs ``[size, 12, 2]`` (a number, whether it counts), targets ``[size, 1]``."""
    x = torch.randn(size, 12, 2, generator=generator)
    x[..., 1] = 0.0
    x[:, 0, 1] = 1.0
    return x, x[:, 0, :1].clone()


def train(steps: int = 50) -> list[float]:
    """Train a model; return the loss of every step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = MySequenceModel(input_dim=2, hidden_dim=32, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        x, y = batch(64, generator)
        loss = nn.functional.mse_loss(model(x)[:, -1], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    found = train()
    print(f"loss: {found[0]:.3f} at the first step, {sum(found[-5:]) / 5:.3f} over the last five")
