"""`environment()`: the versions and devices that a run is made with."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "twinflow", "torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes",
    "torchao",
)  # fmt: skip


def environment(processes: int = 1) -> dict[str, str | int | float]:
    """Names of packages and their versions (those that are installed), the system, and the GPUs with their memory.

    Args:
        processes: of the run.
    """
    found: dict[str, str | int | float] = {"python": sys.version.split()[0], "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["processes"] = processes
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or "unknown"
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            found[f"gpu {number}"] = f"{card.name}, {card.total_memory / 1e9:.1f} GB"
    return found
