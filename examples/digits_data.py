"""The digits and the network of the example."""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn

CLASSES = 10
PIXELS = 64
FREQUENCIES = 6

Data = tuple[torch.Tensor, torch.Tensor]  # (N, PIXELS) in [-1, 1], (N,) labels


def load_data() -> Data:
    """scikit-learn's 1,797 digits: pixels in [-1, 1] and labels."""
    digits = load_digits()
    return torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)


class DigitsNet(nn.Module):
    """A residual MLP F(x_t, t, r, label) -> velocity.

    The sines of the signed times tell (-t, -t) from (t, t). Low frequencies only: the method differentiates the network
    along t with a step of 0.01, which amplifies what oscillates. The part of the velocity that is linear in x_t, exact
    for Gaussian data of the digits' mean and variance, needs no learning: the layers add what is missing.

    Args:
        data: for the mean image and the pixels' variance.
        width: of the residual stream.
        blocks: number of residual blocks.
    """

    def __init__(self, data: Data, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", data[0].mean(0))
        self.register_buffer("variance", data[0].var(0).mean())
        self.register_buffer("frequencies", 0.5 * math.pi * 2.0 ** torch.arange(FREQUENCIES))
        condition = width // 2
        self.label = nn.Embedding(CLASSES, condition)
        self.times = nn.Linear(2 * (1 + 2 * FREQUENCIES), condition)
        self.mix = nn.Linear(condition, condition)
        self.enter = nn.Linear(PIXELS, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.hidden = nn.ModuleList(nn.Linear(width + condition, width) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.leave = nn.Linear(width, PIXELS)
        for layer in (*self.back, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        phases = torch.stack([t, r], 1)[:, :, None] * self.frequencies  # (B, 2, FREQUENCIES)
        features = torch.cat([t[:, None], r[:, None], phases.sin().flatten(1), phases.cos().flatten(1)], 1)
        condition = nn.functional.silu(self.times(features) + self.label(label))
        condition = nn.functional.silu(self.mix(condition))
        noise, signal = t.abs()[:, None], 1 - t.abs()[:, None]
        centred = x_t - signal * self.mean
        power = noise**2 + signal**2 * self.variance  # of `centred`, per pixel
        h = self.enter(centred * power.rsqrt())
        for norm, hidden, back in zip(self.norms, self.hidden, self.back, strict=True):
            h = h + back(nn.functional.silu(hidden(torch.cat([norm(h), condition], 1))))
        linear = (noise - signal * self.variance) / power * centred - self.mean
        return linear + (self.variance / power).sqrt() * self.leave(h)
