"""What a kernel touches, watched in Triton's interpreter: nothing outside its tensors, nothing that was never written.

The interpreter reads and writes at addresses; each is looked up among the tensors of the launch. New tensors are
filled with a NaN of their own, which no arithmetic makes: reading one is told from reading a NaN that was given.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from twinflow_kernels import _registry

# Bit patterns by element size: quiet NaNs with a payload; as integers, numbers that no table holds.
POISON = {8: 0x7FFCA5A5A5A5A5A5, 4: 0x7FE5A5A5, 1: 0x5A}
_POISON_16 = {torch.bfloat16: 0x7FE5, torch.float16: 0x7EA5}
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_SIZES = {code: dtype.itemsize for dtype, code in _registry.DTYPE_CODES.items()}


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with the poison of its dtype."""
    size = x.element_size()
    if x.device.type == "cpu" and type(x) is torch.Tensor and x.dtype.is_floating_point:
        x.view(_INTEGERS[size]).fill_(_POISON_16.get(x.dtype, POISON[4 if size == 2 else size]))
    return x


class Watch:
    """The addresses that the launch in progress may touch."""

    def __init__(self) -> None:
        self.kernel = ""
        self.begins = self.ends = np.zeros(1, dtype=np.int64)  # of the tensors' ranges, rising
        self.tables: list[tuple[int, int]] = []  # of tensors whose addresses a kernel reads from a table

    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        """Begins a launch of a kernel on tensors."""
        self.kernel = kernel
        spans = [(x.data_ptr(), x.data_ptr() + _span(x)) for x in tensors if x.numel()]
        self.begins, ends = np.array(sorted([*spans, *self.tables]) or [(0, 0)], dtype=np.int64).T
        self.ends = np.maximum.accumulate(ends)  # a tensor may lie within another

    def check(self, what: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Fails the test where an address is outside of every tensor."""
        touched = addresses[mask].astype(np.int64)
        if not touched.size:
            return
        place = np.searchsorted(self.begins, touched, "right") - 1
        outside = (place < 0) | (touched + size > self.ends[place])
        if outside.any():
            pytest.fail(f"{self.kernel} {what} {int(outside.sum())} elements outside of its tensors")

    def check_written(self, values: np.ndarray, mask: np.ndarray, dtype: Any) -> None:
        """Fails the test where a value is one that was never written."""
        size = values.dtype.itemsize
        patterns = list(_POISON_16.values()) if size == 2 else [POISON[size]]
        bits = values[mask].view(f"u{size}")
        if dtype.is_floating() and any((bits == pattern).any() for pattern in patterns):
            pytest.fail(f"{self.kernel} reads what was never written")


def _span(x: torch.Tensor) -> int:
    return (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def watch_kernels(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """From now on each access of an interpreted kernel is checked."""
    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    ema_update = importlib.import_module("twinflow_kernels.ema_update")
    launch_triton = ema_update.launch_triton

    def masked_load(self: Any, ptrs: Any, mask: Any, *more: Any) -> Any:
        read = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
        dtype = ptrs.get_element_ty()
        watch.check("reads", ptrs.data, read, interpreter._get_np_dtype(dtype).itemsize)
        found = load(self, ptrs, mask, *more)
        watch.check_written(found.data, read, dtype)
        return found

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        watch.check("writes", ptrs.data, np.broadcast_to(mask.data.astype(bool), ptrs.data.shape), size)
        return store(self, ptrs, value, mask, *more)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.launch(self.fn.__name__, [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        return call(self, *args, **kwargs)

    def launched_table(table: np.ndarray, *more: Any) -> None:
        watch.tables = [
            (int(address), int(address) + int(row["count"]) * _SIZES[int(dtype)])
            for row in table for address, dtype in zip(row["address"], row["dtype"][:3], strict=True) if address
        ]  # fmt: skip
        try:
            launch_triton(table, *more)
        finally:
            watch.tables = []

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poisoned(make(*args, **kwargs))

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    monkeypatch.setattr(executor, "__call__", launched)
    monkeypatch.setattr(ema_update, "launch_triton", launched_table)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    return watch
