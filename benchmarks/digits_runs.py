"""Runs on the digits example for the studies of stability and step focus: networks, one run, tables, results."""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import environment
import torch
from torch import nn

from twinflow import TwinFlowConfig
from twinflow.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import digits  # noqa: E402
import digits_metrics  # noqa: E402


class PlainNet(nn.Module):
    """An MLP without residual connections and normalisation, fed the bare times: a stress test of the objective.

    Args:
        width: of the hidden layers.
        layers: number of hidden layers.
    """

    def __init__(self, width: int = 512, layers: int = 4) -> None:
        super().__init__()
        self.label = nn.Embedding(digits.CLASSES, 32)
        sizes = [digits.PIXELS + 2 + 32, *[width] * layers]
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, digits.PIXELS))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x_t, t[:, None], r[:, None], self.label(label)], 1))


NETWORKS = {
    "plain 512": lambda data: PlainNet(512),
    "residual 256": lambda data: digits.DigitsNet(data, 256),
    "residual 512": lambda data: digits.DigitsNet(data, 512),
}


QUERIES = [("few", 1), ("few", 2), ("few", 4), ("any", 2), ("any", 4)]


def make_base(network: str, data: digits.Data, steps: int, seed: int) -> nn.Module:
    """A flow-matching model to start from."""
    torch.manual_seed(seed)
    student = NETWORKS[network](data)
    rate = 1e-3 if network.startswith("plain") else digits.BASE_LR
    generator = torch.Generator().manual_seed(seed)
    return digits.train_base(student, data, steps, generator, lambda k, terms: None, lr=rate)


class _Drift:
    """Root mean square of one-step samples while training: real images have 0.85."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.seen = student, []
        generator = torch.Generator().manual_seed(1)
        self.z, self.label = torch.randn(256, digits.PIXELS, generator=generator), torch.arange(256) % digits.CLASSES

    def __call__(self, k: int, terms: dict[str, Any]) -> None:
        if k % 10 == 9:
            generated = sample(self.student, self.z, self.label, steps=1)
            self.seen.append(float(generated.double().square().mean().sqrt()))


def run(
    base: nn.Module, config: TwinFlowConfig, data: digits.Data, steps: int, lr: float, seed: int, scheduled: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """One TwinFlow training from a base.

    Args:
        base: the model to start from; not modified.
        config: the objective.
        data: images and labels.
        steps: optimizer steps.
        lr: learning rate.
        seed: of batches and draws.
        scheduled: warm-up and decay as in the example, or a constant rate.

    Returns:
        The model with averaged weights, and what the training was: settings, CPU seconds, drift.
    """
    student = copy.deepcopy(base).requires_grad_(True)
    drift, started = _Drift(student), time.process_time()
    generator = torch.Generator().manual_seed(seed)
    model = digits.train_twinflow(student, config, data, steps, lr, generator, drift, scheduled=scheduled)
    return model, {
        "steps": steps,
        "lr": lr,
        "seed": seed,
        "cpu_seconds": time.process_time() - started,
        "max_rms": max(drift.seen, default=None),
        "final_rms": drift.seen[-1] if drift.seen else None,
    }


def scores(model: nn.Module, data: digits.Data, steps: int, style: str) -> dict[str, Any]:
    """Distance and label accuracy of generated images."""
    generated, label = digits.generate(model, steps, style, seed=0)
    found = digits_metrics.evaluate(generated, label, *data)
    return {"frechet": found["frechet"], "accuracy": found["accuracy"]}


def distance(value: float) -> str:
    """A distance as a table shows it."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def by_query(scores_of: Callable[[int, str], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Score -> query -> value, of what (steps, style) gives."""
    found = {f"{style} {steps}": scores_of(steps, style) for style, steps in QUERIES}
    return {name: {query: f[name] for query, f in found.items()} for name in ("frechet", "accuracy")}


def mean_and_spread(values: list[float], digits: int) -> str:
    """The mean and, in brackets, half the range."""
    return f"{statistics.mean(values):.{digits}f} ({(max(values) - min(values)) / 2:.{digits}f})"


def save(name: str, settings: dict[str, Any], cells: list[dict[str, Any]], table: str) -> None:
    """Writes the results so far: `<name>_cpu.json` and `<name>_cpu.md`."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    report = {"machine": environment.describe(torch.device("cpu")), "settings": settings, "cells": cells}
    (folder / f"{name}_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}_cpu.md").write_text(table + "\n")
