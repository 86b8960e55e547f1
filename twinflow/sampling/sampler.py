"""The arithmetic of a sampler, shared by `sample()` and the scheduler (docs/method.md, section 6)."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.sampling.grid import GAP_START, check_grid, default_gap_end, is_number, sampling_grid

STYLES = ("few", "any", "mul")
SDE = "SDE"

# One generator for the batch, or one per row.
Generators = torch.Generator | Sequence[torch.Generator]


class Evaluation(NamedTuple):
    """One network call: at time t for target time r, within the step from `start` to `end`.

    `part` is `whole` for a step of one call, `predict` and `correct` for the two calls of equation 37.
    """

    t: float
    r: float
    start: float
    end: float
    part: str


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler's settings.

    Args:
        style: the target time asked for: `few` r = 0, `any` r = the step's end, `mul` r = t.
        stochasticity: share rho in [0, 1] of fresh noise, or "SDE" (equation 36); None: 1 for `few`, 0 for `any`
            and `mul`.
        gap_start: distance of the first time from 1, in [0, 1); None: 0.001.
        gap_end: distance of the last queried time from 0; None: the published value for the number of steps.
        time_dist_ctrl: (a, b, c) of the grid's warp, each > 0 (equation 32).
        shift: factor of equation 34, > 0.
        extrapolation: factor of equation 35, >= 0.
        order: 1, or 2 for Heun's method (equation 37): two network calls in each step but the last.
    """

    style: str = "few"
    stochasticity: float | str | None = None
    gap_start: float | None = None
    gap_end: float | None = None
    time_dist_ctrl: Sequence[float] = (1.0, 1.0, 1.0)
    shift: float = 1.0
    extrapolation: float = 0.0
    order: int = 1

    def check(self, where: str) -> None:
        """Raises ArgumentError with the caller's name `where` and the setting that is out of its range."""
        if self.style not in STYLES:
            raise ArgumentError(where, "style", f"one of {', '.join(STYLES)}", repr(self.style))
        rho = self.stochasticity
        if rho is not None and rho != SDE and not (is_number(rho) and 0 <= rho <= 1):  # type: ignore[operator]
            raise ArgumentError(where, "stochasticity", "in [0, 1]", repr(rho), hint='"SDE" computes it at each step')
        gap_start = GAP_START if self.gap_start is None else self.gap_start
        check_grid(where, gap_start, 0.0 if self.gap_end is None else self.gap_end, self.time_dist_ctrl)
        if not is_number(self.shift) or self.shift <= 0:
            raise ArgumentError(where, "shift", "a number > 0", repr(self.shift))
        if not is_number(self.extrapolation) or self.extrapolation < 0:
            raise ArgumentError(where, "extrapolation", "a number >= 0", repr(self.extrapolation))
        if type(self.order) is not int or self.order not in (1, 2):
            raise ArgumentError(where, "order", "1 or 2", repr(self.order))

    def times(self, steps: int) -> list[float]:
        """The n + 1 falling times of n steps; the last is 0 (equations 32 and 34)."""
        gap_start = GAP_START if self.gap_start is None else self.gap_start
        gap_end = default_gap_end(steps, self.style) if self.gap_end is None else self.gap_end
        return self.shifted(sampling_grid(steps, gap_start, gap_end, self.time_dist_ctrl))

    def shifted(self, times: Sequence[float]) -> list[float]:
        """Times in [0, 1] after equation 34."""
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in times]

    def evaluations(self, times: Sequence[float]) -> list[Evaluation]:
        """The network calls over n + 1 falling times: n, or 2 n - 1 of second order."""
        calls = []
        for start, end in pairwise(times):
            target = {"few": 0.0, "any": end, "mul": start}[self.style]
            # The last step ends at 0, where no network is trained: it is of first order.
            two = self.order == 2 and end > 0
            calls.append(Evaluation(start, target, start, end, "predict" if two else "whole"))
            if two:
                calls.append(Evaluation(end, 0.0 if self.style == "few" else end, start, end, "correct"))
        return calls

    def ratio(self, start: float, end: float) -> float:
        """The share rho of fresh noise in the step from `start` to `end`."""
        if end == 0.0:
            return 0.0
        if self.stochasticity == SDE:
            # (36) rho = min(1, 2 s (s - s') / s'^2)
            return min(1.0, 2 * start * (start - end) / end**2)
        return float(self.style == "few") if self.stochasticity is None else float(self.stochasticity)


