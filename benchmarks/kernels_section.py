"""The kernels' part of the benchmark: the first case of every bench_<op>.py."""

import importlib
from pathlib import Path
from typing import Any

import harness
import torch


def bench_modules() -> list[Any]:
    """Every bench_<op>.py beside this file, imported."""
    return [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("bench_*.py"))]


def measure_kernels(device: torch.device, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Checks and times the first case of each operation."""
    results = []
    for module in bench_modules():
        case = next(iter(module.cases(device)))
        results.append({"op": module.__name__.removeprefix("bench_"), **harness.measure(case, device, seconds)})
    return results
