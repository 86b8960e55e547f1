"""`read_folder()` and `read_prompts()`: what there is to train on, from files that anyone may have written."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from twinflow.errors import ArgumentError, require
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
    name: str


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
    require(strategy in STRATEGIES, "read_folder", "strategy", f"one of {', '.join(STRATEGIES)}", repr(strategy))
    require(root.is_dir(), "read_folder", "folder", "a folder that exists", repr(str(root)))
    files = _files(root)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    wanted = f"images ({' '.join(IMAGE_SUFFIXES)})"
    require(images, "read_folder", "folder", wanted, f"none in {root}", verb="hold")
    metadata = [path for path in files if path.name.lower() in _METADATA]
    if metadata_file is not None:
        metadata = [Path(metadata_file)]
    texts = {_stem(path): path for path in files if path.suffix.lower() == ".txt"}
    beside = next((texts[_stem(path)] for path in images if _stem(path) in texts), None)
    if strategy == "auto" and metadata and beside and metadata_file is None:
        wanted, got = "textfile or metadata where both exist", f"auto with {metadata[0]} and {beside}"
        raise ArgumentError("read_folder", "strategy", wanted, got)
    if strategy == "metadata" or (strategy == "auto" and metadata):
        wanted = f"{', '.join(_METADATA[:-1])} or .parquet"
        require(metadata, "read_folder", "folder", wanted, f"none in {root}", verb="hold")
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
    known = path.suffix.lower() in (".txt", ".jsonl")
    require(known, "read_prompts", "path", "a .txt or .jsonl file", repr(str(path)))
    lines = read_text(path, "read_prompts", "path").split("\n")
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    require(found, "read_prompts", "path", "a prompt a line", f"the empty {path}", verb="hold")
    if path.suffix.lower() == ".txt":
        return [line for _, line in found]
    return [_prompt(line, f"{path} line {number}") for number, line in found]


def _prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ArgumentError("read_prompts", "each line", "JSON", f"{where}: {line[:60]!r}") from None
    if isinstance(found, dict):
        key = next((key for key in _PROMPT_KEYS if key in found), "")
        require(key, "read_prompts", where, f"one of {', '.join(_PROMPT_KEYS)}", ", ".join(found), verb="have")
        found = found[key]
    words = isinstance(found, str) and found.strip()
    require(words, "read_prompts", where, "a prompt", repr(found), verb="hold")
    return str(words)


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
        first = of.setdefault(text, path)
        got = f"{text} for {first.name} and {path.name}"
        require(first is path, "read_folder", "a caption", "of one image", got)
        captions[path] = read_text(text, "read_folder", "captions").strip()
        require(captions[path], "read_folder", "captions", "text", f"the empty {text}", verb="hold")
    return captions


def _captioned(images: Iterable[Path], captions: dict[Path, str], root: Path) -> list[Item]:
    bare = [str(path.relative_to(root)) for path in images if path not in captions]
    got = f"none for {', '.join(bare[:5])}" + (f" and {len(bare) - 5} more" if len(bare) > 5 else "")
    wanted = "a caption (a .txt file of its name, or a row of metadata)"
    require(not bare, "read_folder", "each image", wanted, got, verb="have")
    return [Item(path, captions[path], path.relative_to(root).as_posix()) for path in images]
