"""`Cost`: floating-point operations, bytes moved and least seconds of an operation on a card."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

import twinflow_kernels  # noqa: F401 - its operations
from twinflow.memory.planner.gpus import GPU
from twinflow.memory.planner.simulation.storage_tracker import tensors

_HALF = (torch.bfloat16, torch.float16)
_FREE = {  # operations that move no memory though they are no views, and the average's, which is counted by parameter
    torch.ops.twinflow.ema_update_.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._unsafe_view.default,
}


@dataclass(frozen=True)
class Cost:
    """What operations take, in sum.

    Args:
        flops: of matrix products, convolutions and attention.
        moved: bytes read and written, each argument and result once per operation.
        seconds: sum over the operations of the longer of both on one card at its data sheet's speed.
    """

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.moved + other.moved, self.seconds + other.seconds)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.moved * times, self.seconds * times)


class CostOf:
    """(operation, arguments, keywords, result) -> its `Cost` on a card."""

    def __init__(self, gpu: GPU) -> None:
        self._gpu = gpu

    def __call__(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Cost:
        if func.is_view or func in _FREE:
            return Cost()
        moved, half = 0, True
        for tensor in tensors((args, kwargs, result)):
            moved += min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            half = half and (tensor.dtype in _HALF or not tensor.is_floating_point() or tensor.dim() < 2)
        flops = 0
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **kwargs, out_val=result)
            half = all(t.dtype in _HALF for t in tensors(args[:3]) if t.dim() > 1)
        rate = (self._gpu.half_tflops if half else self._gpu.float_tflops) * 1e12
        return Cost(flops, moved, max(flops / rate, moved / (self._gpu.memory_gb_s * 1e9)))
