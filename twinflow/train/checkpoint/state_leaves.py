"""Values of a state's JSON that JSON has no form for, made from their text, or refused with a `ValueError`."""

import re
import struct
from typing import Any

import torch

from twinflow.memory.quantised_linear import load_library

_HEX = re.compile(r"-?0x[0-9a-f]+")
_MAP_VALUES = 256


def as_int(text: Any, path: str) -> int:
    """A hexadecimal integer of any length."""
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise refusal(path, "a hexadecimal integer", text)
    return int(text, 16)


def as_float(text: Any, path: str) -> float:
    """A float by its eight bytes."""
    raw = as_bytes(text, path)
    if len(raw) != 8:
        raise refusal(path, "a float of 8 bytes", text)
    return float(struct.unpack(">d", raw)[0])


def as_bytes(text: Any, path: str) -> bytes:
    """Bytes by their hexadecimal digits."""
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        raise refusal(path, "hexadecimal bytes", text) from None


def as_dtype(name: Any, path: str) -> torch.dtype:
    """A dtype by its name in torch."""
    found = getattr(torch, name, None) if isinstance(name, str) and name.isascii() else None
    if not isinstance(found, torch.dtype):
        raise refusal(path, "a dtype of torch", name)
    return found


def as_device(name: Any, path: str) -> torch.device:
    """A device by its name."""
    try:
        return torch.device(name if isinstance(name, str) else "")
    except RuntimeError:
        raise refusal(path, "a device of torch", name) from None


def refusal(path: str, wanted: str, got: Any) -> ValueError:
    """The error that names a place in the tree."""
    return ValueError(f"decode: {path[:200]} must be {wanted}, got {str(got)[:80]!r}")


def torchao_state(
    codes: torch.Tensor, scale: torch.Tensor, qmap: torch.Tensor, signed: bool, dtype: torch.dtype, path: str
) -> Any:
    """An `OptimState8bit`: codes of any shape, a float32 scale per block of them, and the 256 values of the codes."""
    whole = codes.dtype == torch.uint8 and scale.dtype == qmap.dtype == torch.float32
    if not whole or scale.ndim != 1 or tuple(qmap.shape) != (_MAP_VALUES,) or not dtype.is_floating_point:
        raise refusal(path, "codes, scales and a map of 256 values", [codes.dtype, tuple(scale.shape), dtype])
    if not len(scale) or not codes.numel() or codes.numel() % len(scale):
        raise refusal(path, "codes in blocks of one size", [codes.numel(), len(scale)])
    try:
        load_library("torchao", "decode")
    except ImportError as error:
        raise ValueError(str(error)) from None
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(codes, scale, qmap, signed, dtype)
