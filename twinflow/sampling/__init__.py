"""`sample()`: from noise to data in a few network calls (docs/method.md, section 6)."""

from typing import Any

import torch

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
    **walk: Any,
) -> torch.Tensor:
    """Walks the sampling grid, noising the predicted data again after each step but the last.

    Args:
        student: F(x_t, t, r, cond) -> velocity.
        z: noise, (B, ...); never modified. The network gets its dtype, the walk is float32 or wider.
        cond: the condition, any pytree.
        steps: steps n >= 1 of the walk: n network calls, or 2 n - 1 with `order=2`.
        style: the target time asked for: `few` r = 0, `any` r = the next time, `mul` r = t.
        stochasticity: share rho in [0, 1] of fresh noise, or "SDE"; None: 1 for `few`, 0 for `any` and `mul`.
        generator: source of fresh noise, or a list of B; drawn on the generator's device. None: torch's global stream.
        walk: further fields of `twinflow.sampling.sampler.Walk`:
            gap_start, gap_end, time_dist_ctrl, shift, extrapolation, order.

    Returns:
        Samples, (B, ...), in z's dtype.

    Raises:
        ValueError: an argument is out of its range, or the velocity has another shape than z.
        TypeError: z is not a floating tensor, a generator is none, or `walk` has an unknown field.

    Source: UCGM (arXiv 2505.07447), sampler.
    """
    if not isinstance(z, torch.Tensor) or not z.is_floating_point():
        raise TypeError(f"sample: z must be a floating tensor, got {getattr(z, 'dtype', type(z).__name__)}")
    check_steps("sample", "steps", steps)
    options = SamplerConfig(style=style, stochasticity=stochasticity, **walk)
    options.check("sample")
    check_generators("sample", generator)
    if isinstance(generator, (list, tuple)) and len(generator) != z.shape[0]:
        raise ValueError(f"sample: generator must be one or a list of {z.shape[0]}, got {len(generator)}")
    queries = options.queries(options.times(steps))
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    state = SamplerState(options)
    for query in queries:
        t, r = (torch.full((z.shape[0],), time, dtype=x.dtype, device=z.device) for time in (query.t, query.r))
        velocity = student(x.to(z.dtype), t, r, cond)
        if velocity.shape != z.shape:
            raise ValueError(f"sample: student must return {tuple(z.shape)}, got {tuple(velocity.shape)}")
        x, _ = state.advance(query, x, velocity.to(x.dtype), generator)
    return x.to(z.dtype)
