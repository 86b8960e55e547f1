"""`StorageTracker`: the bytes of live tensor storages while code runs, on any device, the data-free `meta` included.

torch's own estimators were tried first. `MemTracker` files storages by module and knows no attention workspace, no
calls that are simulated once, and no timeline, which a model's full depth is made from; `SACEstimator` times operations
on the device that is to be forecast. Both want fake tensors on a device that a machine without it cannot make.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twinflow.memory.planner.simulation.timeline import Region

ALIGNMENT = 512  # bytes; the CUDA caching allocator rounds every request up to it
Cost = Callable[[Any, tuple, dict, Any], Any]


def aligned(count: int) -> int:
    """Bytes that the allocator gives for a request."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of a pytree."""
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


class StorageTracker(TorchDispatchMode):
    """Counts every storage that an operation makes for as long as it lives, in regions that the caller marks.

    A storage that exists before counts only where it was given to `watch`. What kernels allocate inside themselves is
    unseen; `workspace` says it.

    Args:
        workspace: (operation, arguments, keywords, result) -> bytes that it holds while it runs; None: none.
        cost: likewise -> what it costs, anything with `+`; None: nothing is summed.

    Attributes:
        live: bytes now.
        regions: what has been marked so far, in order of time.
    """

    def __init__(
        self,
        workspace: Callable[[Any, tuple, dict, Any], int] | None = None,
        cost: Cost | None = None,
        rounding: Callable[[int], int] = aligned,
    ) -> None:
        super().__init__()
        self.live = 0
        self._workspace, self._cost, self._rounding = workspace, cost, rounding
        self._known: dict[int, weakref.finalize] = {}
        self.regions: list[Region] = []
        self.mark("start")

    def mark(self, name: str, block: str | None = None) -> None:
        """Ends the current region and begins another."""
        if self.regions:
            self.regions[-1].end = self.live
        self.regions.append(Region(name, block, self.live, self.live, self.live))

    def watch(self, tree: Any) -> None:
        """Counts storages that exist already."""
        for tensor in tensors(tree):
            self._add(tensor)

    def peak(self) -> int:
        """The most bytes live at any time, workspaces included."""
        return max(region.most for region in self.regions)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0 or torch._is_zerotensor(tensor):  # zeros that are not there
            return
        count = self._rounding(storage.nbytes())
        self.live += count
        region = self.regions[-1]
        self._known[key] = weakref.finalize(storage, self._free, key, count, (region.name, region.block))
        self._known[key].atexit = False

    def _free(self, key: int, count: int, made: tuple[str, str | None]) -> None:
        del self._known[key]
        self.live -= count
        region = self.regions[-1]
        region.end = self.live
        region.freed[made] = region.freed.get(made, 0) + count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self._add(tensor)
        region = self.regions[-1]
        region.end = self.live
        extra = self._workspace(func, args, kwargs, result) if self._workspace else 0
        if self.live + extra > region.most:
            region.most, region.workspace = self.live + extra, extra
        if self._cost is not None:
            spent = self._cost(func, args, kwargs, result)
            region.cost = spent if region.cost is None else region.cost + spent
        return result

    def close(self) -> None:
        """Forgets every storage; those that live on are no longer followed."""
        for finalizer in self._known.values():
            finalizer.detach()
        self._known.clear()
