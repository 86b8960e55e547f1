"""What a measurement ran on: device, versions, commit, cache size; and the memory and launches of one call."""

import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from twinflow.environment import cpu_name, device_name, package_version

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop messages
DEFAULT_CACHE_BYTES = 64 << 20  # where the machine does not say


def device_slug(device: torch.device) -> str:
    """The processor's name for a file name, e.g. `nvidia_h100_80gb_hbm3` or `cpu_amd_epyc`."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")
    return slug if device.type == "cuda" else f"cpu_{slug}"


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * unit[s[-1]] for s in sizes if s[-1:] in unit), default=DEFAULT_CACHE_BYTES)


def _commit() -> str | None:
    """The checkout's commit, `-dirty` where tracked code differs from it; TWINFLOW_COMMIT where there is no git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["--", ".", ":!benchmarks/results"]
        status = subprocess.run([*git, "status", "--porcelain", "-uno", *paths], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TWINFLOW_COMMIT")
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge the figures: device, versions, threads, instruction set, commit."""
    from twinflow_kernels import _backend

    native = _backend.native()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "instruction_set": native.isa() if native else None,
        "cache_bytes": cache_bytes(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "twinflow": package_version("twinflow"),
        "commit": _commit(),
    }


def timed(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds of a call until the device has done it, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def free_memory(device: torch.device) -> None:
    """Gives back what nothing holds any more, the allocator's cache included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that one call holds beyond what was allocated before it, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    try:
        events = profile.profiler.kineto_results.events()
    except AttributeError:
        return None
    held, most = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, fills and copies that one call starts on a GPU; None on a CPU or without a working profiler."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    found = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(found) or None
