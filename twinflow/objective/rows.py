"""Rows of tensors and of conditions: a condition is any pytree whose tensor leaves have a batch axis in front."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from twinflow.errors import ArgumentError, ArgumentTypeError

Rows = tuple[int, ...]


def positions(chosen: Rows, rows: Rows) -> Rows:
    """Where the chosen ones of some rows stand among them."""
    place = {row: k for k, row in enumerate(rows)}
    return tuple(place[row] for row in chosen)


class RowSelector:
    """Takes rows out of tensors and conditions; a row index goes to the device once per step.

    Args:
        batch: the number of rows B.
        device: where the tensors live.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.device = device
        self.all_rows = tuple(range(batch))
        self._spans: dict[Rows, tuple[int, int] | None] = {self.all_rows: (0, batch)}
        self._indices: dict[tuple[Rows, torch.device], torch.Tensor] = {}

    def index(self, rows: Rows, device: torch.device | None = None) -> torch.Tensor:
        """The rows as an int64 tensor, on the latents' device or another."""
        device = self.device if device is None else device
        index = self._indices.get((rows, device))
        if index is None:
            index = torch.from_numpy(_index(rows))  # torch.tensor costs twice as much
            index = index if device.type == "cpu" else index.to(device, non_blocking=True)
            self._indices[rows, device] = index
        return index

    def take(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Rows of a (B, ...) tensor: the tensor itself, a view of neighbouring rows, or a copy."""
        if rows not in self._spans:
            neighbours = rows and rows == self.all_rows[rows[0] : rows[-1] + 1]
            self._spans[rows] = (rows[0], len(rows)) if neighbours else None
        span = self._spans[rows]
        if span is None:
            return x.index_select(0, self.index(rows, x.device))
        return x if span[1] == self.batch else x.narrow(0, *span)

    def put(self, x: torch.Tensor, rows: Rows, values: torch.Tensor) -> None:
        """Writes rows of a (B, ...) tensor in place."""
        x.index_copy_(0, self.index(rows), values if values.dtype == x.dtype else values.to(x.dtype))

    def take_condition(self, condition: Any, rows: Rows) -> Any:
        """Rows of every tensor leaf."""
        if isinstance(condition, torch.Tensor):
            return self.take(condition, rows)
        if type(condition) is dict:  # most conditions are: a pytree's walk costs the host ten times as much
            return {name: self.take_condition(value, rows) for name, value in condition.items()}
        return pytree.tree_map_only(torch.Tensor, lambda leaf: self.take(leaf, rows), condition)


@lru_cache(maxsize=256)  # roles come round again, step after step
def _index(rows: Rows) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def concatenate(conditions: Sequence[Any]) -> Any:
    """Joins conditions of one structure along the batch axis; leaves that are not tensors are the first's."""
    first, *others = conditions
    if not others:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat([*conditions])
    leaves, spec = pytree.tree_flatten(first)
    columns = zip(leaves, *(pytree.tree_leaves(other) for other in others), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, spec)


def broadcast_condition(condition: Any, batch: int) -> Any:
    """Expands tensor leaves of batch 1 to `batch` rows, as views."""

    def expand(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.expand(batch, *leaf.shape[1:]) if leaf.shape[0] == 1 != batch else leaf

    return (
        expand(condition)
        if isinstance(condition, torch.Tensor)
        else pytree.tree_map_only(torch.Tensor, expand, condition)
    )


def same_leaf_shapes(a: Any, b: Any) -> bool:
    """Whether two conditions can be one call: equal structure, leaf shapes and dtypes, and equal other leaves."""
    a_leaves, a_spec = pytree.tree_flatten(a)
    b_leaves, b_spec = pytree.tree_flatten(b)
    if a_spec != b_spec:
        return False
    for x, y in zip(a_leaves, b_leaves, strict=True):
        if isinstance(x, torch.Tensor) != isinstance(y, torch.Tensor):
            return False
        if isinstance(x, torch.Tensor):
            if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
                return False
        elif x is not y and x != y:
            return False
    return True


def check_condition(where: str, name: str, condition: Any, latents: torch.Tensor, broadcast: bool = False) -> None:
    """Raises TypeError or ValueError unless every tensor can be reached and has the latents' batch axis and device.

    Integer tensors may stay on the CPU: what a network reads on the host, such as prompt lengths.

    Args:
        where, name: the function and argument, for the message.
        condition: any pytree, or None.
        latents: (B, ...).
        broadcast: whether a batch of 1 will do.
    """
    batch, device = latents.shape[0], latents.device
    # Paths cost the host ten times as much as leaves, so they are made for a message only.
    if all(_fits(leaf, batch, device, broadcast) for leaf in pytree.tree_leaves(condition)):
        return
    for path, leaf in pytree.tree_flatten_with_path(condition)[0]:
        label = name + pytree.keystr(path)
        if not isinstance(leaf, torch.Tensor):
            # Its rows could not be taken: a network called with some of the rows would get the condition of all.
            held = getattr(leaf, "__dict__", {}).values()
            if isinstance(leaf, Mapping) or hasattr(leaf, "shape") or any(isinstance(v, torch.Tensor) for v in held):
                wanted = "a pytree of tensors (register the class with torch.utils._pytree, or pass a dict)"
                raise ArgumentTypeError(where, label, wanted, type(leaf).__name__)
            continue
        if leaf.dim() == 0 or (leaf.shape[0] != batch and not (broadcast and leaf.shape[0] == 1)):
            wanted = f"a tensor whose first axis is the batch of {batch}" + (" or 1" if broadcast else "")
            raise ArgumentError(where, label, wanted, f"shape {tuple(leaf.shape)}")
        on_host = leaf.device.type == "cpu" and not leaf.is_floating_point()  # lengths, read without a sync
        if leaf.device != latents.device and not on_host:
            raise ArgumentError(where, label, f"on the latents' device {latents.device}", leaf.device)


def _fits(leaf: Any, batch: int, device: torch.device, broadcast: bool) -> bool:
    """Whether a leaf is a tensor of the batch on the device; False where it takes a closer look."""
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.device != device:
        return False
    return leaf.shape[0] == batch or (broadcast and leaf.shape[0] == 1)
