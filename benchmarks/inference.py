"""Inference: throughput at batch 10, latency at batch 1, and what the sampler itself costs.

The transformer and the sampler are counted, text encoders and VAE are not.
"""

import statistics
from typing import Any

import environment
import networks
import torch

from twinflow.sampling import sample


def _seconds(student: Any, z: torch.Tensor, cond: dict, steps: int, repeats: int) -> float:
    """Median seconds of sampling, after a warm-up."""
    call = lambda: sample(student, z, cond, steps=steps)  # noqa: E731
    times = [environment.timed(call, z.device)[0] for _ in range(repeats + 1)]
    return statistics.median(times[1:])


def measure_inference(
    model: str, device: torch.device, dtype: torch.dtype, depth: int | None = None
) -> list[dict[str, Any]]:
    """A line per number of steps: samples per second at batch 10, seconds at batch 1, sampler seconds at batch 1.

    The sampler's own cost is the time of the same walk with a network that returns at once.
    """
    student = networks.build(model, device, dtype, depth).eval()
    many, cond_many, _ = networks.random_batch(model, student, 10, device, dtype)
    one, cond_one, _ = networks.random_batch(model, student, 1, device, dtype)
    lines = []
    for steps in (1, 2, 4):
        throughput = 10 / _seconds(student, many, cond_many, steps, repeats=5)
        latency = _seconds(student, one, cond_one, steps, repeats=10)
        overhead = _seconds(lambda x_t, t, r, cond: x_t, one, cond_one, steps, repeats=20)
        lines.append(
            {"model": model, "steps": steps, "samples_per_s": throughput, "latency_s": latency, "sampler_s": overhead}
        )  # fmt: skip
    return lines
