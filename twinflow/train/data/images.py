"""`read_folder()` and `read_prompts()`: what there is to train on, from files that anyone may have written."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from twinflow.train.data.captions import metadata_captions, read_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
UNREAD_SUFFIXES = (".gif", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".dng", ".cr2", ".nef")
STRATEGIES = ("auto", "textfile", "metadata")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PROMPT_KEYS = ("prompt", "text", "caption")


@dataclass(frozen=True)
class Item:
    """An image file, what it shows in words, and its path in the data folder, which stays when the folder moves."""

    path: Path
    caption: str
    name: str = ""


def read_folder(
    folder: str | Path,
    caption_column: str = "text",
    *,
    image_column: str = "file_name",
    strategy: str = "auto",
    metadata_file: str | Path | None = None,
) -> list[Item]:
    """The images of a folder and of the folders in it, with their captions.

    Captions stand in a .txt file of the image's name, or in `metadata.jsonl`, `.csv` or `.parquet` beside the images or
    above them, as in the image folders of `datasets`. Files and folders whose names begin with a dot are left out.

    Args:
        folder: where the images are.
        caption_column: of the metadata; where it is `text` and there is none, `caption` is read.
        image_column: of the metadata: names of images, relative to the metadata's own folder.
        strategy: `textfile`, `metadata`, or `auto`: whichever there is.
        metadata_file: the metadata, where it is not called `metadata`; its names are relative to `folder`.

    Returns:
        The items, in order of their paths.

    Raises:
        ValueError: no images, an image without a caption, an empty or ambiguous caption, or metadata that cannot be
            read or names what is not there.
        ImportError: .parquet without pyarrow.
    """
    root = Path(folder)
    if strategy not in STRATEGIES:
        raise ValueError(f"read_folder: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not root.is_dir():
        raise ValueError(f"read_folder: folder must be a folder that exists, got {str(root)!r}")
    files = _files(root)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"read_folder: folder must hold images ({' '.join(IMAGE_SUFFIXES)}), got none in {root}")
    metadata = [path for path in files if path.name.lower() in _METADATA]
    if metadata_file is not None:
        metadata = [Path(metadata_file)]
    texts = {_stem(path): path for path in files if path.suffix.lower() == ".txt"}
    beside = any(_stem(path) in texts for path in images)
    if strategy == "auto" and metadata and beside and metadata_file is None:
        raise ValueError(
            f"read_folder: strategy must be textfile or metadata where both exist, got auto with {metadata[0]} and "
            f"{next(texts[_stem(path)] for path in images if _stem(path) in texts)}"
        )
    if strategy == "metadata" or (strategy == "auto" and metadata):
        if not metadata:
            raise ValueError(
                f"read_folder: folder must hold {', '.join(_METADATA[:-1])} or .parquet, got none in {root}"
            )
        base = root if metadata_file is not None else None
        captions = metadata_captions(metadata, image_column, caption_column, root, base)
    else:
        captions = _text_captions(images, texts)
    return _captioned(images, captions, root)


def unread_images(folder: str | Path) -> dict[str, int]:
    """Suffix -> number of the image files of a folder that are of no kind that `read_folder` takes."""
    suffixes = [path.suffix.lower() for path in _files(Path(folder))]
    return {suffix: suffixes.count(suffix) for suffix in UNREAD_SUFFIXES if suffix in suffixes}


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt file, one a line, or of a .jsonl file: texts, or objects with `prompt`, `text`, `caption`.

    Raises:
        ValueError: no such file, another kind of file, or nothing in it.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"read_prompts: path must be a .txt or .jsonl file, got {str(path)!r}")
    lines = read_text(path, "read_prompts: path").split("\n")
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        prompts = [_prompt(line, f"{path} line {number}") for number, line in found]
    else:
        prompts = [line for _, line in found]
    if not prompts:
        raise ValueError(f"read_prompts: path must hold a prompt a line, got the empty {path}")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"read_prompts: each line must be JSON, got {where}: {line[:60]!r}") from None
    if isinstance(found, dict):
        key = next((key for key in _PROMPT_KEYS if key in found), None)
        if key is None:
            raise ValueError(
                f"read_prompts: {where} must have one of {', '.join(_PROMPT_KEYS)}, got {', '.join(found)}"
            )
        found = found[key]
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"read_prompts: {where} must hold a prompt, got {found!r}")
    return found.strip()


def _files(root: Path) -> list[Path]:
    """All files under a folder, through links too, but each folder once; sorted."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        )
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _stem(path: Path) -> Path:
    return path.with_suffix("")


def _text_captions(images: list[Path], texts: dict[Path, Path]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    of: dict[Path, Path] = {}
    for path in images:
        text = texts.get(_stem(path))
        if text is None:
            continue
        if text in of:
            raise ValueError(
                f"read_folder: a caption must be of one image, got {text} for {of[text].name} and {path.name}"
            )
        of[text] = path
        captions[path] = read_text(text, "read_folder: captions").strip()
        if not captions[path]:
            raise ValueError(f"read_folder: captions must hold text, got the empty {text}")
    return captions


def _captioned(images: Iterable[Path], captions: dict[Path, str], root: Path) -> list[Item]:
    bare = [str(path.relative_to(root)) for path in images if path not in captions]
    if bare:
        more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
        raise ValueError(
            "read_folder: each image must have a caption (a .txt file of its name, or a row of metadata), got none for "
            f"{', '.join(bare[:5])}{more}"
        )
    return [Item(path, captions[path], path.relative_to(root).as_posix()) for path in images]
