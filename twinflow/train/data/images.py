"""`read_folder()` and `read_prompts()`: what there is to train on, from files that anyone may have written."""

import json
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from twinflow.errors import ArgumentError, require
from twinflow.train.data.captions import (
    Faults,
    has_words,
    listed,
    metadata_captions,
    normalised,
    raise_faults,
    read_text,
)
from twinflow.train.logging.sample_folder import SUMMARY

# An animation or a file of several pictures gives its first.
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", *((".avif", ".avifs") if features.check("avif") else ()),
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".gif", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".jp2", ".j2k", ".jpf",
    ".jpx", ".tga", ".psd", ".psb", ".xcf", ".kra", ".svg", ".ico", ".icns", ".pcx", ".qoi", ".dds", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw", ".raw",
)  # fmt: skip
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # known by their content, whatever their name
_NO_IMAGES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".md", ".safetensors", ".npz")
STRATEGIES = ("auto", "textfile", "metadata")
SKIP = "skip_bad leaves them out"
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
    leave_out: Collection[str | Path] = (),
    skipped: dict[str, str] | None = None,
) -> list[Item]:
    """The images of a folder and of the folders in it, with their captions.

    Captions stand in a .txt file of the image's name, or in `metadata.jsonl`, `.csv` or `.parquet` beside the images or
    above them, as in the image folders of `datasets`. Files and folders whose names begin with a dot are left out, and
    the samples that runs draw.

    Args:
        caption_column: of the metadata; where it is `text` and there is none, `caption` is read.
        image_column: of the metadata: names of images, relative to the metadata's own folder.
        strategy: `textfile`, `metadata`, or `auto`: whichever there is.
        metadata_file: the metadata, where it is not called `metadata`; its names are relative to `folder`.
        leave_out: folders inside it that are not looked into.
        skipped: gets image or row -> why of what cannot be trained on; None: that is an error.

    Returns:
        The items, in order of their paths.

    Raises:
        ValueError: no images, images without captions, empty or ambiguous captions, or metadata that cannot be read or
            names what is not there: all of it at once, the first ten of each kind.
        ImportError: .parquet without pyarrow.
    """
    root = Path(folder)
    require(strategy in STRATEGIES, "read_folder", "strategy", f"one of {', '.join(STRATEGIES)}", repr(strategy))
    require(root.is_dir(), "read_folder", "folder", "a folder that exists", repr(str(root)))
    files = _files(root, leave_out)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    wanted = f"images ({' '.join(IMAGE_SUFFIXES)})"
    require(images, "read_folder", "folder", wanted, f"none in {root}", verb="hold")
    metadata = [path for path in files if path.name.lower() in _METADATA]
    if metadata_file is not None:
        metadata = [Path(metadata_file)]
    texts = _texts(images, files)
    beside = next(iter(texts.values()), None)
    if strategy == "auto" and metadata and beside and metadata_file is None:
        wanted, got = "textfile or metadata where both exist", f"auto with {metadata[0]} and {beside}"
        raise ArgumentError("read_folder", "strategy", wanted, got)
    faults: Faults = {}
    if strategy == "metadata" or (strategy == "auto" and metadata):
        wanted = f"{', '.join(_METADATA[:-1])} or .parquet"
        require(metadata, "read_folder", "folder", wanted, f"none in {root}", verb="hold")
        base = root if metadata_file is not None else None
        captions = metadata_captions(metadata, image_column, caption_column, root, files, faults, base)
    else:
        captions = _text_captions(images, texts, root, faults)
    return _captioned(images, captions, root, faults, skipped)


def unread_images(folder: str | Path, leave_out: Collection[str | Path] = ()) -> dict[str, int]:
    """Suffix -> number of the image files of a folder that `read_folder` passes over for their suffix."""
    files = [path for path in _files(Path(folder), leave_out) if path.suffix.lower() not in IMAGE_SUFFIXES]
    suffixes = [path.suffix.lower() or "(no suffix)" for path in files if _is_image(path)]
    return {suffix: suffixes.count(suffix) for suffix in sorted({*suffixes})}


def _is_image(path: Path) -> bool:
    """Whether a file is an image by its suffix or by how it begins."""
    suffix = path.suffix.lower()
    if suffix in UNREAD_SUFFIXES or suffix in _NO_IMAGES:
        return suffix in UNREAD_SUFFIXES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about what it finds odd
            Image.open(path, formats=_FORMATS).close()
        return True
    except Exception:  # whatever Pillow makes of a file that is none
        return False


