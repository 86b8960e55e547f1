"""State between a run and the host: copies of what a run has, and saved values checked against it and put in place."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from twinflow.errors import require
from twinflow.interface import plain_name


def snapshot(tree: Any, keep: bool = True) -> Any:
    """A tree's copy on the CPU, sharded tensors gathered; every rank must call it with the same tree.

    Args:
        tree: dicts, lists, tuples, tensors and plain values.
        keep: False: take part, and return None in place of each tensor.

    Raises:
        ValueError: sharded 8-bit states, which cannot be gathered.
    """
    if isinstance(tree, dict):
        return {key: snapshot(value, keep) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(snapshot(value, keep) for value in tree)
    if not isinstance(tree, torch.Tensor):
        return tree
    if isinstance(tree, DTensor):
        wanted = "plain tensors where parameters are sharded"
        require(not is_8bit(tree.to_local()), "collect", "optimizer", wanted, "8-bit states", verb="keep")
        tree = tree.full_tensor()
    return copied(tree, torch.device("cpu")) if keep else None


def is_8bit(value: Any) -> bool:
    """Whether a tensor is torchao's 8-bit state, several tensors in one."""
    return hasattr(value, "codes") and hasattr(value, "qmap")


def copied(value: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """A tensor that shares no memory with the given one."""
    if is_8bit(value):
        parts: Any = value
        mine = [copied(part, device) for part in (parts.codes, parts.scale, parts.qmap)]
        return type(parts)(*mine, parts.signed, parts.dtype)
    return value.detach().to(value.device if device is None else device, copy=True)


def placed(saved: Any, like: Any) -> Any:
    """Saved values with tensors sharded where this run's are; others share no memory with the saved ones."""
    if isinstance(like, dict):
        return {key: placed(saved[key], value) for key, value in like.items()}
    if isinstance(like, (list, tuple)):
        return type(like)(placed(a, b) for a, b in zip(saved, like, strict=True))
    if isinstance(like, DTensor):
        # Every rank has read the whole tensor and takes its own part.
        whole = saved.to(like.device)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return copied(saved) if isinstance(saved, torch.Tensor) else saved


def require_saved(condition: object, path: str, wanted: str, got: object, hint: str = "", verb: str = "be") -> None:
    """Raises ArgumentError unless what the checkpoint has at a path is as wanted; arguments as for `require`."""
    require(condition, "restore", path, wanted, f"{got} in the checkpoint", hint, verb)


def plain_state(saved: Any) -> Any:
    """Saved values with parameters under their plain names, as keys and as texts; see `plain_name`."""
    if isinstance(saved, dict):
        return {plain_state(key): plain_state(value) for key, value in saved.items()}
    if isinstance(saved, list):
        return [plain_state(value) for value in saved]
    return plain_name(saved) if isinstance(saved, str) else saved


def check_form(saved: Any, mine: Any, path: str) -> None:
    """Raises ArgumentError, naming the first difference, unless saved values have the form of this run's own."""
    if isinstance(mine, torch.Tensor):
        check_tensor(saved, mine.shape, mine.dtype, path)
    elif isinstance(mine, dict):
        check_names(saved, mine, path)
        for key, value in mine.items():
            check_form(saved[key], value, f"{path}[{key!r}]")
    elif isinstance(mine, (list, tuple)):
        alike = type(saved) is type(mine) and len(saved) == len(mine)
        require_saved(alike, path, f"{len(mine)} values", str(saved)[:80])
        for number, value in enumerate(mine):
            check_form(saved[number], value, f"{path}[{number}]")
    else:
        alike = type(saved) is type(mine) or {type(saved), type(mine)} <= {int, float}
        require_saved(alike, path, f"of type {type(mine).__name__}", type(saved).__name__)


def check_names(saved: Any, mine: dict[Any, Any], path: str) -> None:
    """Raises ArgumentError unless a saved value is a dict with this run's keys."""
    require_saved(isinstance(saved, dict), path, "a dict", type(saved).__name__)
    more, less = sorted(map(str, saved.keys() - mine.keys())), sorted(map(str, mine.keys() - saved.keys()))
    there, here = ", ".join(more[:3]) or "none", ", ".join(less[:3]) or "none"
    got = f"a difference: only in the checkpoint {there}; only in this run {here}"
    require(not more and not less, "restore", path, "the names that were saved", got, verb="have")


def check_tensor(saved: Any, shape: tuple[int, ...], dtype: torch.dtype | None, path: str) -> None:
    """Raises ArgumentError unless a saved value is a tensor of this shape and dtype (None: any)."""
    require_saved(isinstance(saved, torch.Tensor), path, "a tensor", type(saved).__name__)
    wanted, got = tuple(shape), tuple(saved.shape)
    require_saved(got == wanted, path, f"of shape {wanted}", got, "it is of another model or rank")
    require_saved(dtype in (None, saved.dtype), path, str(dtype), saved.dtype)
