"""`write_samples()`: a folder of images with `samples.json` and `grid.png`, whole or not there."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinflow.atomic_files import partial_folder, publish_folder, remove_partials
from twinflow.train.logging.image_grid import image_grid

SUMMARY, GRID = "samples.json", "grid.png"


def write_samples(
    folder: Path, title: str, columns: Sequence[str], images: Sequence[tuple[dict[str, Any], np.ndarray]], **more: Any
) -> None:
    """Writes a folder in the form that `RunFolder` says, in place of one that is there.

    It is filled under a hidden name and renamed once all of it is on the disk.

    Args:
        folder: such as `RunFolder.samples_at` names.
        columns: headings of the grid.
        images: `prompt`, `steps` and what else is said of an image; and the image, (height, width, 3) uint8: row by row
            of the grid.
        more: entries of `samples.json` beside `images` and `grid`.

    Raises:
        OSError: no room, or no folder; what was there before stays.
    """
    partial = partial_folder(folder)
    try:
        remove_partials(folder.parent)
        partial.mkdir(parents=True)
        _fill(partial, title, columns, images, more)
        publish_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        wanted = f"Sampler: output_dir must take {len(images)} images"
        raise OSError(error.errno, f"{wanted}, got {os.strerror(error.errno or 0)}: {folder}") from None


def _fill(
    folder: Path,
    title: str,
    columns: Sequence[str],
    images: Sequence[tuple[dict[str, Any], np.ndarray]],
    more: dict[str, Any],
) -> None:
    told, pictures = [], []
    for number, (about, pixels) in enumerate(images):
        row = number // len(columns) + 1
        name = f"{row:02}-{about['steps']}.png"
        picture = Image.fromarray(pixels)
        picture.save(folder / name)
        told.append({"file": name, **about})
        pictures.append(picture)
    rows = [
        (images[first][0]["prompt"], pictures[first : first + len(columns)])
        for first in range(0, len(images), len(columns))
    ]
    image_grid(title, columns, rows).save(folder / GRID)
    summary = {**more, "images": told, "grid": GRID}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
