"""`replace_forward()`, `refuse_moves()`: what deferring puts on single modules, and takes off again."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


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


def refuse_moves(module: nn.Module, device: str) -> Callable[[], None]:
    """Makes a module refuse to be moved or cast.

    Args:
        module: the module.
        device: where it is, for the message.

    Returns:
        What undoes it.
    """

    def refuse(*args: Any, **kwargs: Any) -> nn.Module:
        raise RuntimeError(
            f"defer_modulation: the model must stay on {device} and in its dtype while its modulation is "
            "deferred, got a move or a cast; remove() the deferral, move, and defer again (or defer with device=)"
        )

    module.__dict__["_apply"] = refuse

    def undo() -> None:
        module.__dict__.pop("_apply", None)

    return undo
