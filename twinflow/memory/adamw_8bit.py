"""`adamw_8bit()`: AdamW whose moments take a byte a value each, by bitsandbytes or torchao."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from twinflow.errors import ArgumentError, ArgumentTypeError, require
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
    require(library in _CLASSES, "adamw_8bit", "library", f"one of {', '.join(_CLASSES)}", repr(library))
    groups = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    _check_groups(groups, library)
    load_library(library, "adamw_8bit")
    optimizer: Any = importlib.import_module(_CLASSES[library])
    return optimizer.AdamW8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _check_groups(groups: list[Any], library: str) -> None:
    members = [group["params"] if isinstance(group, dict) else group for group in groups]
    tensors = [t for member in members for t in (member if isinstance(member, (list, tuple)) else [member])]
    require(tensors, "adamw_8bit", "parameters", "one or more", "none")
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError("adamw_8bit", "parameters", "tensors or groups of them", type(tensor).__name__)
        if tensor.device.type not in DEVICES:
            raise ArgumentError("adamw_8bit", "parameters", f"on {', '.join(DEVICES)}", f"one on {tensor.device}")
        sharded = library == "bitsandbytes" and isinstance(tensor, DTensor)
        require(not sharded, "adamw_8bit", "library", "'torchao' for sharded parameters", "'bitsandbytes'")
