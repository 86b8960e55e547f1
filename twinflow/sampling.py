"""`sample()`: from noise to data in a few network calls (docs/method.md, equations 32 and 33)."""

from itertools import pairwise
from typing import Any

import torch

from twinflow.grid import GAP_START, sampling_grid
from twinflow.interface import Student

STYLES = ("few", "any", "mul")


@torch.no_grad()
def sample(
    student: Student,
    z: torch.Tensor,
    cond: Any = None,
    *,
    steps: int = 1,
    style: str = "few",
    stochasticity: float | None = None,
    gap_end: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Walks the sampling grid, noising the predicted data again after each step but the last.

    Args:
        student: F(x_t, t, r, cond) -> velocity.
        z: noise, (B, ...); never modified. The network gets its dtype, the walk is float32 or wider.
        cond: the condition, any pytree.
        steps: network calls n >= 1.
        style: the target time asked for: `few` r = 0, `any` r = the next time, `mul` r = t.
        stochasticity: share rho in [0, 1] of fresh noise; None: 1 for `few`, 0 for `any` and `mul`.
        gap_end: distance of the last queried time from 0; None: the published value for `steps`.
        generator: source of fresh noise, on z's device; None: torch's global stream.

    Returns:
        Samples, (B, ...), in z's dtype.

    Raises:
        ValueError: an argument is out of its range, or the velocity has another shape than z.
        TypeError: z is not a floating tensor.

    Source: UCGM (arXiv 2505.07447), sampler.
    """
    if not isinstance(z, torch.Tensor) or not z.is_floating_point():
        raise TypeError(f"sample: z must be a floating tensor, got {getattr(z, 'dtype', type(z).__name__)}")
    if style not in STYLES:
        raise ValueError(f"sample: style must be one of {', '.join(STYLES)}, got {style!r}")
    rho = float(style == "few") if stochasticity is None else stochasticity
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
        raise ValueError(f"sample: stochasticity must be in [0, 1], got {stochasticity!r}")
    times = sampling_grid(steps, GAP_START, gap_end)
    time_dtype = torch.promote_types(z.dtype, torch.float32)
    x = z.to(time_dtype)
    for s, following in pairwise(times):
        r = {"few": 0.0, "any": following, "mul": s}[style]
        t_rows, r_rows = (torch.full((z.shape[0],), v, dtype=time_dtype, device=z.device) for v in (s, r))
        velocity = student(x.to(z.dtype), t_rows, r_rows, cond).to(time_dtype)
        if velocity.shape != z.shape:
            raise ValueError(f"sample: student must return {tuple(z.shape)}, got {tuple(velocity.shape)}")
        # (2) x_hat = x_t - t F, z_hat = x_t + (1 - t) F
        x_hat = x - s * velocity
        if following == 0.0:
            return x_hat.to(z.dtype)
        z_hat = x + (1 - s) * velocity
        if rho > 0:
            noise = torch.randn(z.shape, dtype=time_dtype, device=z.device, generator=generator)
            z_hat = (1 - rho) ** 0.5 * z_hat + rho**0.5 * noise
        x = (1 - following) * x_hat + following * z_hat
    raise AssertionError("the grid ends at 0")
