"""Files and folders that appear whole: written under a hidden name, synced to the disk, then renamed.

A process that is killed at any moment leaves what was there before or what is new, and hidden leftovers
(`.<name>.partial`), which nobody reads.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes a file, or replaces it, in one move.

    Args:
        path: in a folder that exists.
        data: the content, or its parts in order.

    Raises:
        OSError: the disk is full or does not take it; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = f" for {len(data)} bytes" if isinstance(data, bytes) else ""
        raise OSError(error.errno, f"{path} must have room{size}, got {os.strerror(error.errno)}") from None
    finally:
        partial.unlink(missing_ok=True)


def partial_folder(path: Path) -> Path:
    """The hidden name under which a folder is filled before `publish_folder`."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def publish_folder(path: Path, replaced: Path | None = None) -> None:
    """Gives `partial_folder(path)`, once all of it is on the disk, its name; a folder of that name makes room.

    Args:
        path: its name.
        replaced: where an earlier folder stands while the two are exchanged, before it is removed; None: a hidden name
            that `remove_partials` knows.

    Raises:
        OSError: a rename failed; the earlier folder has its name again.
    """
    partial, replaced = partial_folder(path), replaced or partial_folder(path.with_name(f"{path.name}.replaced"))
    for part in (*partial.iterdir(), partial):
        sync(part)
    if path.exists():  # a folder with files in it cannot be renamed onto
        os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except OSError:
        if replaced.exists():
            os.rename(replaced, path)
        raise
    sync(path.parent)
    if replaced.exists():
        remove_folder(replaced)


def remove_folder(path: Path) -> None:
    """Removes a folder, for its readers at once; where it stays for want of rights, it stays under a hidden name."""
    partial = partial_folder(path)
    os.rename(path, partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left; for the one process that writes to a folder."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
