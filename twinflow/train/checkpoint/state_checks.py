"""State between a run and the host: copies of what a run has, and saved values checked against it and put in place."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


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
        if is_8bit(tree.to_local()):
            raise ValueError(
                "collect: optimizer must keep plain tensors where parameters are sharded, got 8-bit states"
            )
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


def check_form(saved: Any, mine: Any, path: str) -> None:
    """Raises ValueError, naming the first difference, unless saved values have the form of this run's own."""
    if isinstance(mine, torch.Tensor):
        check_tensor(saved, mine.shape, mine.dtype, path)
    elif isinstance(mine, dict):
        check_names(saved, mine, path)
        for key, value in mine.items():
            check_form(saved[key], value, f"{path}[{key!r}]")
    elif isinstance(mine, (list, tuple)):
        if type(saved) is not type(mine) or len(saved) != len(mine):
            raise ValueError(f"restore: {path} must be {len(mine)} values, got {str(saved)[:80]} in the checkpoint")
        for number, value in enumerate(mine):
            check_form(saved[number], value, f"{path}[{number}]")
    else:
        number = type(mine) in (int, float) and type(saved) in (int, float)
        if type(saved) is not type(mine) and not number:
            wanted, got = type(mine).__name__, type(saved).__name__
            raise ValueError(f"restore: {path} must be of type {wanted}, got {got} in the checkpoint")


def check_names(saved: Any, mine: dict[Any, Any], path: str) -> None:
    """Raises ValueError unless a saved value is a dict with this run's keys."""
    if not isinstance(saved, dict):
        raise ValueError(f"restore: {path} must be a dict, got {type(saved).__name__} in the checkpoint")
    more, less = sorted(map(str, saved.keys() - mine.keys())), sorted(map(str, mine.keys() - saved.keys()))
    if more or less:
        there, here = ", ".join(more[:3]) or "none", ", ".join(less[:3]) or "none"
        raise ValueError(
            f"restore: {path} must have the names that were saved, got a difference: only in the checkpoint {there}; "
            f"only in this run {here}"
        )


def check_tensor(saved: Any, shape: tuple[int, ...], dtype: torch.dtype | None, path: str) -> None:
    """Raises ValueError unless a saved value is a tensor of this shape and dtype (None: any)."""
    if not isinstance(saved, torch.Tensor):
        raise ValueError(f"restore: {path} must be a tensor, got {type(saved).__name__} in the checkpoint")
    if tuple(saved.shape) != tuple(shape):
        raise ValueError(
            f"restore: {path} must be of shape {tuple(shape)}, got {tuple(saved.shape)} in the checkpoint: it is of "
            "another model or rank"
        )
    if dtype is not None and saved.dtype != dtype:
        raise ValueError(f"restore: {path} must be {dtype}, got {saved.dtype} in the checkpoint")
