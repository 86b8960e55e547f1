"""`Shards`: tensors by key in safetensors files that are whole or not there.

A shard's name is the hash of its keys; its header has a checksum per key. Nothing else says what is cached: files of a
killed writer have hidden names, and a shard that fails its checksums counts as absent.
"""

import hashlib
import json
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from twinflow.atomic_files import write_file
from twinflow.errors import ArgumentError

Tensors = dict[str, torch.Tensor]
_PREFIX = "shard-"
_OPEN = 64  # shards kept open


class Shards:
    """What is cached in a folder.

    Args:
        verify: read all of it and compare checksums; False: the headers only.
    """

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        self.folder = folder
        self.damaged: list[Path] = []
        self._where: dict[str, Path] = {}
        self._opened: OrderedDict[Path, Any] = OrderedDict()
        for path in sorted(folder.glob(f"{_PREFIX}*.safetensors")):
            try:
                self._where |= dict.fromkeys(_keys(path, verify), path)
            except (SafetensorError, OSError, ValueError):
                self.damaged.append(path)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def read(self, key: str) -> Tensors:
        """The tensors of a key, mapped from its file.

        Raises:
            ValueError: the file is no longer what it was.
        """
        path = self._where[key]
        try:
            file = self._opened.pop(path) if path in self._opened else safe_open(path, framework="pt")
            self._opened[path] = file
            if len(self._opened) > _OPEN:
                self._opened.popitem(last=False)
            return {name: file.get_tensor(f"{key}/{name}") for name in _names(file)[key]}
        except (SafetensorError, OSError) as error:
            raise ArgumentError("Shards", str(path), "as it was written", error, "cache again") from None

    def add(self, entries: dict[str, Tensors]) -> None:
        """Writes entries, key -> name -> tensor, as a shard, in one move.

        Raises:
            OSError: no room for it; the folder is as before.
        """
        if not entries:
            return
        named = {f"{key}/{name}": leaf for key, leaves in entries.items() for name, leaf in leaves.items()}
        names = {key: sorted(leaves) for key, leaves in entries.items()}
        sums = {key: _checksum(leaves) for key, leaves in entries.items()}
        data = save(named, metadata={"names": json.dumps(names), "checksums": json.dumps(sums)})
        digest = hashlib.sha256(" ".join(sorted(entries)).encode()).hexdigest()
        path = self.folder / f"{_PREFIX}{digest[:32]}.safetensors"
        write_file(path, data)
        self._where |= dict.fromkeys(entries, path)


class ShardWriter:
    """Gathers entries until they are worth a file; at the end, also of a failure, the rest is written."""

    def __init__(self, shards: Shards, most: int) -> None:
        self._shards, self._most, self._size = shards, most, 0
        self._pending: dict[str, Tensors] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if not (isinstance(kind, type) and issubclass(kind, OSError)):  # a full disk is not filled again
            self._flush()

    def add(self, entries: dict[str, Tensors]) -> None:
        self._pending |= {key: {n: x.contiguous().clone() for n, x in found.items()} for key, found in entries.items()}
        self._size += sum(x.numel() * x.element_size() for found in entries.values() for x in found.values())
        if self._size >= self._most:
            self._flush()

    def _flush(self) -> None:
        self._shards.add(self._pending)
        self._pending, self._size = {}, 0


def _keys(path: Path, verify: bool) -> list[str]:
    """The keys of a shard; raises where it is not whole."""
    with safe_open(path, framework="pt") as file:
        names = _names(file)
        if sorted(file.keys()) != sorted(f"{key}/{name}" for key, found in names.items() for name in found):
            raise ValueError("its names are not its tensors")
        sums = json.loads((file.metadata() or {}).get("checksums", "{}"))
        for key, found in names.items() if verify else ():
            if _checksum({name: file.get_tensor(f"{key}/{name}") for name in found}) != sums.get(key):
                raise ValueError("its checksum is another")
    return list(names)


def _names(file: Any) -> dict[str, list[str]]:
    found = json.loads((file.metadata() or {}).get("names", "null"))
    if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
        raise ValueError("its header has no names")
    return found


def _checksum(leaves: Tensors) -> int:
    total = 0
    for name in sorted(leaves):
        leaf = leaves[name].contiguous()
        total = zlib.crc32(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode(), total)
        total = zlib.crc32(leaf.reshape(-1).view(torch.uint8).numpy().data, total)
    return total
