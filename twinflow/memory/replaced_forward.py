"""`replace_forward()`, `refuse_moves()`, `hide_from_ddp()`: what deferring puts on modules, and takes off again."""

from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import nn

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Gives a module another forward, a method of it, so that a deep copy's is the copy's.

    Args:
        module: the module.
        function: of the module and the call's arguments.

    Returns:
        What undoes it.
    """
    installed = module.__dict__["forward"] = MethodType(function, module)

    def undo() -> None:
        if module.__dict__.get("forward") is installed:
            del module.__dict__["forward"]

    return undo


def refuse_moves(module: nn.Module, device: torch.device, dtypes: Collection[torch.dtype]) -> Callable[[], None]:
    """Makes a module refuse to be moved or cast; what would change nothing, as `to` its own device, does nothing.

    Args:
        module: the module.
        device: where it is.
        dtypes: of its parameters.

    Returns:
        What undoes it.
    """

    def stay(change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dtypes:
            before = torch.empty(0, dtype=dtype, device=device)
            after = change(before)
            if (after.device, after.dtype) != (before.device, before.dtype):
                raise RuntimeError(
                    f"defer_modulation: the model must stay on {device} and in its dtype while its modulation is "
                    f"deferred, got a change to {after.dtype} on {after.device}; remove() the deferral, move, and "
                    "defer again (or defer with device=)"
                )
        return module

    module.__dict__["_apply"] = stay

    def undo() -> None:
        module.__dict__.pop("_apply", None)

    return undo


def hide_from_ddp(module: nn.Module, parameters: Collection[torch.Tensor]) -> Callable[[], None]:
    """Makes DDP's wrapper pass over frozen parameters that are on another device than the rest.

    Args:
        module: that is wrapped later.
        parameters: some of its own.

    Returns:
        What undoes it.
    """
    hidden = {id(parameter) for parameter in parameters}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in hidden]
    before = list(getattr(module, _IGNORED, ()))
    module.__dict__[_IGNORED] = before + names

    def undo() -> None:
        del module.__dict__[_IGNORED]
        if before:
            module.__dict__[_IGNORED] = before

    return undo
