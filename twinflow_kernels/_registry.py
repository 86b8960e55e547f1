"""`register()`: one call gives an operation its schema, implementations, fake and autograd: `torch.ops.twinflow.<op>`.

`Library.define` / `impl` cost about half the host time per call of the `custom_op` decorator. The checks that every
kernel module needs before it hands addresses to native code live here too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from twinflow_kernels import _backend

_library = torch.library.Library("twinflow", "DEF")
_operations: dict[str, "Operation"] = {}

# csrc/kernels.h: enum class DType
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass
class Operation:
    """A registered operation: its name and the function behind each backend."""

    name: str
    implementations: dict[str, Callable[..., Any]]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    overload: Any = None  # `torch.ops.twinflow.<name>.default`, once it is registered

    @cached_property
    def implemented(self) -> frozenset[str]:
        return frozenset(self.implementations)

    def choice(self, device_type: str) -> _backend.Choice:
        return _backend.choose(self.name, self.implemented, device_type)

    def call(self, *args: Any) -> Any:
        """Runs the operation; straight on its backend where no part of torch has to see it.

        The dispatcher and its wrappers in Python cost the host 20 to 60 us a call, more than a small tensor's work.
        """
        if _unseen(args):
            return self._straight(*args)
        return self.overload(*args)

    def differentiable(self, *args: Any) -> Any:
        """`call` of an operation with a backward; an argument may require grad."""
        if _unseen(args, differentiable=True):
            return self._function.apply(*args)
        return self.overload(*args)

    def _straight(self, *args: Any) -> Any:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if first.is_cpu:
            return self.implementations[self.choice("cpu").backend](*args)
        if not first.is_cuda:  # mps, xpu, npu, ...
            return self.implementations[self.choice(first.device.type).backend](*args)
        with torch.cuda.device_of(first):  # Triton launches on the current device, which need not be the tensors'
            return self.implementations[self.choice("cuda").backend](*args)

    @cached_property
    def _function(self) -> Any:
        """The autograd function of the operation."""
        operation: Any = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = operation._straight(*args)
                operation.setup_context(ctx, args, output)
                return output

            backward = staticmethod(operation.backward)

        return Function


def operations() -> list[Operation]:
    """Every registered operation, in order of registration."""
    return list(_operations.values())


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Operation:
    """Registers `torch.ops.twinflow.<op>`.

    Args:
        schema: `name(Tensor x, ...) -> Tensor`, in torch's schema language; the first argument is a tensor or a list
            of tensors, whose device is current while a kernel is launched.
        reference: plain PyTorch, any device: meaning, fallback and oracle.
        fake: shapes and dtypes only.
        cpu, triton, cuda: the kernels' launchers, with the schema's arguments; None where there is none.
        setup_context, backward: as in `torch.library.register_autograd`; None for in-place or constant operations.

    Returns:
        The operation. Its in-place implementations return None.
    """
    name = schema[: schema.index("(")].strip()
    found = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}
    operation = Operation(name, {k: v for k, v in found.items() if v is not None}, setup_context, backward)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, operation._straight, "CompositeExplicitAutograd")  # every device without a kernel of its own
    _library.impl(name, operation._straight, "CPU")
    _library.impl(name, operation._straight, "CUDA")
    torch.library.register_fake(f"twinflow::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"twinflow::{name}", backward, setup_context=setup_context, lib=_library)
    operation.overload = getattr(torch.ops.twinflow, name).default
    _operations[name] = operation
    return operation


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _unseen(args: tuple, differentiable: bool = False) -> bool:
    """Whether torch would see nothing in an operation: plain CPU or CUDA tensors, no tracing, mode or profiler."""
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for x in args:
        if isinstance(x, torch.Tensor):
            if type(x) not in _PLAIN or not (x.is_cpu or x.is_cuda) or (x.requires_grad and not differentiable):
                return False
        elif isinstance(x, (list, tuple)) and not all(type(y) in _PLAIN and (y.is_cpu or y.is_cuda) for y in x):
            return False
    return True


def native_threads() -> int:
    """The number of threads that torch's own CPU kernels use."""
    return torch.get_num_threads()


def dtype_code(dtype: torch.dtype) -> int:
    """The dtype's number in csrc/kernels.h."""
    return DTYPE_CODES[dtype]


def require(condition: bool, where: str, argument: str, wanted: str, actual: object) -> None:
    """Raises ValueError as `<function>: <argument> must be <wanted>, got <actual>`."""
    if not condition:
        raise ValueError(f"{where}: {argument} must be {wanted}, got {actual}")


def require_floating(where: str, argument: str, value: object, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """Raises TypeError unless `value` is a tensor of an allowed floating dtype (default: all four)."""
    allowed = dtypes or tuple(DTYPE_CODES)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where}: {argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{where}: {argument} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def constants_fit(shape: tuple[int, ...], device: torch.device, *values: object) -> bool:
    """Whether all are floating tensors of a shape on a device that need no gradient; no message is made."""
    graded = torch.is_grad_enabled()
    return all(
        isinstance(x, torch.Tensor) and x.dtype in DTYPE_CODES and x.shape == shape and x.device == device
        and not (graded and x.requires_grad)
        for x in values
    )  # fmt: skip


def require_like(where: str, argument: str, value: torch.Tensor, other: str, like: torch.Tensor) -> None:
    """Raises ValueError unless `value` has the shape and device of `like`."""
    if value.shape == like.shape and value.device == like.device:
        return  # before any message is formatted: this is on the path of every call
    require(value.shape == like.shape, where, argument, f"of {other}'s shape {tuple(like.shape)}", tuple(value.shape))
    require(value.device == like.device, where, argument, f"on {other}'s device {like.device}", value.device)


def require_rows(where: str, argument: str, value: torch.Tensor, like: torch.Tensor) -> None:
    """Raises ValueError unless `value` is a (B,) tensor on `like`'s device, B = like.shape[0]."""
    if value.shape == like.shape[:1] and value.device == like.device:
        return
    wanted = f"of shape ({like.shape[0]},)"
    require(value.shape == like.shape[:1], where, argument, wanted, tuple(value.shape))
    require(value.device == like.device, where, argument, f"on device {like.device}", value.device)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory, judged by their address ranges."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    if a.is_meta:  # no addresses there
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    a_begin, b_begin = a.data_ptr(), b.data_ptr()
    return a_begin < b_begin + _span_bytes(b) and b_begin < a_begin + _span_bytes(a)


def _span_bytes(x: torch.Tensor) -> int:
    if x.is_contiguous():
        return x.numel() * x.element_size()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()
