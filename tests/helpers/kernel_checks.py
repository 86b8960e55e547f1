"""What the tests of every kernel module share: backends on devices, and the only place that knows tolerances."""

import math
import os

import numpy as np
import pytest
import torch

from twinflow_kernels import _backend
from twinflow_kernels._registry import Operation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Row sizes around vector widths, Triton blocks and C++ chunks.
ROW_SIZES = (1, 7, 64, 127, 1023, 1024, 1025, 4099)


def backends(operation: Operation) -> list:
    """One pytest parameter (backend, device) for each way this process can run an operation.

    TRITON_INTERPRET=1 makes a suite of its own: Triton on CPU tensors and nothing else.
    """
    found = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for backend in _backend.available(operation.implemented, device):
            if _backend.interpreting() and backend != "triton":
                continue
            found.append(pytest.param(backend, device, marks=marks, id=f"{backend}-{device}"))
    return found


def interpreted(backend: str) -> bool:
    """Whether a backend runs in Triton's interpreter (slow; truncates to bf16)."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def assert_accurate(actual: torch.Tensor, exact: torch.Tensor, reference: torch.Tensor, backend: str) -> None:
    """Asserts error(actual) <= 2 error(reference) + eps against a float64 result.

    Args:
        actual: a backend's result, in the dtype under test.
        exact: the reference's result on float64 inputs.
        reference: the reference's result on the inputs of `actual`.
        backend: the result's; the interpreter truncates to bf16, which costs one more unit in the last place there.
    """
    assert actual.dtype == reference.dtype, f"dtype {actual.dtype}, reference gives {reference.dtype}"
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return
    actual64, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert torch.isfinite(actual64).all(), "a non-finite or unwritten element"
    error = (actual64 - exact).abs().max().item()
    allowed = 2 * (reference.detach().double().cpu() - exact).abs().max().item()
    scale = max(1.0, exact.abs().max().item())
    eps = torch.finfo(actual.dtype).eps
    ulps = 1.0 if interpreted(backend) and actual.dtype != torch.float32 else 0.5
    assert error <= allowed + ulps * eps * scale, f"error {error:.3e}, allowed {allowed + ulps * eps * scale:.3e}"


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor that is not contiguous."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    view = padded[..., ::2]
    view.copy_(x)
    return view


def sinusoids(time: torch.Tensor, channels: int, flip: bool, shift: float, scale: float) -> torch.Tensor:
    """Timesteps(channels, flip, shift, scale) one number at a time, in Python floats."""
    half, out = channels // 2, np.zeros((len(time), channels))
    for row, value in enumerate(time.double().tolist()):
        for i in range(half):
            angle = scale * value * math.exp(-math.log(10000) * i / (half - shift))
            pair = (math.cos(angle), math.sin(angle)) if flip else (math.sin(angle), math.cos(angle))
            out[row, i], out[row, half + i] = pair
    return torch.from_numpy(out)
