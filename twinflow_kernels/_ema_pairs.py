"""The table of addresses that the kernels of `ema_update_` work through, and the checks that need addresses.

Thousands of tensors make a Python loop the largest cost of a small update. The usual case goes through the compiled
`TensorReader` (DLPack's C exchange table, torch >= 2.10): 2,000 pairs in 0.3 ms instead of 5 ms. Whatever is out of the
ordinary (a strided source, a tensor subclass, an overlap, no compiled module) takes the code here.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from twinflow_kernels import _backend, _registry
from twinflow_kernels._registry import require, require_floating

WHERE = "ema_update_"
Tensors = Sequence[torch.Tensor]
# csrc/kernels.h: EmaPair
PAIR = np.dtype([("address", np.int64, 3), ("count", np.int64), ("dtype", np.int16, 4)])


@cache
def _reader() -> object | None:
    """The compiled reader of tensor lists, or None where there is no compiled module."""
    module = _backend.native()
    return None if module is None else module.TensorReader(torch.Tensor, torch.nn.Parameter)


def prepare(targets: Tensors, sources: Tensors, copies: Tensors) -> tuple[np.ndarray, Tensors]:
    """The table of an update whose tensors pass every check, and the sources whose addresses it holds.

    Args:
        targets, sources: as in `ema_update_`; a strided source is copied.
        copies: those of the first len(copies) targets.

    Raises:
        TypeError, ValueError: as `ema_update_` does for its tensors.
    """
    table = np.empty(len(targets), PAIR)
    reader = _reader()
    if reader is not None and reader.ema_pairs(targets, sources, copies, table.ctypes.data):  # type: ignore[attr-defined]
        return table, sources
    check_lists(targets, sources, [*copies, *[None] * (len(targets) - len(copies))])
    _check_memory([*targets, *copies], sources)
    sources = [x.contiguous() for x in sources]
    return _python_table(targets, sources, copies), sources


def _python_table(targets: Tensors, sources: Tensors, copies: Tensors) -> np.ndarray:
    table = np.zeros(len(targets), PAIR)
    for column, tensors in enumerate((targets, sources, copies)):
        table["address"][: len(tensors), column] = [x.data_ptr() for x in tensors]
        table["dtype"][: len(tensors), column] = [_registry.dtype_code(x.dtype) for x in tensors]
    table["count"] = [x.numel() for x in targets]
    return table


def check_lists(targets: Tensors, sources: Tensors, copies: Sequence[torch.Tensor | None] | None) -> None:
    """Raises TypeError or ValueError for the first tensor that has no place in an update."""
    for i, target in enumerate(targets):
        require_floating(WHERE, f"targets[{i}]", target)
    for name, tensors in (("targets", targets), ("sources", sources), ("copies", copies)):
        if tensors is None:
            continue
        require(len(tensors) == len(targets), WHERE, name, f"as long as targets, {len(targets)}", len(tensors))
        for i, x in enumerate(tensors):
            if x is not None or name != "copies":
                _check_tensor(name, i, x, targets)


def _check_tensor(name: str, i: int, x: torch.Tensor | None, targets: Tensors) -> None:
    here = f"{name}[{i}]"
    require_floating(WHERE, here, x)
    assert x is not None
    shape, device = targets[i].shape, targets[0].device
    require(x.shape == shape, WHERE, here, f"of targets[{i}]'s shape {tuple(shape)}", tuple(x.shape))
    require(x.device == device, WHERE, here, f"on targets[0]'s device {device}", x.device)
    require(x.layout == torch.strided, WHERE, here, "dense", f"layout {x.layout}")
    if name != "sources":
        require(x.is_contiguous(), WHERE, here, "contiguous, as it is written", f"strides {x.stride()}")
        require(not x.requires_grad, WHERE, here, "a tensor without requires_grad", "requires_grad=True")


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The address of the first byte and of the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check_memory(written: Tensors, read: Tensors) -> None:
    """Raises ValueError where a written tensor shares memory with another written or a read one; O(n log n)."""
    spans = [(*_span(x), True) for x in written if x.numel()] + [(*_span(x), False) for x in read if x.numel()]
    any_end = written_end = 0  # the furthest end of the ranges so far, and of the written ones
    for begin, end, is_written in sorted(spans):
        clash = begin < (any_end if is_written else written_end)
        require(not clash, WHERE, "targets and copies", "memory of their own", "an overlap among them or with a source")
        any_end = max(any_end, end)
        written_end = max(written_end, end) if is_written else written_end
