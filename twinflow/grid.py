"""`sampling_grid()`: the times a few-step sampler visits (docs/method.md, equation 32)."""

import math

# Gap at the data end by number of steps, as published for 1, 2 and 4 steps; more steps end nearer the data.
_GAP_END = ((1, 0.7), (2, 0.6), (4, 0.5), (math.inf, 0.3))
GAP_START = 0.001


def default_gap_end(steps: int) -> float:
    """The published end gap of a grid of `steps` steps."""
    return next(gap for most, gap in _GAP_END if steps <= most)


def sampling_grid(
    steps: int,
    gap_start: float = GAP_START,
    gap_end: float | None = None,
    time_dist_ctrl: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> list[float]:
    """The times of a sampler, from noise to data.

    sigma = 1 - K(u), K(u) = (1 - (1 - u^a)^b)^c, u linear from gap_start to 1 - gap_end; the walk ends at 0.

    Args:
        steps: number of network calls n >= 1.
        gap_start: distance of the first time from 1, in [0, 1).
        gap_end: distance of the last queried time from 0, in [0, 1 - gap_start]; None: the published value for
            `steps`. With 0 one more point is laid and the last, which would be time 0, is dropped.
        time_dist_ctrl: (a, b, c) of the Kumaraswamy warp K, each > 0.

    Returns:
        n + 1 falling times; the last is 0.

    Raises:
        ValueError: an argument is out of its range.

    Source: UCGM (arXiv 2505.07447), sampler.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sampling_grid: steps must be an integer >= 1, got {steps!r}")
    gap_end = default_gap_end(steps) if gap_end is None else gap_end
    if not 0 <= gap_start < 1:
        raise ValueError(f"sampling_grid: gap_start must be in [0, 1), got {gap_start}")
    if not 0 <= gap_end <= 1 - gap_start:
        raise ValueError(f"sampling_grid: gap_end must be in [0, {1 - gap_start}], got {gap_end}")
    if len(time_dist_ctrl) != 3 or not all(value > 0 for value in time_dist_ctrl):
        raise ValueError(f"sampling_grid: time_dist_ctrl must be three numbers > 0, got {time_dist_ctrl}")
    a, b, c = time_dist_ctrl
    points = steps if gap_end > 0 else steps + 1
    width = (1 - gap_end - gap_start) / max(points - 1, 1)
    warped = [(1 - (1 - min(gap_start + i * width, 1.0) ** a) ** b) ** c for i in range(points)]
    return [1 - k for k in warped[:steps]] + [0.0]
