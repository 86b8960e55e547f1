"""Compiles Triton kernels ahead of time, for GPUs that are not there.

What to compile is recorded from the launchers themselves: `aot_calls.py` calls every operation, the launches are noted
and not made. So signatures, constants and warps are those of real launches, and cannot drift from them.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import twinflow_kernels
from twinflow_kernels import _backend

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    """One way a kernel is launched: types, constants and alignments by argument, and compiler options."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * dict(self.options).get("num_warps", 4)

    @property
    def whole_accesses(self) -> bool:
        """Whether every address and row is a multiple of 16 and a thread has 16 bytes of each tensor to move."""
        constants = dict(self.constants)
        if "ALIGNED" in constants:  # addresses from a table
            return constants["ALIGNED"] and constants["BLOCK"] >= 2048
        moved = [name for name, kind in self.types if kind.startswith("*") or name == "row_size"]
        return set(moved) <= set(self.aligned) and constants["BLOCK"] >= 1024


def kernels() -> dict[str, JITFunction]:
    """Every `@triton.jit` function of the package, by name."""
    found = {}
    for module in pkgutil.iter_modules(twinflow_kernels.__path__):
        if module.name.startswith("__") or module.name == "_C":
            continue
        for value in vars(importlib.import_module(f"twinflow_kernels.{module.name}")).values():
            if isinstance(value, JITFunction):
                found[value.__name__] = value
    return found


def describe(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """The launch as Triton would specialise it: ones are constants, multiples of 16 are known to be."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = kernel.signature.bind(*args, **kwargs)
    values.apply_defaults()
    types, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            aligned += [name] if value.data_ptr() % 16 == 0 else []
        elif type(value) is int:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [name] if value % 16 == 0 else []
        else:
            types[name] = {bool: "u1", float: "fp32"}[type(value)]
    return Launch(kernel.__name__, *map(tuple, (types.items(), constants.items(), aligned, options.items())))


@contextmanager
def recorded() -> Iterator[set[Launch]]:
    """Inside, Triton serves CPU tensors and its launches are noted instead of made."""
    launches: set[Launch] = set()
    run, interpreting = JITFunction.run, _backend.interpreting
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.add(describe(self, args, kwargs))
    _backend.interpreting = lambda: True
    try:
        with _backend.override("triton"):
            yield launches
    finally:
        JITFunction.run, _backend.interpreting = run, interpreting


def record(calls: list[Callable[[], None]]) -> dict[str, list[Launch]]:
    """The launches that the calls make, by kernel name."""
    with recorded() as launches:
        for call in calls:
            call()
    found: dict[str, list[Launch]] = {}
    for launch in sorted(launches, key=repr):
        found.setdefault(launch.kernel, []).append(launch)
    return found


def reached(launched: set[str], functions: dict[str, JITFunction]) -> set[str]:
    """The kernels launched and, through their source, every jitted function they call."""
    found = set()
    pending = set(launched)
    while pending:
        name = pending.pop()
        found.add(name)
        pending |= {other for other in functions if re.search(rf"\b{other}\b", functions[name].src)} - found
    return found


def compile_launch(launch: Launch, kernel: JITFunction, capability: int) -> bytes:
    """Compiles one launch for sm_<capability>, as Triton does on such a GPU, and returns the cubin."""
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(kernel, dict(launch.types), constexprs=dict(launch.constants), attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(launch.options)).asm["cubin"]
