"""`write_checkpoint()`, `latest_checkpoint()`, `read_checkpoint()`: folders `checkpoint-000123`, whole or absent.

A checkpoint is filled under a hidden name and renamed once all of it is on the disk; one that goes is renamed to a
hidden name first. A process that is killed at any moment leaves whole checkpoints and hidden leftovers, which nobody
reads and the next write removes.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from twinflow.atomic_files import partial_folder, publish_folder, remove_folder, remove_partials
from twinflow.distributed import on_rank_zero
from twinflow.errors import ArgumentError, ArgumentTypeError, require
from twinflow.train.checkpoint.folder_lock import lock_folder
from twinflow.train.checkpoint.state_tree import MOST_JSON_BYTES, decode, encode

TENSORS, TREE, SUMMARY = "state.safetensors", "state.json", "checkpoint.json"
MAGIC, VERSION = "twinflow checkpoint", 1
_MOST_SUMMARY_BYTES = 1_000_000
_CHUNK_BYTES = 1 << 22
# `.replaced`: a checkpoint that made room for another of its step, until that is there.
_NAME = re.compile(r"checkpoint-(\d{6,18})(\.replaced)?")
RETIRED = ".retired"  # after the name of a checkpoint that a run went back before
_SPARE_BYTES = 1 << 16  # headers, and what a file system takes for itself


def write_checkpoint(
    folder: Path, step: int, tree: Any, *, keep: int | None = None, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes a checkpoint, all or nothing; then removes the oldest ones.

    The first write takes the folder for this process (`lock_folder`), until it ends. Under torch.distributed every rank
    calls it, rank 0 writes its tree, and all go on when it is done, or raise when it fails.

    Args:
        folder: of all checkpoints of a run; made where it is missing.
        step: number of optimizer steps taken; a checkpoint of the same step is replaced.
        tree: what `encode` takes.
        keep: how many of the newest complete ones stay, this one among them; None: all.
        metadata: what JSON holds, for readers of `checkpoint.json`.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError, TypeError: an argument is wrong, or another process has the folder.
        OSError: the disk is full or does not take it; earlier checkpoints are as they were.
        RuntimeError: on other ranks, where rank 0 fails for another reason.
    """
    return Path(on_rank_zero("write_checkpoint", lambda: str(_write(Path(folder), step, tree, keep, metadata or {}))))


def latest_checkpoint(folder: Path, complaints: list[str] | None = None) -> Path | None:
    """The newest checkpoint whose files are whole, by their sizes and digests; changes nothing.

    Under torch.distributed every rank calls it, and all get what rank 0 finds.

    Args:
        folder: of all checkpoints of a run.
        complaints: gets a line for each newer one that is passed over, and why.

    Returns:
        Its folder; None: there is none.
    """
    found, passed = json.loads(on_rank_zero("latest_checkpoint", lambda: json.dumps(_latest(Path(folder)))))
    if complaints is not None:
        complaints += passed
    return None if found is None else Path(found)


def named_checkpoint(folder: Path, name: str | Path) -> Path | None:
    """The folder of a checkpoint that is asked for: one of a run by its name, `checkpoint-500` say, or any by its path.

    Args:
        folder: of the run.
        name: its number may be written without the zeros before it.

    Returns:
        The folder; None: there is none of that name.
    """
    asked = Path(name).expanduser()
    number = re.fullmatch(r"checkpoint-(\d{1,18})", asked.name)
    full = asked if number is None else asked.with_name(f"checkpoint-{int(number[1]):06d}")
    return next((path for path in (folder / full, full, folder / asked, asked) if path.is_dir()), None)


def retire_later(folder: Path, step: int) -> list[str]:
    """Gives checkpoints of later steps than a run goes on from a name under which nothing looks for them.

    Left as they are, they would be the latest ones, and the checkpoints of the new way the oldest.

    Returns:
        Their names before that.
    """
    later = [path for path in _checkpoints(folder) if _step(path) > step]
    for path in later:
        retired = path.with_name(path.name + RETIRED)
        if retired.exists():
            remove_folder(retired)
        os.rename(path, retired)
    return [path.name for path in later]


def read_checkpoint(path: Path) -> Any:
    """The tree of a checkpoint; its tensors are on the CPU, mapped from the file and read when they are used.

    Args:
        path: a folder that `write_checkpoint` wrote.

    Raises:
        ValueError: it is damaged, incomplete, or none of ours.
    """
    check_files(Path(path))
    return read_files(Path(path))


