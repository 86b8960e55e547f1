"""`repeated_blocks()`: the blocks of a network in order of execution, what stands around them, and their forwards."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from twinflow.errors import ArgumentError, require

_Attached = TypeVar("_Attached", bound="Attached")
_DECLARED = ("_repeated_blocks", "_no_split_modules")  # where a diffusers class names its blocks' classes
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what compiled and checkpointed modules hold
_UNET_STAGES = ("down_blocks", "mid_block", "up_blocks")
_UNET_LAYERS = ("resnets", "attentions")  # the i-th attention runs behind the i-th residual block


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a diffusers network, in order of execution.

    They are the entries of `nn.ModuleList`s whose class the network names in `_repeated_blocks` or
    `_no_split_modules`; of blocks inside one another, the inner ones.

    Args:
        model: the network, or a module around it: a `FlowModel`, or the wrapper of peft, DDP or torch.compile.

    Returns:
        Name within `model` -> block.

    Raises:
        ValueError: there are none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    wanted = {c for m in model.modules() for attribute in _DECLARED for c in getattr(m, attribute, None) or ()}
    entries = (_unwrapped(f"{name}.{i}".lstrip("."), m) for name, held in lists.items() for i, m in enumerate(held))
    found = {name: module for name, module in entries if any(c.__name__ in wanted for c in type(module).__mro__)}
    inner = {name: block for name, block in found.items() if not any(n.startswith(f"{name}.") for n in found)}
    if not inner:
        lack = f"none of the {', '.join(sorted(wanted))} that it names" if wanted else "no class that names its blocks"
        held_types = sorted({type(m).__name__ for held in lists.values() for m in held})
        got = f"{type(model).__name__} with {lack} (its lists hold: {', '.join(held_types) or 'nothing'})"
        hint = "give the blocks themselves, or their names"
        raise ArgumentError("repeated_blocks", "model", "repeated blocks in lists", got, hint, verb="hold")
    return dict(sorted(inner.items(), key=lambda item: _unet_place(item[0])))


def named_blocks(model: nn.Module, blocks: Sequence[str | nn.Module], where: str) -> dict[str, nn.Module]:
    """Name -> block, of blocks that a caller gives by name or as modules of `model`; in the given order.

    Raises:
        ValueError: one is not in the model, given twice or inside another, or there are none.
    """
    by_name = dict(model.named_modules())
    names = {id(module): name for name, module in by_name.items()}
    chosen: dict[str, nn.Module] = {}
    for block in blocks:
        name = block if isinstance(block, str) else names.get(id(block))
        if name is None or name not in by_name:
            got = repr(block) if isinstance(block, str) else f"another {type(block).__name__}"
            raise ArgumentError(where, "blocks", "modules of the model or their names", got)
        apart = not any(name == n or _is_inside(name, n) or _is_inside(n, name) for n in chosen)
        require(apart, where, "blocks", "apart from one another", f"{name!r} twice or inside another")
        chosen[name] = by_name[name]
    require(chosen, where, "blocks", "one block or more", "none", verb="name")
    return chosen


def adapter_rank(block: nn.Module) -> int:
    """The largest rank of the block's peft layers; 0 without."""
    ranks = (getattr(module, "r", None) for module in block.modules())
    return max((rank for by_name in ranks if isinstance(by_name, dict) for rank in by_name.values()), default=0)


def checkpoint_switches(model: nn.Module) -> list[nn.Module]:
    """The modules with a `gradient_checkpointing` flag, as diffusers and transformers have."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def checkpoint_wrapped(model: nn.Module, block: str) -> str | None:
    """Name of a torch `CheckpointWrapper` around or inside a block; None without."""
    for name, module in model.named_modules():
        if hasattr(module, "_checkpoint_wrapped_module") and (_is_inside(name, block) or _is_inside(block, name)):
            return name
    return None


class Attached:
    """What is attached to a model until `remove()`; as a context manager it is removed at the end."""

    def __init__(self, removals: list[Callable[[], None]]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Takes it off again, what came last first; a second call does nothing."""
        while self._removals:
            self._removals.pop()()

    def __enter__(self: _Attached) -> _Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Gives a module another forward: a method, so that a deep copy of the module runs it with the copy's weights.

    Args:
        function: of the module and the call's arguments.

    Returns:
        What undoes it, unless another forward has been put in its place since.
    """
    before, installed = vars(module).get("forward"), MethodType(function, module)
    module.__dict__["forward"] = installed

    def undo() -> None:
        if vars(module).get("forward") is installed:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before

    return undo


def _is_inside(name: str, outer: str) -> bool:
    return not outer or f"{name}.".startswith(f"{outer}.")


def _unwrapped(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module inside compilation and checkpointing wrappers."""
    for attribute in _WRAPPED:
        while isinstance(inner := getattr(module, attribute, None), nn.Module):
            name, module = f"{name}.{attribute}", inner
    return name, module


def _unet_place(name: str) -> tuple[int, ...]:
    """Sorts a UNet's blocks by stage, level and layer, since they are registered otherwise; no others."""
    parts = name.split(".")
    stage = next((i for i, part in enumerate(parts) if part in _UNET_STAGES), None)
    if stage is None:
        return ()
    place = [_UNET_STAGES.index(parts[stage])]
    for before, part in zip(parts[stage:], parts[stage + 1 :], strict=False):
        if part.isdigit():
            kind = _UNET_LAYERS.index(before) if before in _UNET_LAYERS else 0
            place.append(2 * int(part) + kind)
    return tuple(place)
