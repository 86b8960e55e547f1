"""`sample()`: from noise to data in a few network calls (docs/method.md, section 6)."""

from typing import Any

import torch

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.interface import Student
from twinflow.sampling.grid import check_steps
from twinflow.sampling.sampler import Generators, SamplerConfig, SamplerState, check_generators


@torch.no_grad()
def sample(
    student: Student,
    z: torch.Tensor,
    cond: Any = None,
    *,
    steps: int = 1,
    style: str = "few",
    stochasticity: float | str | None = None,
    generator: Generators | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Samples along the grid, noising the predicted data again after each step but the last.

    Args:
        student: F(x_t, t, r, cond) -> velocity.
        z: noise, (B, ...); never modified. The network gets its dtype, the state is float32 or wider.
        cond: the condition, any pytree.
        steps: number of steps n >= 1: n network calls, or 2 n - 1 with `order=2`.
        style: the target time asked for: `few` r = 0, `any` r = the next time, `mul` r = t.
        stochasticity: share rho in [0, 1] of fresh noise, or "SDE"; None: 1 for `few`, 0 for `any` and `mul`.
        generator: source of fresh noise, or a list of B; drawn on the generator's device. None: torch's global stream.
        settings: further fields of `twinflow.sampling.sampler.SamplerConfig`:
            gap_start, gap_end, time_dist_ctrl, shift, extrapolation, order.

    Returns:
        Samples, (B, ...), in z's dtype.

    Raises:
        ArgumentError: an argument is out of its range, or the velocity has another shape than z.
        TypeError: z is not a floating tensor, generator is no generator, or a setting is unknown.

    Source: UCGM (arXiv 2505.07447), sampler.
    """
    if not isinstance(z, torch.Tensor) or not z.is_floating_point():
        raise ArgumentTypeError("sample", "z", "a floating tensor", getattr(z, "dtype", type(z).__name__))
    check_steps("sample", "steps", steps)
    steps = int(steps)
    config = SamplerConfig(style=style, stochasticity=stochasticity, **settings)
    config.check("sample")
    check_generators("sample", generator)
    if isinstance(generator, (list, tuple)) and len(generator) != z.shape[0]:
        raise ArgumentError("sample", "generator", f"one or a list of {z.shape[0]}", len(generator))
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    state = SamplerState(config)
    for evaluation in config.evaluations(config.times(steps)):
        t, r = (
            torch.full((z.shape[0],), time, dtype=x.dtype, device=z.device) for time in (evaluation.t, evaluation.r)
        )
        velocity = student(x.to(z.dtype), t, r, cond)
        if velocity.shape != z.shape:
            raise ArgumentError("sample", "student", str(tuple(z.shape)), tuple(velocity.shape), verb="return")
        x, _ = state.advance(evaluation, x, velocity.to(x.dtype), generator)
    return x.to(z.dtype)
