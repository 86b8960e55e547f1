"""Folders of checkpoints: whole or absent, whatever is damaged, full, killed or started twice."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.train_runs import holds, in_a_fork, names, tree_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinflow.train.checkpoint import checkpoint
from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint, read_summary, write_checkpoint
from twinflow.train.checkpoint.folder_lock import unlock_folder

FILES = ("state.safetensors", "state.json", "checkpoint.json")


def test_written_and_read(tmp_path):
    folder = tmp_path / "new" / "run"
    assert latest_checkpoint(folder) is None
    for step in (1, 20, 3):
        path = write_checkpoint(folder, step, tree_of(step), metadata={"loss": 0.5})
        assert path == folder / f"checkpoint-{step:06d}" and holds(path, step)
        assert names(path) == sorted(FILES)
    assert latest_checkpoint(folder) == folder / "checkpoint-000020"
    summary = read_summary(folder / "checkpoint-000020")
    assert summary["step"] == 20 and summary["metadata"] == {"loss": 0.5} and summary["versions"]["torch"]
    assert oct(path.stat().st_mode & 0o777) == oct(0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_step_of_seven_digits_is_newer_than_one_of_six(tmp_path):
    for step in (999_999, 1_000_000):
        write_checkpoint(tmp_path, step, {})
    assert latest_checkpoint(tmp_path).name == "checkpoint-1000000"


def test_the_newest_stay(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    for step in range(6):
        write_checkpoint(tmp_path, step, tree_of(step), keep=2)
    assert names(tmp_path) == ["checkpoint-000004", "checkpoint-000005", "checkpoint-best"]
    for step in (2, 3):  # an earlier one was taken up again: what is written always stays
        write_checkpoint(tmp_path, step, tree_of(step), keep=2)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000005", "checkpoint-best"]
    (tmp_path / "checkpoint-000005" / "state.json").unlink()
    write_checkpoint(tmp_path, 4, tree_of(4), keep=2)  # a damaged one does not count, and is left alone
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004", "checkpoint-000005", "checkpoint-best"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-000004"


def test_a_step_is_written_again(tmp_path):
    write_checkpoint(tmp_path, 7, {"old": 1})
    write_checkpoint(tmp_path, 7, tree_of(7))
    assert holds(latest_checkpoint(tmp_path), 7) and names(tmp_path) == ["checkpoint-000007"]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    **{f"{name} missing": lambda p, n=name: (p / n).unlink() for name in FILES},
    **{f"{name} short": lambda p, n=name: os.truncate(p / n, (p / n).stat().st_size - 2) for name in FILES},
    **{f"{name} empty": lambda p, n=name: os.truncate(p / n, 0) for name in FILES},
    **{f"{name} a pipe": lambda p, n=name: pipe(p / n) for name in FILES},
    "a bit": lambda p: (p / FILES[0]).write_bytes((p / FILES[0]).read_bytes()[:-1] + b"\x07"),
    "bomb": lambda p: (p / FILES[2]).write_text("[" * 400_000),
    "no object": lambda p: (p / FILES[2]).write_text("[]"),
    "not text": lambda p: (p / FILES[2]).write_bytes(b"\xff\xfe"),
    "version": lambda p: rewrite(p / FILES[2], version=2),
    "magic": lambda p: rewrite(p / FILES[2], format="other"),
    "step": lambda p: rewrite(p / FILES[2], step=8),
    "traversal": lambda p: rewrite(p / FILES[2], files={"../../x": {"bytes": 1, "sha256": ""}}),
    "files": lambda p: rewrite(p / FILES[2], files=dict.fromkeys(FILES[:2], 3)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_reported(tmp_path, damage):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, tree_of(step))
    newest = tmp_path / "checkpoint-000002"
    DAMAGES[damage](newest)
    complaints: list[str] = []
    assert latest_checkpoint(tmp_path, complaints) == tmp_path / "checkpoint-000001"
    assert len(complaints) == 1 and complaints[0].startswith("checkpoint-000002 is passed over: /")
    if damage != "step":
        with pytest.raises(ValueError, match="must"):
            read_checkpoint(newest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("whole"), 3, tree_of(3))


@given(data=st.data(), name=st.sampled_from(FILES))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_strangers_bytes_are_refused_or_read(whole, tmp_path, data, name):
    """With digests that fit, as a stranger would write them: only a ValueError, or a tree."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    raw = bytearray((copy / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    (copy / name).write_bytes(raw)
    if name != FILES[2]:
        size, digest = len(raw), checkpoint._digest(copy / name)
        summary = json.loads((copy / FILES[2]).read_text())
        summary["files"][name] = {"bytes": size, "sha256": digest}
        (copy / FILES[2]).write_text(json.dumps(summary))
    with contextlib.suppress(ValueError):
        read_checkpoint(copy)


@pytest.mark.parametrize("arguments", [dict(step=-1), dict(step=True), dict(keep=0), dict(keep=1.5)])
def test_wrong_numbers_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"write_checkpoint: (step|keep) must be a whole number"):
        write_checkpoint(**(dict(folder=tmp_path, step=1, tree={}) | arguments))
    with pytest.raises(TypeError, match="write_checkpoint: metadata must be a mapping"):
        write_checkpoint(tmp_path, 1, {}, metadata={"a": object()})
    with pytest.raises(TypeError, match=r"encode: tree\['a'\]"):
        write_checkpoint(tmp_path, 1, {"a": object()})
    assert names(tmp_path) == []


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"),
    [(checkpoint, "save_file"), (Path, "write_text"), (os, "fsync"), (os, "rename"), (Path, "mkdir")],
)  # fmt: skip
def test_a_full_disk_leaves_the_last_one_and_nothing_else(tmp_path, monkeypatch, module, function):
    write_checkpoint(tmp_path, 1, tree_of(1), keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(module, function, full)
        with pytest.raises(OSError, match=rf"must take \d+ bytes, got {tmp_path} with \d+ bytes free") as raised:
            write_checkpoint(tmp_path, 2, tree_of(2), keep=1)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["checkpoint-000001"] and holds(latest_checkpoint(tmp_path), 1)
    write_checkpoint(tmp_path, 2, tree_of(2), keep=1)
    assert names(tmp_path) == ["checkpoint-000002"]


def test_nothing_is_written_where_it_will_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1_000_000))
    monkeypatch.setattr(checkpoint, "write_files", lambda *_: pytest.fail("written"))
    with pytest.raises(OSError, match=r"must take 40\d{5} bytes, got .* with 1000000 bytes free"):
        write_checkpoint(tmp_path, 2, {"a": torch.zeros(1_000_000)})
    assert names(tmp_path) == []


def test_a_limit_on_files_is_a_full_disk(tmp_path):
    """The real library, refused by the system."""
    write_checkpoint(tmp_path, 1, tree_of(1))
    unlock_folder(tmp_path)

    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path, 2, {"a": torch.zeros(1_000_000)})

    assert in_a_fork(work) == 0
    assert names(tmp_path) == ["checkpoint-000001"]
