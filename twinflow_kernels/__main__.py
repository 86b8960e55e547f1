"""`python -m twinflow_kernels`: which backend serves each operation on each device, and why."""

import torch

import twinflow_kernels  # noqa: F401  (registers the operations)
from twinflow_kernels import _registry


def choices() -> list[tuple[str, str, str, str]]:
    """Operation, device, backend and reason, of each operation on each device."""
    found: list[tuple[str, str, str, str]] = []
    for operation in _registry.operations():
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                found.append((operation.name, device, "-", "no CUDA device in this process"))
                continue
            choice = operation.choice(device)
            found.append((operation.name, device, choice.backend, choice.reason))
    return found


def table() -> str:
    """The table of operations, devices, backends and reasons, as aligned text."""
    rows = [("operation", "device", "backend", "why"), *choices()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


if __name__ == "__main__":
    print(table())
