"""`encode()` and `decode()`: a tree of tensors and plain values as safetensors' named tensors and a JSON text.

In the JSON null, truth values, strings, lists, finite floats and integers of up to 53 bits stand for themselves.
Everything else is an object of one key that says what it is: `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`,
`{"tensor": "<name>"}`, ... Nothing is pickled: what does not fit is refused, when it is written and when it is read.
"""

import json
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from twinflow.errors import ArgumentError, ArgumentTypeError, require
from twinflow.memory.quantised_linear import load_library

MAGIC, VERSION = "twinflow state", 1
MOST_DEPTH = 64  # of nested containers
MOST_JSON_BYTES = 1 << 28
_PLAIN_BITS = 53  # integers that every reader of JSON keeps
_HEX = re.compile(r"-?0x[0-9a-f]+")
_MAP_VALUES = 256
_PARTS = ("codes", "scale", "qmap")  # of torchao's OptimState8bit
# Those of safetensors; complex numbers are stored as pairs of floats.
_STORED = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
)  # fmt: skip
_PAIRS = (torch.float16, torch.float32, torch.float64)  # what a complex number is made of


def encode(tree: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Takes a tree apart.

    Tensors become contiguous CPU tensors; what occurs twice is stored twice, and once decoded shares no memory. Until
    they are written they may be the tree's own.

    Args:
        tree: dicts with str and int keys, lists, tuples, None, bool, int, float, str, bytes, torch dtypes and devices,
            dense tensors and parameters, numpy arrays, and torchao's 8-bit optimizer states, nested at most
            `MOST_DEPTH` deep.

    Returns:
        Name -> tensor, and the JSON text.

    Raises:
        TypeError: something else is in the tree; the message has its path.
        ValueError: it is nested too deeply.
    """
    encoder = _Encoder()
    node = encoder.node(tree, "tree", 0)
    return encoder.tensors, json.dumps({"format": MAGIC, "version": VERSION, "tree": node}, allow_nan=False)


def decode(tensors: Mapping[str, torch.Tensor], json_text: str | bytes) -> Any:
    """Puts a tree together again; tensors are the given ones, not copies.

    Args:
        tensors: name -> CPU tensor.

    Raises:
        ValueError: the text is none that `encode` writes, or the tensors are others than it names.
    """
    size, where = len(json_text), ("decode", "json_text")
    require(size <= MOST_JSON_BYTES, *where, f"of at most {MOST_JSON_BYTES} bytes", size)
    try:
        found = json.loads(json_text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ArgumentError(*where, "nested at most 64 deep", "it nested too deeply") from None
    except ValueError as error:
        raise ArgumentError(*where, "JSON", f"text that cannot be read: {error}") from None
    ours = isinstance(found, dict) and found.get("format") == MAGIC and set(found) == {"format", "version", "tree"}
    require(ours, *where, f"a {MAGIC}", "something else")
    version = found["version"]
    require(version is not True and version == VERSION, *where, f"of version {VERSION}", str(version)[:40])
    decoder = _Decoder(tensors)
    tree = decoder.value(found["tree"], "tree", 0)
    for unused in sorted(set(tensors) - decoder.used):
        raise ArgumentError("decode", "tensors", "those that the text names", f"{unused[:80]!r} beside them")
    return tree


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._memories: set[int] = set()

    def node(self, value: Any, path: str, depth: int) -> Any:
        wanted = f"nested at most {MOST_DEPTH} deep"
        require(depth <= MOST_DEPTH, "encode", "tree", wanted, f"more at {path[:80]}...")
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if value.bit_length() <= _PLAIN_BITS else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind in (list, tuple):
            nodes = [self.node(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
            return nodes if kind is list else {"tuple": nodes}
        if kind in (dict, OrderedDict):
            return {"dict": [self.pair(key, item, path, depth) for key, item in value.items()]}
        return self.array(value, path)

    def pair(self, key: Any, value: Any, path: str, depth: int) -> list[Any]:
        if type(key) not in (str, int):
            raise ArgumentTypeError("encode", path, "str and int keys", type(key).__name__, verb="have")
        return [self.node(key, path, depth), self.node(value, f"{path}[{key!r}]", depth + 1)]

    def array(self, value: Any, path: str) -> Any:
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
            plain = value.detach().resolve_conj().resolve_neg()
            if plain.is_complex() and plain.real.dtype in _PAIRS:
                return {"complex": self.stored(torch.view_as_real(plain), path)}
            if plain.dtype in _STORED:
                return {"tensor": self.stored(plain, path)}
            raise ArgumentTypeError("encode", path, "of a dtype that safetensors has", plain.dtype)
        if type(value) is np.ndarray:
            try:
                return {"array": self.stored(torch.from_numpy(np.array(value, order="C")), path)}
            except (TypeError, ValueError):
                raise ArgumentTypeError("encode", path, "an array of native numbers", value.dtype) from None
        kind = type(value)
        if kind.__name__ == "OptimState8bit" and kind.__module__.startswith("torchao."):
            parts = [self.stored(getattr(value, part), f"{path}.{part}") for part in _PARTS]
            dtype = str(value.dtype).removeprefix("torch.")
            return {"torchao 8-bit": [*parts, bool(value.signed), dtype]}
        what = f"{kind.__module__}.{kind.__qualname__}"
        raise ArgumentTypeError("encode", path, "a plain value or a dense tensor with data", what)

    def stored(self, tensor: torch.Tensor, path: str) -> str:
        """The name that a tensor is stored under: its path, and a number where that is taken."""
        name = wanted = path.encode("ascii", "backslashreplace").decode()
        while name in self.tensors:
            name = f"{wanted}#{len(self.tensors)}"
        cpu = tensor.detach().to("cpu").contiguous()
        memory = cpu.untyped_storage().data_ptr()
        if memory in self._memories:  # safetensors refuses two names for one memory
            cpu = cpu.clone()
        self._memories.add(memory)
        self.tensors[name] = cpu
        return name


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self.kinds: dict[str, Callable[[Any, str], Any]] = {
            "int": as_int, "float": as_float, "bytes": as_bytes, "dtype": as_dtype, "device": as_device,
            "tensor": self.tensor, "complex": self.complex, "array": self.array, "torchao 8-bit": self.torchao,
        }  # fmt: skip

    def value(self, node: Any, path: str, depth: int) -> Any:
        require(depth <= MOST_DEPTH, "decode", "json_text", f"nested at most {MOST_DEPTH} deep", "more")
        if isinstance(node, list):
            return [self.value(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        kind, inner = next(iter(node.items()), ("", None))
        if kind == "tuple" and len(node) == 1 and isinstance(inner, list):
            return tuple(self.value(inner, path, depth))
        if kind == "dict" and len(node) == 1 and isinstance(inner, list):
            return self.mapping(inner, path, depth)
        _check(kind in self.kinds and len(node) == 1, path, "a known kind of value", kind)
        return self.kinds[kind](inner, path)

    def mapping(self, pairs: list[Any], path: str, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for pair in pairs:
            _check(isinstance(pair, list) and len(pair) == 2, path, "a dict of pairs", pair)
            key = self.value(pair[0], path, depth + 1)
            new = type(key) in (str, int) and key not in found
            _check(new, path, "a dict of different str and int keys", key)
            found[key] = self.value(pair[1], f"{path}[{key!r}]", depth + 1)
        return found

    def tensor(self, name: Any, path: str) -> torch.Tensor:
        own = isinstance(name, str) and name in self.tensors and name not in self.used
        _check(own, path, "a tensor of its own that is there", name)
        self.used.add(name)
        return self.tensors[name]

    def complex(self, name: Any, path: str) -> torch.Tensor:
        pairs = self.tensor(name, path)
        paired = pairs.dtype in _PAIRS and pairs.ndim > 0 and pairs.shape[-1] == 2
        _check(paired, path, "complex numbers in pairs", f"{pairs.dtype} {tuple(pairs.shape)}")
        return torch.view_as_complex(pairs.contiguous())

    def array(self, name: Any, path: str) -> np.ndarray:
        try:
            return self.tensor(name, path).numpy()
        except TypeError:
            raise _refusal(path, "an array of a dtype of numpy", self.tensors[name].dtype) from None

    def torchao(self, node: Any, path: str) -> Any:
        whole = isinstance(node, list) and len(node) == 5 and type(node[3]) is bool
        _check(whole, path, "a state in three parts", node)
        codes, scale, qmap = (self.tensor(name, path) for name in node[:3])
        return torchao_state(codes, scale, qmap, node[3], as_dtype(node[4], path), path)


def as_int(text: Any, path: str) -> int:
    """A hexadecimal integer of any length."""
    _check(isinstance(text, str) and _HEX.fullmatch(text), path, "a hexadecimal integer", text)
    return int(text, 16)


def as_float(text: Any, path: str) -> float:
    """A float by its eight bytes."""
    raw = as_bytes(text, path)
    _check(len(raw) == 8, path, "a float of 8 bytes", text)
    return float(struct.unpack(">d", raw)[0])


def as_bytes(text: Any, path: str) -> bytes:
    """Bytes by their hexadecimal digits."""
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        raise _refusal(path, "hexadecimal bytes", text) from None


def as_dtype(name: Any, path: str) -> torch.dtype:
    """A dtype by its name in torch."""
    found: Any = getattr(torch, name, None) if isinstance(name, str) and name.isascii() else None
    _check(isinstance(found, torch.dtype), path, "a dtype of torch", name)
    return found


def as_device(name: Any, path: str) -> torch.device:
    """A device by its name."""
    try:
        return torch.device(name if isinstance(name, str) else "")
    except RuntimeError:
        raise _refusal(path, "a device of torch", name) from None


def _refusal(path: str, wanted: str, got: Any) -> ArgumentError:
    """The error that names a place in the tree."""
    return ArgumentError("decode", path[:200], wanted, repr(str(got)[:80]))


def _check(condition: object, path: str, wanted: str, got: Any) -> None:
    if not condition:
        raise _refusal(path, wanted, got)


def torchao_state(
    codes: torch.Tensor, scale: torch.Tensor, qmap: torch.Tensor, signed: bool, dtype: torch.dtype, path: str
) -> Any:
    """An `OptimState8bit`: codes of any shape, a float32 scale per block of them, and the 256 values of the codes."""
    whole = codes.dtype == torch.uint8 and scale.dtype == qmap.dtype == torch.float32
    whole = whole and scale.ndim == 1 and tuple(qmap.shape) == (_MAP_VALUES,) and dtype.is_floating_point
    _check(whole, path, "codes, scales and a map of 256 values", [codes.dtype, tuple(scale.shape), dtype])
    even = len(scale) and codes.numel() and codes.numel() % len(scale) == 0
    _check(even, path, "codes in blocks of one size", [codes.numel(), len(scale)])
    try:
        load_library("torchao", "decode")
    except ImportError as error:
        raise _refusal(path, "a state of torchao, which can be imported", error) from None
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(codes, scale, qmap, signed, dtype)
