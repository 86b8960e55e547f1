"""A device that torch has no kernels of ours for, and no float64, as Apple's GPUs: its tensors are computed on the CPU.

Importing it renames torch's private device for the whole process; for tests in processes of their own.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
_setup_privateuseone_for_python_backend(NAME)


class Elsewhere(torch.Tensor):
    """A tensor of the device, and the CPU tensor that holds its numbers."""

    held: torch.Tensor

    def data_ptr(self) -> int:
        return self.held.data_ptr()


def moved(x: torch.Tensor) -> torch.Tensor:
    """A CPU tensor's numbers on the device."""
    if x.dtype == torch.float64:
        raise TypeError("this device has no float64")
    found = torch._C._acc.create_empty_tensor(tuple(x.shape), x.dtype)
    found.__class__ = Elsewhere
    found.held = x
    return found


def held(x: Any) -> Any:
    """The CPU tensor with a tensor's numbers; anything else as it is."""
    return x.held if isinstance(x, Elsewhere) else x


def _outside(x: Any, written: dict[int, Elsewhere]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return written[id(x)] if id(x) in written else moved(x)


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    inside, named = tree_map(held, args), tree_map(held, kwargs)
    if op.name() == "aten::_copy_from":
        inside[1].copy_(inside[0])
        return args[1]
    if "device" in named:
        named["device"] = "cpu"
    results = op(*inside, **named)
    written = {id(x.held): x for x in args if isinstance(x, Elsewhere)}
    return tree_map(lambda x: _outside(x, written), results)


_library = torch.library.Library("_", "IMPL")
_library.fallback(_compute, "PrivateUse1")
