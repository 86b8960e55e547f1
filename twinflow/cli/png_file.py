"""`new_png()`: an image as a file that says how it was drawn."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_MOST_LETTERS = 48  # of a prompt, in a file's name


def new_png(image: Any, folder: Path, about: Mapping[str, object]) -> Path:
    """Writes an image under a name that no other file has.

    Args:
        image: a PIL image.
        folder: where it goes.
        about: how it was drawn, kept in the file's text; `prompt`, `steps` and `seed` make its name.

    Returns:
        The file.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    for name, value in {**about, "width": image.width, "height": image.height, "software": _software()}.items():
        text.add_itxt(name, str(value))
    words = re.sub(r"\W+", "-", str(about["prompt"]).lower())[:_MOST_LETTERS].strip("-_") or "image"
    stem = f"{words}-{about['steps']}steps-seed{about['seed']}"
    for number in range(1, 10**6):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            with open(path, "xb") as file:
                image.save(file, "PNG", pnginfo=text)
        except FileExistsError:
            continue
        return path
    raise ValueError(f"sample: out must have a free name like {stem}.png, got {folder} with a million of them")


def _software() -> str:
    return f"twinflow {version('twinflow')}"
