"""The three files of a checkpoint: how they are written, checked and read."""

import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from twinflow.train.checkpoint.state_tree import MOST_JSON_BYTES, decode

TENSORS, TREE, SUMMARY = "state.safetensors", "state.json", "checkpoint.json"
MAGIC, VERSION = "twinflow checkpoint", 1
_MOST_SUMMARY_BYTES = 1_000_000
_CHUNK_BYTES = 1 << 22


def write_files(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], text: str, metadata: Mapping[str, Any]
) -> None:
    """Writes the files into a new folder.

    Raises:
        OSError, SafetensorError: the disk is full, or does not take them.
    """
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / TREE).write_text(text)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in (TENSORS, TREE)
    }
    summary = {
        "format": MAGIC, "version": VERSION, "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "files": files, "metadata": dict(metadata),
    }  # fmt: skip
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """The readable part of a checkpoint: step, time, versions, files, and the metadata given to `write_checkpoint`.

    Raises:
        ValueError: it is missing, damaged or of a later version, or a file has another size than it says.
    """
    try:
        found = json.loads(_bounded(path / SUMMARY, _MOST_SUMMARY_BYTES))
    except RecursionError:
        raise ValueError(f"{path / SUMMARY} must be JSON, got it nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path / SUMMARY} must be JSON that can be read, got: {error}") from None
    if not isinstance(found, dict) or found.get("format") != MAGIC:
        raise ValueError(f"{path / SUMMARY} must be a {MAGIC}, got something else")
    if type(found.get("version")) is not int or found["version"] != VERSION:
        raise ValueError(f"{path / SUMMARY} must be of version {VERSION}, got {str(found.get('version'))[:40]}")
    files, step = found.get("files"), found.get("step")
    if type(step) is not int or not isinstance(files, dict) or set(files) != {TENSORS, TREE}:
        raise ValueError(f"{path / SUMMARY} must have a step and the files {TENSORS} and {TREE}, got others")
    for name, file in files.items():
        if not isinstance(file, dict) or type(file.get("bytes")) is not int or not isinstance(file.get("sha256"), str):
            raise ValueError(f"{path / SUMMARY} must have bytes and sha256 of {name}, got {str(file)[:80]}")
        if not (path / name).is_file() or (path / name).stat().st_size != file["bytes"]:
            raise ValueError(f"{path / name} must be a file of {file['bytes']} bytes, got none or another")
    return found


def check_files(path: Path) -> None:
    """Reads a checkpoint's bytes and compares them with their digests.

    Raises:
        ValueError: they are others, or `read_summary` refuses it.
    """
    for name, file in read_summary(path)["files"].items():
        try:
            digest = _digest(path / name)
        except OSError as error:
            raise ValueError(f"{path / name} must be a file that can be read, got: {error}") from None
        if digest != file["sha256"]:
            raise ValueError(f"{path / name} must have the bytes that were written, got others")


def read_files(path: Path) -> Any:
    """The tree; its tensors are mapped from the file, private to this process, and read when they are used.

    Raises:
        ValueError: a file is damaged.
    """
    text = _bounded(path / TREE, MOST_JSON_BYTES)
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / TENSORS} must be a whole safetensors file, got {error}") from None
    return decode(tensors, text)


def _bounded(path: Path, most_bytes: int) -> bytes:
    try:
        if not path.is_file():  # nor a pipe, which would wait for a writer
            raise ValueError("no such file")
        if path.stat().st_size > most_bytes:
            raise ValueError(f"{path.stat().st_size} bytes, more than {most_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(str(error)) from None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
