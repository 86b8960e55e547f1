"""Files and folders that appear whole."""

import errno
import os

import pytest
from helpers.train_runs import in_a_fork

from twinflow.atomic_files import partial_folder, publish_folder, remove_partials, write_file


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_a_leftover(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_file(path, b"old")

    def killed() -> None:
        monkeypatch.setattr(os if call == "fsync" else type(path), call, lambda *_: os._exit(9))
        write_file(path, [b"new", b"er"])

    assert in_a_fork(killed) == 9
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    write_file(path, [b"new", b"er"])
    assert path.read_bytes() == b"newer" and [*tmp_path.iterdir()] == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"file must have room for 5 bytes, got No space left on device"):
        write_file(path, b"newer")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    path, kept = tmp_path / "folder", os.rename
    for text in ("old", "new"):
        partial_folder(path).mkdir()
        (partial_folder(path) / "file").write_text(text)
        if text == "old":
            publish_folder(path, tmp_path / "replaced")

    def refused(source, to) -> None:
        if source == partial_folder(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        kept(source, to)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refused)
        with pytest.raises(OSError, match="Input/output"):
            publish_folder(path, tmp_path / "replaced")
    assert (path / "file").read_text() == "old"
    publish_folder(path, tmp_path / "replaced")
    assert (path / "file").read_text() == "new" and [*tmp_path.iterdir()] == [path]
