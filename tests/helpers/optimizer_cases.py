"""Parameters and updates for the tests of 8-bit optimizers."""

import torch
from torch import nn

SHAPES = ((128, 64), (63, 65), (65, 67), (10,))  # 4095 values are few; 4355 are many, but no multiple of 256


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def run(weights, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
