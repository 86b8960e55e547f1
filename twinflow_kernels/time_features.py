"""`time_features`: sinusoidal features of t and r, in one launch.

    features(s)_i = sin, cos of  scale s 10000^(-i / (C // 2 - shift)),  i = 0 .. C // 2 - 1     (docs/method.md, 29)

Shapes: t, r (B,) float32 or float64, unitless; features (2, B, C) in the times' dtype; cosines first when `flip`; a
zero column when C is odd. The definition of `Timesteps` in diffusers, with its names.

Accuracy: with scale 1000 the angle reaches 1000 rad, where float32 steps by 6e-5. Angle, sine and cosine are taken in
float64 and rounded once: within one unit in the last place of the result, where float32 throughout is 1e-4 away.

Bytes moved: 8 B C for two times. Ladder: v1 = eager, 11 launches for each time; v2 = one launch for both.
"""

import math

import torch

from twinflow_kernels import _backend
from twinflow_kernels._registry import register
from twinflow_kernels._triton import tl, triton

MAX_PERIOD = 10_000.0  # as in diffusers


def time_features_ref(
    t: torch.Tensor, r: torch.Tensor | None, absolute: bool, num_channels: int, flip: bool, shift: float, scale: float
) -> torch.Tensor:
    """The features in plain PyTorch.

    Args:
        t, r: times, (B,); without r only t's features are made.
        absolute: take |t| and |r|.
        num_channels: C.
        flip: cosines first.
        shift: `downscale_freq_shift`.
        scale: factor on the times, radians.

    Returns:
        (2, B, C), or (1, B, C) without r, in t's dtype; arithmetic in float64, on the CPU where the device has none.
    """
    place = t.device if _backend.widest(t.device) == torch.float64 else torch.device("cpu")
    times = torch.stack([t] if r is None else [t, r]).to(place).double()
    times = times.abs() if absolute else times
    half = num_channels // 2
    index = torch.arange(half, dtype=torch.float64, device=place)
    angle = times[..., None] * (scale * torch.exp(index * _rate(half, shift)))
    parts = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    if num_channels % 2:
        parts.append(torch.zeros_like(times[..., None]))
    return torch.cat(parts, dim=-1).to(t.dtype).to(t.device)


def _rate(half: int, shift: float) -> float:
    """The frequencies are exp(i rate)."""
    return -math.log(MAX_PERIOD) / (half - shift)


def launch_config(half: int) -> tuple[int, int]:
    """(block, num_warps) for `half` frequencies; grid = (rows of both times, blocks of frequencies)."""
    return min(256, max(32, triton.next_power_of_2(half))), 4 if half > 64 else 1


@triton.jit
def _time_features_kernel(
    t_ptr, r_ptr, out_ptr, rows, half, SCALE: tl.constexpr, RATE: tl.constexpr, ABSOLUTE: tl.constexpr,
    FLIP: tl.constexpr, ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)  # of out (2 B, C): the rows of t, then those of r
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < half
    # times = stack([t, r])
    t = tl.load(t_ptr + line, mask=line < rows, other=0.0)
    r = tl.load(r_ptr + line - rows, mask=line >= rows, other=0.0)
    time = tl.where(line < rows, t, r).to(tl.float64)
    if ABSOLUTE:
        time = tl.abs(time)
    # angle = times * (scale * exp(index * rate))
    frequency = tl.exp(column.to(tl.float64) * tl.full([BLOCK], RATE, tl.float64))
    angle = time * (tl.full([BLOCK], SCALE, tl.float64) * frequency)
    sin_at = half if FLIP else 0
    cos_at = 0 if FLIP else half
    out = out_ptr + line * (2 * half + ODD) + column
    dtype = out_ptr.dtype.element_ty
    tl.store(out + sin_at, tl.sin(angle).to(dtype), mask=mask)
    tl.store(out + cos_at, tl.cos(angle).to(dtype), mask=mask)
    if ODD:
        # zeros_like(times)
        tl.store(out + 2 * half, tl.zeros([BLOCK], dtype), mask=column == 0)


def _time_features_triton(
    t: torch.Tensor, r: torch.Tensor | None, absolute: bool, num_channels: int, flip: bool, shift: float, scale: float
) -> torch.Tensor:
    out = _fake(t, r, absolute, num_channels, flip, shift, scale)
    rows, half = t.shape[0], num_channels // 2
    if rows == 0:
        return out
    block, num_warps = launch_config(half)
    t = t.contiguous()
    _time_features_kernel[(out.shape[0] * rows, triton.cdiv(half, block))](
        t, t if r is None else r.contiguous(), out, rows, half, SCALE=scale, RATE=_rate(half, shift),
        ABSOLUTE=absolute, FLIP=flip, ODD=num_channels % 2, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _fake(
    t: torch.Tensor, r: torch.Tensor | None, absolute: bool, num_channels: int, flip: bool, shift: float, scale: float
) -> torch.Tensor:
    return t.new_empty((1 if r is None else 2, t.shape[0], num_channels))


_operation = register(
    "time_features(Tensor t, Tensor? r, bool absolute, int num_channels, bool flip, float shift, float scale)"
    " -> Tensor",
    reference=time_features_ref,
    triton=_time_features_triton,
    fake=_fake,
)
