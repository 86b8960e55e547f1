"""`PackedWeight`: a linear layer's weight in int8 or nf4, from which each product makes the full weight anew.

Packing, its inverse and every rounding are those of torchao and bitsandbytes. Their own layers serve another purpose:
torchao's weight-only int8 has no backward, and of bitsandbytes' each keeps its scales in an object that no deep copy
shares. Here a weight with its scales is one vector of bytes, which `model.to(dtype)` cannot round.
"""

import functools
import importlib
import importlib.util
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}
_NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree")  # warn of optional kernels while they are imported
_NF4_BLOCK, _NESTED_BLOCK = 64, 256  # values per scale, scales per scale of scales
ALIGNED = 16  # bytes; kernels load as many at once

_operations = torch.library.Library("twinflow", "FRAGMENT")


class Packing(NamedTuple):
    """What the bytes of a packed weight are: the form, the weight's rows (outputs) and columns (inputs), its dtype."""

    form: str
    rows: int
    columns: int
    dtype: torch.dtype


class PackedWeight(nn.Parameter):
    """A frozen weight as bytes, in the Parameter that held it; `F.linear` multiplies by the weight that it stands for.

    Whoever shares the Parameter, as a teacher made before does, computes with the packed weight too.
    """

    packing: Packing

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear and isinstance(args[1] if len(args) > 1 else None, PackedWeight):
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        if id(self) not in memo:
            memo[id(self)] = _as_packed(nn.Parameter(self.data.clone(), requires_grad=False), self.packing)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.data, self.packing)


@functools.cache
def load_library(name: str, where: str) -> Any:
    """A library of the extra `quant`, imported at first use and without its warnings.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{where}: {name} must be installed (pip install 'twinflow[quant]')", name=name)
    loggers = [logging.getLogger(noisy) for noisy in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        return importlib.import_module(name)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@torch.no_grad()
def pack(weight: torch.Tensor, form: str, device: torch.device | str | None = None) -> None:
    """Turns a weight (rows, columns) into a `PackedWeight` in place.

    Args:
        weight: of a linear layer, frozen.
        form: `nf4` or `int8`.
        device: where it is packed and stays; None: where it is.
    """
    rows, columns = weight.shape
    packing = Packing(form, rows, columns, weight.dtype)
    parts = _PACK[form](weight.detach().to(device).contiguous())
    flat = [part.reshape(-1).view(torch.uint8) for part in parts]
    weight.data = torch.cat([F.pad(part, (0, -len(part) % ALIGNED)) for part in flat])
    _as_packed(weight, packing)


def dequantised(weight: PackedWeight) -> torch.Tensor:
    """The weight (rows, columns) that a packed one stands for, in the dtype that it had."""
    return _unpacked(weight.data, *weight.packing)


def _as_packed(weight: torch.Tensor, packing: Packing) -> PackedWeight:
    weight.__class__ = PackedWeight
    weight.packing = packing  # type: ignore[attr-defined]
    return weight  # type: ignore[return-value]


def _rebuilt(data: torch.Tensor, packing: Packing) -> PackedWeight:
    return _as_packed(nn.Parameter(data, requires_grad=False), packing)


def _pack_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    functional = load_library("bitsandbytes", "quantise_base").functional
    codes, state = functional.quantize_4bit(
        weight, blocksize=_NF4_BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    return codes, state.absmax, state.state2.absmax, state.offset


def _unpack_nf4(parts: list[torch.Tensor], packing: Packing) -> torch.Tensor:
    functional = load_library("bitsandbytes", "quantise_base").functional
    codes, absmax, nested, offset = parts
    state = functional.QuantState(
        absmax, shape=torch.Size((packing.rows * packing.columns,)), dtype=packing.dtype, blocksize=_NF4_BLOCK,
        quant_type="nf4", offset=offset.view(torch.float32),
        state2=functional.QuantState(
            nested.view(torch.float32), code=_dynamic_map(codes.device), blocksize=_NESTED_BLOCK, dtype=torch.float32
        ),
    )  # fmt: skip
    return functional.dequantize_4bit(codes.view(-1, 1), state).view(packing.rows, packing.columns)


@functools.cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """The 256 values of bitsandbytes' 8-bit scales."""
    return load_library("bitsandbytes", "quantise_base").functional.create_dynamic_map().to(device)


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    primitives = _torchao_primitives()
    block, limits = (1, weight.shape[1]), (-128, 127)
    scale, zero_point = primitives.choose_qparams_affine(
        weight, primitives.MappingType.SYMMETRIC, block, torch.int8, *limits, torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32, zero_point_dtype=torch.int8,
    )  # fmt: skip
    return primitives.quantize_affine(weight, block, scale, zero_point, torch.int8, *limits), scale


def _unpack_int8(parts: list[torch.Tensor], packing: Packing) -> torch.Tensor:
    """torchao's formula, code times scale in float32, rounded once; without its two float32 copies of the weight."""
    codes = parts[0].view(torch.int8).view(packing.rows, packing.columns)
    weight = torch.empty(codes.shape, dtype=packing.dtype, device=codes.device)
    return torch.mul(codes, parts[1].view(torch.float32)[:, None], out=weight)


def _torchao_primitives() -> Any:
    load_library("torchao", "quantise_base")
    return importlib.import_module("torchao.quantization.quant_primitives")


_PACK = {"nf4": _pack_nf4, "int8": _pack_int8}
_UNPACK = {"nf4": _unpack_nf4, "int8": _unpack_int8}


def part_sizes(form: str, count: int, rows: int) -> tuple[int, ...]:
    """Bytes of each part, as `_PACK` returns them."""
    if form == "int8":
        return count, 4 * rows
    blocks = -(-count // _NF4_BLOCK)
    return -(-count // 2), blocks, 4 * -(-blocks // _NESTED_BLOCK), 4


def _unpacked(packed: torch.Tensor, form: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    parts, start = [], 0
    for size in part_sizes(form, rows * columns, rows):
        parts.append(packed[start : start + size])
        start += size + -size % ALIGNED
    return _UNPACK[form](parts, Packing(form, rows, columns, dtype))


# One operation to torch.compile. That a backward's depends on the gradient keeps compilers from taking the forward's
# for it, and with that from keeping the whole weight in between.
_operations.define(
    "dequantise(Tensor packed, Tensor like, str form, int rows, int columns, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_operations, "dequantise", "CompositeExplicitAutograd")
def _dequantise(
    packed: torch.Tensor, like: torch.Tensor, form: str, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight in the dtype of `like`."""
    return _unpacked(packed, form, rows, columns, dtype).to(like.dtype)


@torch.library.register_fake("twinflow::dequantise", lib=_operations)
def _(packed: torch.Tensor, like: torch.Tensor, form: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return like.new_empty(rows, columns)


class PackedProduct(torch.autograd.Function):
    """Keeps the packed weight alone, and makes the whole one again for the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, packing: Packing
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.packing, ctx.bias_dtype = packing, None if bias is None else bias.dtype
        return F.linear(x, torch.ops.twinflow.dequantise(packed, x, *packing), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        rows = grad.reshape(-1, ctx.packing.rows)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            weight = torch.ops.twinflow.dequantise(packed, rows.detach(), *ctx.packing)
            dx = (rows @ weight).reshape(*grad.shape[:-1], ctx.packing.columns)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        return dx, None, dbias, None


def _linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    device = x.device.type
    # Before the weight is made, which else would be made in a float32 input's dtype and then cast.
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return PackedProduct.apply(x, weight, bias, weight.packing)
