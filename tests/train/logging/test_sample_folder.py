"""Folders of samples are whole or not there."""

import errno
import json
import os

import numpy as np
import pytest
from helpers.train_runs import in_a_fork
from helpers.validation_cases import bytes_of
from PIL import Image

from twinflow import atomic_files
from twinflow.train.logging import sample_folder
from twinflow.train.logging.sample_folder import write_samples


def images(seed: int = 0, rows: int = 2) -> list:
    random = np.random.default_rng(seed)
    return [
        ({"prompt": f"prompt {row}", "steps": steps, "seed": row}, random.integers(0, 255, (32, 48, 3), np.uint8))
        for row in range(rows)
        for steps in (1, 2)
    ]


def write(folder, seed: int = 0) -> None:
    write_samples(folder, "title", ["1 step", "2 steps"], images(seed), step=5, weights="ema", width=48, height=32)


def test_what_is_in_it(tmp_path):
    folder = tmp_path / "samples" / "step-000005"
    write(folder)
    told = json.loads((folder / "samples.json").read_text())
    listed = told.pop("images")
    assert told == {"step": 5, "weights": "ema", "width": 48, "height": 32, "grid": "grid.png"}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["samples.json", "grid.png", *(image["file"] for image in listed)]
    )
    for found, (about, pixels) in zip(listed, images(), strict=True):
        assert {**about, "file": found["file"]} == found
        assert np.array_equal(np.asarray(Image.open(folder / found["file"])), pixels)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("at", ["image_grid", "sync", "rename"])
@pytest.mark.parametrize("before", [False, True])
def test_a_kill_leaves_a_whole_folder_or_none(before, at, tmp_path, monkeypatch):
    folder = tmp_path / "step-000005"
    if before:
        write(folder, seed=1)
    old = bytes_of(folder) if before else None
    write(tmp_path / "expected")
    new = bytes_of(tmp_path / "expected")

    kept = os.rename

    def rename(path, to):  # the earlier folder has made room
        return kept(path, to) if path == folder else os._exit(9)

    module = {"image_grid": sample_folder, "sync": atomic_files, "rename": os}[at]

    def killed() -> None:
        monkeypatch.setattr(module, at, rename if at == "rename" else lambda *_: os._exit(9))
        write(folder)

    assert in_a_fork(killed) == 9
    assert not folder.exists() or bytes_of(folder) == old
    assert folder.exists() == (before and at != "rename")
    write(folder)
    assert bytes_of(folder) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "step-000005"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "step-000005"
    write(folder, seed=1)
    old = bytes_of(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="output_dir must take 4 images, got No space left on device"):
        write(folder)
    assert bytes_of(folder) == old and [path.name for path in tmp_path.iterdir()] == [folder.name]
