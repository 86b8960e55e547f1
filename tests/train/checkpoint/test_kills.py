"""A folder of checkpoints under processes that are killed, and under two at once."""

import os
import signal
import socket
from collections.abc import Callable

import pytest
from helpers.train_runs import holds, in_a_fork, names, tree_of

from twinflow.train.checkpoint.checkpoint import latest_checkpoint, write_checkpoint
from twinflow.train.checkpoint.folder_lock import lock_folder, unlock_folder


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        write_checkpoint(tmp_path, 1, tree_of(1))
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    try:
        for attempt in (lambda: write_checkpoint(tmp_path, 2, tree_of(2)), lambda: lock_folder(tmp_path)):
            with pytest.raises(ValueError, match=f"no other run, got .* process {child} on {socket.gethostname()}"):
                attempt()
        assert latest_checkpoint(tmp_path).name == "checkpoint-000001"  # looking is free
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    write_checkpoint(tmp_path, 2, tree_of(2))
    assert in_a_fork(lambda: lock_folder(tmp_path)) == 1
    lock_folder(tmp_path)
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert in_a_fork(lambda: lock_folder(tmp_path)) == 0


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")


def dying_at(number: int) -> None:
    """Makes the process end at the number-th of the calls that change or sync files."""
    left = [number]

    def patched(original: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, patched(getattr(os, name)))


@pytest.mark.parametrize(("before", "step", "keep"), [((1, 2), 3, 1), ((1, 2), 2, 2), ((2,), 2, None)])
def test_killed_at_every_moment_of_a_write(tmp_path, before, step, keep):
    """The last checkpoint, old or new, is there and whole; the next write leaves nothing of the killed one."""
    moments = 0
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        for earlier in before:
            write_checkpoint(folder, earlier, tree_of(earlier))
        unlock_folder(folder)

        def work(folder=folder, moment=moment) -> None:
            dying_at(moment)
            write_checkpoint(folder, step, tree_of(step), keep=keep)

        status = in_a_fork(work)
        complaints: list[str] = []
        found = latest_checkpoint(folder, complaints)
        number = int(found.name[11:17])
        assert number in {before[-1], step} and holds(found, number) and not complaints
        if keep is None:
            assert number == 2
        write_checkpoint(folder, step + 1, tree_of(step + 1), keep=2)
        assert names(folder) == [f"checkpoint-{n:06d}" for n in (number, step + 1)]
        unlock_folder(folder)
        if status == 0:
            moments = moment
            break
        assert status == 9
    assert moments > 12
