"""Compiles Triton kernels ahead of time, for GPUs that are not there.

What to compile is recorded from the launchers themselves: `aot_calls.py` calls every operation, the launches are noted
and not made. So signatures, constants and warps are those of real launches, and cannot drift from them.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import twinflow_kernels
from twinflow_kernels import _backend

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def compile_launch(launch: Launch, kernel: JITFunction, capability: int) -> str:
    """Compiles one launch for sm_<capability> and returns the PTX."""
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(kernel, dict(launch.types), constexprs=dict(launch.constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return compiled.asm["ptx"]


def spilled_bytes(text: str) -> int:
    """The most bytes that any kernel in a `ptxas -v` report stores to or loads from memory for want of registers."""
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert found, f"no resource usage in the compiler's report: {text}"
    return max(int(number) for pair in found for number in pair)


def triton_spills(ptx: str, launch: Launch, capability: int) -> int:
    """Assembles PTX with Triton's own ptxas, as Triton does, and returns the spilled bytes."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    ptxas = TOOLS / ("ptxas-blackwell" if capability >= 90 else "ptxas")  # as Triton chooses
    fmad = [] if dict(launch.options).get("enable_fp_fusion", True) else ["--fmad=false"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", *fmad, f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return spilled_bytes(done.stderr + done.stdout)