def read_prompts(path: str | Path, *, skipped: dict[str, str] | None = None) -> list[str]:
    """The prompts of a .txt file, one a line, or of a .jsonl file: texts, or objects with `prompt`, `text`, `caption`.

    Args:
        skipped: gets line -> why of what is no prompt; None: that is an error.

    Raises:
        ValueError: no such file, another kind of file, nothing in it, or lines that are no prompts: all at once.
    """
    path = Path(path)
    known = path.suffix.lower() in (".txt", ".jsonl")
    require(known, "read_prompts", "path", "a .txt or .jsonl file", repr(str(path)))
    lines = read_text(path, "read_prompts", "path").split("\n")
    prompts, faults = [], Faults()
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        try:
            if line.strip():
                prompts.append(line.strip() if path.suffix.lower() == ".txt" else _prompt(line, where))
        except ArgumentError as error:
            faults[where] = error
    if skipped is None or not prompts:
        raise_faults([*faults.values()], SKIP if skipped is None else "")
    else:
        skipped |= {where: fault.without_function for where, fault in faults.items()}
    require(prompts, "read_prompts", "path", "a prompt a line", f"the empty {path}", verb="hold")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ArgumentError("read_prompts", "each line", "JSON", f"{where}: {line[:60]!r}") from None
    if isinstance(found, dict):
        key = next((key for key in _PROMPT_KEYS if key in found), "")
        got = f"{', '.join(found)} in {where}"
        require(key, "read_prompts", "each line", f"one of {', '.join(_PROMPT_KEYS)}", got, verb="have")
        found = found[key]
    require(has_words(found), "read_prompts", "each line", "a prompt", f"{found!r} in {where}", verb="hold")
    return str(found)


def _files(root: Path, leave_out: Collection[str | Path] = ()) -> list[Path]:
    """All files under a folder, through links too, but each folder once; sorted. Samples of runs are none of them."""
    found: list[Path] = []
    seen = {os.path.realpath(folder) for folder in leave_out}
    for place, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(place))
        if SUMMARY in names and Path(place) != root:
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        )
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _texts(images: list[Path], files: list[Path]) -> dict[Path, Path]:
    """Image -> the .txt file of its name, in the same Unicode normalisation or in another."""
    exact = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    alike = normalised(exact)
    texts = {}
    for image in images:
        stem = image.with_suffix("")
        name = next(iter(normalised([stem])))
        if stem in exact or name in alike:
            texts[image] = exact[stem if stem in exact else alike[name]]
    return texts


def _text_captions(images: list[Path], texts: dict[Path, Path], root: Path, faults: Faults) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    of: dict[Path, Path] = {}
    for path in images:
        text = texts.get(path)
        if text is None:
            continue
        try:
            first = of.setdefault(text, path)
            got = f"{text} for {first.name} and {path.name}"
            require(first is path, "read_folder", "a caption", "of one image", got)
            caption = read_text(text, "read_folder", "captions").strip()
            require(has_words(caption), "read_folder", "captions", "text", f"the empty {text}", verb="hold")
            captions[path] = caption
        except ArgumentError as error:
            faults[path.relative_to(root).as_posix()] = error
    return captions


def _captioned(
    images: list[Path], captions: dict[Path, str], root: Path, faults: Faults, skipped: dict[str, str] | None
) -> list[Item]:
    """The images with a caption; the others raise, or are noted."""
    items = [Item(path, captions[path], path.relative_to(root).as_posix()) for path in images if path in captions]
    names = [path.relative_to(root).as_posix() for path in images if path not in captions]
    bare = [name for name in names if name not in faults]
    wanted = "a caption (a .txt file of its name, or a row of metadata)"
    missing = ArgumentError("read_folder", "each image", wanted, f"none for {listed(bare)}", verb="have")
    if skipped is None or not items:
        hint = SKIP if skipped is None else ""
        raise_faults([*faults.values(), *([missing] if bare else [])], hint)
    else:
        skipped |= {name: fault.without_function for name, fault in faults.items()}
        skipped |= dict.fromkeys(bare, "it has no caption")
    return items
