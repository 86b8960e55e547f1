"""The host's part of a step: TwinFlowLoss beside the published code's step written plainly, on a network of one layer.

    python benchmarks/host_overhead.py [--rounds 200]

Order 2, guidance, an EMA teacher, one thread of a CPU, batches of 4, 32 and 128 rows. Both take the same draws and give
the same loss (checked first). `host` is a step whose network is the identity on 8 values: what is left is planning,
checks, bookkeeping and kernels on almost nothing. Contestants take turns; writes benchmarks/results/.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import environment
import harness
import torch
from torch import nn

from twinflow import Draws, EMATeacher, TwinFlowConfig, TwinFlowLoss

BATCHES = (4, 32, 128)
WIDTH = 512  # values of a row of latents
CONFIG = TwinFlowConfig(recipe="partition", estimate_order=2, enhanced_ratio=0.5)
DECAY = 0.99


class OneLayer(nn.Module):
    """F = W [x, t, r, c], one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width + 6, width)

    def forward(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.cat([x, t[:, None], r[:, None], cond], 1))


class NoWork(nn.Module):
    """F = w x: a network that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class PublishedStep:
    """The published code's step in plain PyTorch: every teacher call runs all rows, the student's graph held meanwhile.

    Args:
        student: F(x_t, t, r, cond).
        teacher: a copy of it, whose weights are the average.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher, self.decay = student, teacher, 0.0

    def update(self) -> None:
        """The average (equations 6 and 7)."""
        with torch.no_grad():
            averages, weights = list(self.teacher.parameters()), list(self.student.parameters())
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.decay += (1 - self.decay) * (DECAY - self.decay) / 2

    def __call__(self, x: torch.Tensor, c: torch.Tensor, e: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The loss of a batch (equations 1 to 23)."""
        roles = draws.roles
        adv = torch.tensor([role == "adv" for role in roles])
        e2e = torch.tensor([role == "e2e" for role in roles])
        t, r, z, order, delta = draws.t, draws.r, draws.z, CONFIG.estimate_order, CONFIG.delta_t
        with torch.no_grad():
            ones = torch.ones(int(adv.sum()))
            fakes = draws.z_fake - self.student(draws.z_fake, ones, 0 * ones, c[adv])
            x = x.clone()
            x[adv] = fakes
        share = t.abs()[:, None]
        x_t, v = share * z + (1 - share) * x, z - x
        f = self.student(x_t, t, r, c)
        self.update()
        with torch.no_grad():
            guided = (~adv & (t > 0) & (t < 1))[:, None]
            conditional, unconditional = self.teacher(x_t, t, t, c), self.teacher(x_t, t, t, e)
            v = torch.where(guided, v + CONFIG.enhanced_ratio * (conditional - unconditional), v)
            start = torch.maximum(t - delta, r)
            middle, total = x_t - delta * v, torch.zeros_like(x_t)
            for k in range(order):
                a, b = start + (r - start) * k / order, start + (r - start) * (k + 1) / order
                velocity = self.teacher(middle, a, b, c)
                middle, total = middle - (a - b)[:, None] * velocity, total + (a - b)[:, None] * velocity
            walked = ((t - r)[:, None] * f - total) / delta - v
            residual = torch.where((t < r + delta)[:, None], f - v, walked)
            bounded = residual.clamp(-CONFIG.target_clamp, CONFIG.target_clamp)
            target = f - torch.where(adv[:, None], residual, bounded)
            weight = torch.tan((1 - (t.abs() - r.abs())) * math.pi / 2.5) + 1
            weight = torch.where(adv, torch.full_like(t, CONFIG.adversarial_weight), weight)
        loss = (weight * self.barron(f, target)).mean()
        again = draws.t_rectify[:, None]
        with torch.no_grad():
            x_hat = (x_t - share * f)[e2e]
            x_again = again * draws.z_rectify + (1 - again) * x_hat
            fake = self.student(x_again, -draws.t_rectify, -draws.t_rectify, c[e2e])
            real = self.student(x_again, draws.t_rectify, draws.t_rectify, c[e2e])
            rectified = f[e2e] - (fake - real).clamp(-CONFIG.target_clamp, CONFIG.target_clamp)
        return loss + CONFIG.rectify_weight * self.barron(f[e2e], rectified).mean()

    @staticmethod
    def barron(f: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Per-row loss (equations 17 and 18)."""
        mse = ((f - target) ** 2).mean(1)
        alpha, c = CONFIG.barron_alpha, CONFIG.barron_c
        weight = (mse.detach() / (c**2 + 1e-8) / abs(alpha - 2) + 1) ** ((alpha - 2) / 2)
        return mse * weight / c


def contestants(batch: int) -> tuple[dict[str, Callable[[], torch.Tensor]], Callable[[], None]]:
    """Name -> one training step of it, forward and backward; and what draws the next step's numbers for both."""
    torch.manual_seed(0)
    student, plain = OneLayer(WIDTH), OneLayer(WIDTH)
    copy, nothing = OneLayer(WIDTH), NoWork()
    for other in (plain, copy):
        other.load_state_dict(student.state_dict())
    latents, cond, uncond = torch.randn(batch, WIDTH), torch.randn(batch, 4), torch.randn(batch, 4)
    criterion, hosted = TwinFlowLoss(CONFIG), TwinFlowLoss(CONFIG)
    teacher, idle = EMATeacher(student, DECAY), EMATeacher(nothing, DECAY)
    published = PublishedStep(plain, copy)
    drawn: list[Draws] = []

    def draw() -> None:
        drawn[:] = [criterion.draw(latents)]

    def ours() -> torch.Tensor:
        student.zero_grad(set_to_none=True)
        out = criterion(student, latents, cond, uncond, teacher=teacher, draws=drawn[0])
        out.loss.backward()
        return out.loss.detach()

    def theirs() -> torch.Tensor:
        plain.zero_grad(set_to_none=True)
        loss = published(latents, cond, uncond, drawn[0])
        loss.backward()
        return loss.detach()

    few = torch.randn(batch, 8)

    def host() -> torch.Tensor:
        nothing.zero_grad(set_to_none=True)
        out = hosted(nothing, few, cond, uncond, teacher=idle)
        out.loss.backward()
        return out.loss.detach()

    return {"twinflow": ours, "published, written plainly": theirs, "host": host}, draw


def measure(batch: int, rounds: int) -> dict[str, Any]:
    """Checks that both give one loss, then times them in turn; times in microseconds."""
    runs, draw = contestants(batch)
    draw()
    losses = [runs[name]() for name in ("twinflow", "published, written plainly")]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    names, times = list(runs), {name: [] for name in runs}
    gc.collect()
    gc.disable()
    for index in range(-5, rounds):
        draw()
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter_ns()
            runs[name]()
            if index >= 0:
                times[name].append((time.perf_counter_ns() - start) / 1e3)
    gc.enable()
    cell: dict[str, Any] = {"batch": batch, "rounds": rounds}
    for name in names:
        low, median, high = harness.quantiles(times[name])
        cell[name] = {"median_us": median, "p10_us": low, "p90_us": high}
    ratios = [b / a for a, b in zip(times["twinflow"], times["published, written plainly"], strict=True)]
    cell["speed"] = statistics.median(ratios)
    return cell


def table(cells: list[dict[str, Any]]) -> str:
    """A line per batch: median (p10 - p90) of either, how many times as fast ours is, and the host's part of ours."""
    lines = ["| rows | twinflow, us | published, us | speed | host's part, us |", "| --- | --- | --- | --- | --- |"]
    for cell in cells:
        times = [cell[name] for name in ("twinflow", "published, written plainly")]
        shown = " | ".join(f"{c['median_us']:.0f} ({c['p10_us']:.0f} - {c['p90_us']:.0f})" for c in times)
        lines.append(f"| {cell['batch']} | {shown} | {cell['speed']:.2f}x | {cell['host']['median_us']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [measure(batch, options.rounds) for batch in BATCHES]
    device = torch.device("cpu")
    growth = cells[-1]["host"]["median_us"] / cells[0]["host"]["median_us"]
    heading = f"One layer of width {WIDTH}, order 2, guidance, EMA; {environment.device_name(device)}, one thread."
    text = f"{heading}\n\n{table(cells)}\n\nThe host's part grows {growth:.2f}x from 4 to 128 rows.\n"
    print(text)
    path = environment.ROOT / "benchmarks" / "results" / f"host_overhead_{environment.device_slug(device)}.json"
    report = {"machine": environment.describe(device), "width": WIDTH, "cells": cells, "host_growth": growth}
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
