"""`lock_folder()`: a folder of checkpoints belongs to one process at a time."""

import errno
import fcntl
import json
import os
import socket
import warnings
from pathlib import Path

LOCK = ".checkpoints.lock"
_HELD: dict[tuple[int, str], int] = {}  # (process, folder) -> file descriptor


def lock_folder(folder: Path) -> None:
    """Takes a folder for this process, until it ends in whatever way or calls `unlock_folder`; taking it twice is once.

    The lock is the system's own record lock on a file that stays there: one of a dead process is none, and forked
    workers do not inherit it.

    Raises:
        ValueError: another process has it; the message has its number and host.
        OSError: the folder cannot be written to.
    """
    key = (os.getpid(), os.path.realpath(folder))
    if key in _HELD:  # opening the file again and closing it would drop the lock
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = _holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise ValueError(
                f"write_checkpoint: folder must belong to no other run, got {folder}, which {holder} writes to"
            ) from None
        warnings.warn(
            f"{folder} is on a file system without locks ({error.strerror}): start no second run", stacklevel=2
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    _HELD[key] = descriptor


def unlock_folder(folder: Path) -> None:
    """Gives a folder back; nothing where this process does not have it."""
    descriptor = _HELD.pop((os.getpid(), os.path.realpath(folder)), None)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _holder(written: bytes) -> str:
    try:
        found = json.loads(written)
        return f"process {int(found['pid'])} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
