"""`adamw_8bit()`: AdamW whose moments take a byte a value each, by bitsandbytes or torchao."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from twinflow.memory.quantised_linear import load_library

DEVICES = ("cpu", "cuda", "xpu")  # where both libraries have the step
_CLASSES = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}


def adamw_8bit(
    parameters: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    library: str = "bitsandbytes",
) -> torch.optim.Optimizer:
    """A library's `AdamW8bit`: moments as 8-bit codes with a float32 scale per 256 values, 2.03 bytes a parameter.

    Moments of tensors under 4096 values stay float32; torchao keeps them so wherever 256 does not divide the number of
    values, too. Both libraries serve CPU and CUDA. torchao compiles its step at first use, and its learning rate is a
    tensor that a schedule must change in place; with bitsandbytes neither is so.

    Args:
        parameters: what is trained, or dicts of groups, as every `torch.optim` optimizer takes them.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
        library: `bitsandbytes` or `torchao`.

    Returns:
        The optimizer. Its `state_dict()` resumes with the same bits.

    Raises:
        ImportError: the library is missing.
        TypeError: parameters are no tensors.
        ValueError: an unknown library, no parameters, or parameters that it does not serve: on another device, or
            sharded ones with bitsandbytes.
    """
    if library not in _CLASSES:
        raise ValueError(f"adamw_8bit: library must be one of {', '.join(_CLASSES)}, got {library!r}")
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    _check(given, library)
    load_library(library, "adamw_8bit")
    optimizer: Any = importlib.import_module(_CLASSES[library])
    return optimizer.AdamW8bit(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _check(given: list[Any], library: str) -> None:
    groups = [part["params"] if isinstance(part, dict) else part for part in given]
    tensors = [t for group in groups for t in ([group] if isinstance(group, torch.Tensor) else _listed(group))]
    if not tensors:
        raise ValueError("adamw_8bit: parameters must be one or more, got none")
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"adamw_8bit: parameters must be tensors or groups of them, got {type(tensor).__name__}")
        if tensor.device.type not in DEVICES:
            raise ValueError(f"adamw_8bit: parameters must be on {', '.join(DEVICES)}, got one on {tensor.device}")
        if library == "bitsandbytes" and isinstance(tensor, DTensor):
            raise ValueError("adamw_8bit: library must be 'torchao' for sharded parameters, got 'bitsandbytes'")


def _listed(group: Any) -> list[Any]:
    return list(group) if isinstance(group, (list, tuple)) else [group]
