"""`sampling_grid()`: the times a few-step sampler visits (docs/method.md, equation 32)."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch

from twinflow.errors import ArgumentError

# Gap at the data end by number of steps, as published for 1, 2 and 4 steps; more steps end nearer the data.
_GAP_END = ((1, 0.7), (2, 0.6), (4, 0.5), (math.inf, 0.3))
GAP_START = 0.001


def default_gap_end(steps: int, style: str = "few") -> float:
    """The published end gap of a grid of `steps` steps.

    More than four steps of style `mul` (published: 30) have none: the last one is an Euler step over the gap.
    """
    if style == "mul" and steps > 4:
        return 0.0
    return next(gap for most, gap in _GAP_END if steps <= most)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer, numpy's included."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_steps(where: str, name: str, steps: Any) -> None:
    """Raises ArgumentError unless a number of steps is an integer >= 1."""
    if not is_integer(steps) or steps < 1:
        raise ArgumentError(where, name, "an integer >= 1", repr(steps))


def check_grid(where: str, gap_start: float, gap_end: float, time_dist_ctrl: Sequence[float]) -> None:
    """Raises ArgumentError unless gaps and warp are in their ranges (see `sampling_grid`)."""
    if not is_number(gap_start) or not 0 <= gap_start < 1:
        raise ArgumentError(where, "gap_start", "in [0, 1)", repr(gap_start))
    if not is_number(gap_end) or not 0 <= gap_end <= 1 - gap_start:
        raise ArgumentError(where, "gap_end", f"in [0, {1 - gap_start}]", repr(gap_end))
    is_triple = isinstance(time_dist_ctrl, Sequence) and len(time_dist_ctrl) == 3
    if not is_triple or not all(is_number(value) and value > 0 for value in time_dist_ctrl):
        raise ArgumentError(where, "time_dist_ctrl", "three numbers > 0", repr(time_dist_ctrl))


def sampling_grid(
    steps: int,
    gap_start: float = GAP_START,
    gap_end: float | None = None,
    time_dist_ctrl: Sequence[float] = (1.0, 1.0, 1.0),
) -> list[float]:
    """The times of a sampler, from noise to data.

    sigma = 1 - K(u), K(u) = (1 - (1 - u^a)^b)^c, u linear from gap_start to 1 - gap_end; the last time is 0.

    Args:
        steps: number of steps n >= 1.
        gap_start: distance of the first time from 1, in [0, 1).
        gap_end: distance of the last queried time from 0, in [0, 1 - gap_start]; None: the published value for
            `steps`. With 0 one more point is laid and the last, which would be time 0, is dropped.
        time_dist_ctrl: (a, b, c) of the Kumaraswamy warp K, each > 0.

    Returns:
        n + 1 falling times; the last is 0.

    Raises:
        ArgumentError: an argument is out of its range, or the times of this warp and these gaps do not fall.

    Source: UCGM (arXiv 2505.07447), sampler.
    """
    check_steps("sampling_grid", "steps", steps)
    steps = int(steps)
    gap_end = default_gap_end(steps) if gap_end is None else gap_end
    check_grid("sampling_grid", gap_start, gap_end, time_dist_ctrl)
    a, b, c = time_dist_ctrl
    points = steps if gap_end > 0 else steps + 1
    width = (1 - gap_end - gap_start) / max(points - 1, 1)
    warped = [(1 - (1 - min(gap_start + i * width, 1.0) ** a) ** b) ** c for i in range(points)]
    times = [1 - k for k in warped[:steps]] + [0.0]
    if not all(before > after for before, after in pairwise(times)):
        got = f"{times} from gaps ({gap_start}, {gap_end}) and time_dist_ctrl {tuple(time_dist_ctrl)}"
        raise ArgumentError("sampling_grid", f"{steps} times", "towards 0", got, verb="fall")
    return times


def check_times(where: str, name: str, times: Sequence[float]) -> None:
    """Raises ArgumentError unless there are times, and they fall within (0, 1]."""
    inside = len(times) > 0 and all(is_number(s) and 0 < s <= 1 for s in times)
    if not inside or not all(before > after for before, after in pairwise(times)):
        raise ArgumentError(where, name, "from 1 at most to above 0", f"{list(times)} as shares of noise", verb="fall")


def is_stock_array(times: Any) -> bool:
    """Whether times are the numpy array linspace(1, 1/N, N), to float32 rounding, which most stock pipelines send."""
    stock = np.linspace(1.0, 1 / max(len(times), 1), len(times))
    return isinstance(times, np.ndarray) and np.allclose(times, stock, rtol=0.0, atol=1e-6)


def is_stock_list(times: Any) -> bool:
    """Whether times are that grid as a list of float32 numbers, which Z-Image's pipelines send."""
    count = len(times)
    return isinstance(times, list) and times == torch.linspace(1.0, 1 / max(count, 1), count).tolist()
