"""Which backend serves an operation on a device, and why: the one place that decides.

Order of preference: CUDA tensors go to `cuda` where an operation has a CUDA C++ kernel, else to `triton`; CPU tensors
go to `cpu` (C++) where there is one; `reference` (plain PyTorch) serves everything else. `TWINFLOW_BACKEND` or
`override()` names one backend for all operations; where it cannot serve, that is an error, never another backend.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from twinflow_kernels import _triton

BACKENDS = ("triton", "cuda", "cpu", "reference")
_override: str | None = None


@dataclass(frozen=True)
class Choice:
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


def native() -> ModuleType | None:
    """The compiled module `twinflow_kernels._C`, or None where it cannot be used."""
    return _load_native()[0]


@cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why; what a build is not expected to leave out is warned of."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        # torch normally brings an OpenMP runtime into the process; ours must not bring a second thread pool.
        try:
            ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        except OSError as error:
            warnings.warn(f"twinflow_kernels: no OpenMP runtime, the compiled kernels are off: {error}", stacklevel=4)
            return None, f"no OpenMP runtime: {error}"
    try:
        from twinflow_kernels import _C
    except ImportError as error:
        if "No module named" in str(error) or "cannot import name" in str(error):
            return None, "built without native code (TWINFLOW_BUILD_NATIVE=0)"
        warnings.warn(f"twinflow_kernels: the compiled kernels do not load: {error}", stacklevel=4)
        return None, f"the compiled kernels do not load: {error}"
    return _C, ""


def widest(device: torch.device) -> torch.dtype:
    """The dtype of exact arithmetic on a device: float64, which Apple's and some of Intel's GPUs do not have."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels cannot be used, or None where they can."""
    module = native()
    if module is None:
        return _load_native()[1]
    if not module.has_cuda:
        return "built without nvcc"
    if torch.version.cuda is None:
        return "torch has no CUDA"
    runtime, driver = module.cuda_versions()
    # Within a major version any driver will do, but the EMA's table of 32 KB as kernel parameters came with 12.1.
    needed = 12010 if 12010 <= runtime < 13000 else runtime // 1000 * 1000
    if driver < needed:
        served, wanted = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, needed))
        return f"the driver serves CUDA {served}, the kernels need {wanted}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the kernels are compiled for compute capability 8.0 and later"
    return None


def _usable(backend: str, implemented: frozenset[str], device_type: str) -> str | None:
    """Why `backend` cannot serve, or None where it can."""
    if backend not in implemented:
        return f"no {backend} kernel for this operation"
    if backend == "cpu":
        if device_type != "cpu":
            return "C++ kernels take CPU tensors"
        return None if native() is not None else _load_native()[1]
    if backend == "triton":
        if device_type == "cpu" and not interpreting():
            return "Triton takes CPU tensors only under TRITON_INTERPRET=1"
        return _triton.MISSING
    if backend == "cuda":
        return cuda_missing() if device_type == "cuda" else "CUDA kernels take CUDA tensors"
    return None


def available(implemented: frozenset[str], device_type: str) -> list[str]:
    """The backends that can serve an operation on a device, best first."""
    order = ("cuda", "triton", "cpu", "reference") if device_type == "cuda" else ("cpu", "reference", "triton")
    return [b for b in order if _usable(b, implemented, device_type) is None]


def choose(op: str, implemented: frozenset[str], device_type: str) -> Choice:
    """Picks the backend of an operation for tensors on a device.

    Args:
        op: the operation's name, for messages.
        implemented: the backends that have a kernel for it.
        device_type: `cpu`, `cuda`, ...

    Returns:
        The backend and why.

    Raises:
        ValueError: the override names an unknown backend or one that cannot serve.
    """
    return _choose(op, implemented, device_type, _override or os.environ.get("TWINFLOW_BACKEND"))


@cache  # asked on every call of an operation
def _choose(op: str, implemented: frozenset[str], device_type: str, wanted: str | None) -> Choice:
    if wanted:
        if wanted not in BACKENDS:
            raise ValueError(f"TWINFLOW_BACKEND must be one of {', '.join(BACKENDS)}, got {wanted!r}")
        problem = _usable(wanted, implemented, device_type)
        if problem:
            raise ValueError(f"{op}: TWINFLOW_BACKEND={wanted} cannot serve {device_type} tensors: {problem}")
        return Choice(wanted, "asked for by TWINFLOW_BACKEND")
    backend = available(implemented, device_type)[0]
    if backend != "reference":
        reason = _native_reason(backend)
        passed_over = backend == "triton" and device_type == "cuda" and "cuda" in implemented
        return Choice(backend, f"{reason} (CUDA C++: {cuda_missing()})" if passed_over else reason)
    expected = "cpu" if device_type == "cpu" else "triton"
    problem = _usable(expected, implemented, device_type) or "no kernel"
    if expected in implemented and device_type in ("cpu", "cuda"):
        _warn_fallback(op, device_type, problem)
    return Choice("reference", problem)


def _native_reason(backend: str) -> str:
    module = native()
    if backend == "cpu" and module is not None:
        return f"compiled C++, {module.isa()}"
    return "compiled CUDA C++" if backend == "cuda" else "Triton"


@cache
def _warn_fallback(op: str, device_type: str, problem: str) -> None:
    warnings.warn(f"twinflow_kernels: {op} on {device_type} falls back to plain PyTorch: {problem}", stacklevel=3)


@contextmanager
def override(backend: str) -> Iterator[None]:
    """Names one backend for every operation inside the block."""
    global _override
    if backend not in BACKENDS:
        raise ValueError(f"override: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    before, _override = _override, backend
    try:
        yield
    finally:
        _override = before