class SamplerState:
    """What a sampler carries from one network call to the next."""

    def __init__(self, config: SamplerConfig) -> None:
        self.config = config
        self._begun: tuple[torch.Tensor, torch.Tensor] | None = None  # x and F of a step's first call
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = None  # x_hat and z_hat of the step before
        self._steps = 0

    def advance(
        self, evaluation: Evaluation, x: torch.Tensor, velocity: torch.Tensor, generator: Generators | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the network's answer to one evaluation.

        Args:
            evaluation: the network call that was made; calls come in order.
            x: (B, ...) state the network was asked at, float32 or wider; never modified.
            velocity: (B, ...) the network's answer, in x's dtype.
            generator: source of fresh noise; None: torch's global stream.

        Returns:
            (B, ...) state to ask the next call at, and (B, ...) the data predicted now.
        """
        if evaluation.part == "correct":
            if self._begun is None:
                # A sampler that starts at a correction is at the step's end already: nothing to correct.
                return x, x - evaluation.t * velocity
            x, first = self._begun
            velocity = 0.5 * (first + velocity)
        if evaluation.part == "predict":
            self._begun = (x, velocity)
            return x - (evaluation.start - evaluation.end) * velocity, x - evaluation.start * velocity
        return self._finish(evaluation.start, evaluation.end, x, velocity, generator)

    def _finish(
        self, start: float, end: float, x: torch.Tensor, velocity: torch.Tensor, generator: Generators | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # (2) x_hat = x - s F, z_hat = x + (1 - s) F
        x_hat, z_hat = x - start * velocity, x + (1 - start) * velocity
        factor = self.config.extrapolation
        if factor > 0:
            before, self._ends = self._ends, (x_hat, z_hat)
            # (35) from the third step on
            if before is not None and self._steps >= 2:
                x_hat = x_hat + factor * (x_hat - before[0])
                z_hat = z_hat + factor * (z_hat - before[1])
        self._steps += 1
        if end == 0.0:
            return x_hat, x_hat
        # (33) x <- (1 - s') x_hat + s' (sqrt(1 - rho) z_hat + sqrt(rho) noise)
        rho = self.config.ratio(start, end)
        if rho > 0:
            z_hat = math.sqrt(1 - rho) * z_hat + math.sqrt(rho) * draw_noise(x, generator)
        return (1 - end) * x_hat + end * z_hat, x_hat


def working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of a sampler's arithmetic: the widest of the tensors', float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def own_generators(sample: torch.Tensor, seed: int) -> list[torch.Generator]:
    """A generator for each row, on the CPU, seeded by the row's own bytes.

    So rows differ where their noise does, and a row draws the same whatever its batch and device.

    Args:
        sample: (B, ...) the state a sampler starts from.
        seed: turns all of them to other noise.
    """
    rows = sample.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    key = seed.to_bytes(8, "little")
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rows)
    return [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]


def draw_noise(like: torch.Tensor, generator: Generators | None) -> torch.Tensor:
    """Normal noise of a tensor's shape, dtype and device; a generator elsewhere draws there, and the noise is moved."""
    if generator is None:
        return torch.randn_like(like)
    if isinstance(generator, torch.Generator):
        return _normal(like, generator)
    return torch.cat([_normal(row, source) for row, source in zip(like.split(1), generator, strict=True)])


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return noise.to(like.device)


def check_generators(where: str, generator: object) -> None:
    """Raises ArgumentTypeError unless it is None, a generator or a list of generators."""
    sources = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    for source in [] if generator is None else sources:
        if not isinstance(source, torch.Generator):
            raise ArgumentTypeError(where, "generator", "a torch.Generator or a list", type(source).__name__)
