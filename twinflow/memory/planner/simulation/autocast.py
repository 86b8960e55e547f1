"""`MetaAutocast`: what CUDA's autocast does to dtypes, for tensors on the meta device, which has none."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from twinflow.memory.planner.simulation.fused_attention import replaced

# Of CUDA's lists of operations, what networks call; (owner, name).
_LOW = (
    *((F, name) for name in ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")),
    *((torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d")),
    *((torch.Tensor, name) for name in ("matmul", "__matmul__", "bmm", "mm")),
)
_WIDE = (
    *((F, name) for name in ("layer_norm", "group_norm", "rms_norm", "softmax", "mse_loss")),
    *((torch, name) for name in ("softmax", "pow", "rsqrt", "exp", "sum")),
    *((torch.Tensor, name) for name in ("softmax", "pow", "__pow__", "rsqrt", "exp", "sum")),
)


class MetaAutocast:
    """A context that casts arguments to bf16 or float32 as `torch.autocast("cuda", torch.bfloat16)` does.

    Weights are cast once while gradients are on, as autocast's cache does, in each call within `cached`.
    """

    def __init__(self) -> None:
        self._cache: dict[int, torch.Tensor] | None = None

    def __enter__(self) -> "MetaAutocast":
        with ExitStack() as stack:
            for owner, name in _LOW:
                stack.enter_context(replaced(owner, name, lambda original: self._casting(original, self._low)))
            for owner, name in _WIDE:
                stack.enter_context(replaced(owner, name, lambda original: self._casting(original, _wide)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def cached(self) -> Iterator[None]:
        """A network call in an autocast context of its own, which keeps weights as it has cast them until it ends."""
        self._cache = {}
        try:
            yield
        finally:
            self._cache = None

    @staticmethod
    def _casting(original: Any, cast: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

        return call

    def _low(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if self._cache is None or not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(torch.bfloat16)
        if id(value) not in self._cache:
            self._cache[id(value)] = value.to(torch.bfloat16)
        return self._cache[id(value)]


def _wide(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
