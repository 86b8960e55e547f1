"""What deferring puts on modules, and takes off again: forwards, a refusal to move, names that DDP passes over."""

from collections.abc import Callable, Collection
from types import MethodType

import torch
from torch import nn

from twinflow.memory.modulation.table import Slot

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names


def sliced(slot: Slot, units: torch.Tensor, active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """A modulation layer's forward: its part of the carrier that comes in the embedding's place.

    Args:
        slot: which part.
        units: the same on the device.
        active: says whether a carrier comes; else, as in a copy that outlived the deferral, the layer does its own.
    """

    def forward(module: nn.Module, carrier: torch.Tensor) -> torch.Tensor:
        if not active():
            return type(module).forward(module, carrier)
        if torch.compiler.is_compiling():  # places as data: blocks that are alike are compiled once
            return carrier.index_select(1, units).flatten(1)
        return carrier.narrow(1, slot.first, slot.count).flatten(1)

    return forward


def passed_on(active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """The forward of an activation before modulation layers, which has been applied already."""

    def forward(module: nn.Module, carrier: torch.Tensor) -> torch.Tensor:
        return carrier if active() else type(module).forward(module, carrier)

    return forward


def refuse_moves(
    module: nn.Module, device: torch.device, dtypes: Collection[torch.dtype], active: Callable[[], bool]
) -> Callable[[], None]:
    """Makes a module refuse to be moved or cast; what would change nothing, as `to` its own device, does nothing.

    Args:
        active: says whether it still must; a copy of the module asks too.

    Returns:
        What undoes it.
    """

    def stay(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if not active():
            return type(module)._apply(module, change, recurse)
        for dtype in dtypes:
            before = torch.empty(0, dtype=dtype, device=device)
            after = change(before)
            if (after.device, after.dtype) != (before.device, before.dtype):
                raise RuntimeError(
                    f"defer_modulation: the model must stay on {device} and in its dtype while its modulation is "
                    f"deferred, got a change to {after.dtype} on {after.device}; remove() the deferral first"
                )
        return module

    module.__dict__["_apply"] = MethodType(stay, module)

    def undo() -> None:
        module.__dict__.pop("_apply", None)

    return undo


def hide_from_ddp(module: nn.Module, parameters: Collection[torch.Tensor]) -> Callable[[], None]:
    """Makes DDP's wrapper pass over frozen parameters that are on another device than the rest.

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