def _latest(folder: Path) -> tuple[str | None, list[str]]:
    complaints: list[str] = []
    for path in _checkpoints(folder):
        try:
            check_files(path)
            alike = read_summary(path)["step"] == _step(path)
            require(alike, "", str(path), f"of step {_step(path)}", "another in it")
        except ValueError as error:
            complaints.append(f"{path.name} is passed over: {error}")
        else:
            return str(path), complaints
    return None, complaints


def _write(folder: Path, step: int, tree: Any, keep: int | None, metadata: Mapping[str, Any]) -> Path:
    _check(step, keep, metadata)
    tensors, text = encode(tree)
    place = folder / f"checkpoint-{step:06d}"
    needed = sum(tensor.nbytes for tensor in tensors.values()) + len(text) + _SPARE_BYTES
    try:
        lock_folder(folder)
        _sweep(folder)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _refusal(folder, needed, error) from error
    partial = partial_folder(place)
    try:
        partial.mkdir()
        write_files(partial, step, tensors, text, metadata)
        publish_folder(place, place.with_name(f"{place.name}.replaced"))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # first, so that its bytes count as free
        raise _refusal(folder, needed, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is not None:
        _retire(folder, keep, place)
    return place


def _check(step: int, keep: int | None, metadata: Mapping[str, Any]) -> None:
    counts = type(step) is int and 0 <= step < 10**18
    require(counts, "write_checkpoint", "step", "a whole number >= 0", repr(step))
    counts = keep is None or (type(keep) is int and keep >= 1)
    require(counts, "write_checkpoint", "keep", "a whole number >= 1 or None", repr(keep))
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        wanted = "a mapping of what JSON holds"
        raise ArgumentTypeError("write_checkpoint", "metadata", wanted, error) from None


def _refusal(folder: Path, needed: int, error: Exception) -> OSError:
    code = error.errno if isinstance(error, OSError) else None
    try:
        free = f"{shutil.disk_usage(folder).free} bytes free"
    except OSError:
        free = "no such folder"
    message = f"write_checkpoint: folder must take {needed} bytes, got {folder} with {free} ({error})"
    return OSError(message) if code is None else OSError(code, message)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left; the folder is this one's, so that all of it is."""
    remove_partials(folder)
    for path in sorted(folder.iterdir()):
        found = _NAME.fullmatch(path.name)
        if found and found[2]:
            place = path.with_name(path.name.removesuffix(".replaced"))
            if place.exists():
                remove_folder(path)
            else:
                os.rename(path, place)


def _retire(folder: Path, keep: int, written: Path) -> None:
    """Removes complete checkpoints but the newest; damaged ones stay for whoever wants to look at them."""
    complete = [path for path in _checkpoints(folder) if path == written or _is_complete(path)]
    kept = complete[:keep] if written in complete[:keep] else [*complete[: keep - 1], written]
    for path in complete:
        if path not in kept:
            remove_folder(path)


def _is_complete(path: Path) -> bool:
    try:
        read_summary(path)
    except ValueError:
        return False
    return True


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first; one that is about to be replaced after what replaces it."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (-_step(path), path.suffix))


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
        ArgumentError: it is missing, damaged or of a later version, or a file has another size than it says.
    """
    place = str(path / SUMMARY)
    try:
        found = json.loads(_bounded(path / SUMMARY, _MOST_SUMMARY_BYTES))
    except RecursionError:
        raise ArgumentError("", place, "JSON", "it nested too deeply") from None
    except ValueError as error:
        raise ArgumentError("", place, "JSON that can be read", error) from None
    require(isinstance(found, dict) and found.get("format") == MAGIC, "", place, f"a {MAGIC}", "something else")
    version, files, step = found.get("version"), found.get("files"), found.get("step")
    require(type(version) is int and version == VERSION, "", place, f"of version {VERSION}", str(version)[:40])
    whole = type(step) is int and isinstance(files, dict) and set(files) == {TENSORS, TREE}
    require(whole, "", place, f"a step and the files {TENSORS} and {TREE}", "others", verb="have")
    for name, file in files.items():
        told = isinstance(file, dict) and type(file.get("bytes")) is int and isinstance(file.get("sha256"), str)
        require(told, "", place, f"bytes and sha256 of {name}", str(file)[:80], verb="have")
        there = (path / name).is_file() and (path / name).stat().st_size == file["bytes"]
        require(there, "", str(path / name), f"a file of {file['bytes']} bytes", "none or another")
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
            raise ArgumentError("", str(path / name), "a file that can be read", error) from None
        require(digest == file["sha256"], "", str(path / name), "the bytes that were written", "others", verb="have")


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
        raise ArgumentError("", str(path / TENSORS), "a whole safetensors file", error) from None
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
