"""Locks on folders, held by one process at a time; the lock's file names the holder."""

import errno
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from twinflow.errors import ArgumentError

LOCK = ".checkpoints.lock"
_HELD: dict[tuple[int, str], FileLock] = {}  # (process, folder) -> its lock


def acquire(path: Path, waiting: Callable[[str], None] | None = None) -> FileLock:
    """Takes the lock of a file, until this process ends in whatever way or releases it.

    Args:
        path: of the lock's file, which stays there.
        waiting: called with the holder, then the lock is waited for; None: a lock that is held is an error.

    Raises:
        Timeout: another process, or another lock of this one, holds it, and `waiting` is None.
        OSError: the file cannot be written.
    """
    lock = FileLock(path, thread_local=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise
            waiting(holder(path))
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}): start no second run", stacklevel=3
        )
    with suppress(OSError):  # the name is for people; on a full disk the lock holds without
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


def holder(path: Path) -> str:
    """Who wrote its name into the file of a lock."""
    written = path.read_text(errors="replace")[:300]
    return written if written.startswith("process ") else "another process"


def lock_folder(folder: Path) -> None:
    """Takes a folder of checkpoints until this process ends or calls `unlock_folder`; taking it twice is once.

    Raises:
        ArgumentError: another process has it; the message has its number and host.
        OSError: the folder cannot be written to.
    """
    key = (os.getpid(), os.path.realpath(folder))
    if key in _HELD:
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _HELD[key] = acquire(folder / LOCK)
    except Timeout:
        got = f"{folder}, which {holder(folder / LOCK)} writes to"
        raise ArgumentError("write_checkpoint", "folder", "to no other run", got, verb="belong") from None


def unlock_folder(folder: Path) -> None:
    """Gives a folder back; nothing where this process does not have it."""
    lock = _HELD.pop((os.getpid(), os.path.realpath(folder)), None)
    if lock is not None:
        lock.release()
