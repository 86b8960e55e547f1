"""`new_export()`: the folder that an export's files appear in together, and how stock diffusers reads it."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twinflow.errors import require
from twinflow.formats.manifest import (
    COMFYUI_LORA,
    COMFYUI_MODEL,
    CONDITIONING,
    LORA,
    MANIFEST,
    Manifest,
    read_manifest,
    write_manifest,
)

# Files of an export, which another one into the same folder replaces.
_FILES = {
    ("lora", "diffusers"): (LORA, CONDITIONING),
    ("full", "diffusers"): ("config.json", "diffusion_pytorch_model*"),
    ("lora", "comfyui"): (COMFYUI_LORA, CONDITIONING),
    ("full", "comfyui"): (COMFYUI_MODEL,),
}


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Raises ValueError where a path is a file, or a folder has files of another origin that would be replaced."""
    require(folder.is_dir() or not folder.exists(), "export", "folder", "a folder", f"the file {folder}")
    mine = _files(folder, read_manifest(folder))
    foreign = sorted(path.name for path in _files(folder, manifest) - mine)
    got = f"{folder} with {', '.join(foreign)}"
    require(not foreign, "export", "folder", "new or an earlier export", got)


def _files(folder: Path, manifest: Manifest | None) -> set[Path]:
    """The files there that belong to an export of this kind."""
    patterns = () if manifest is None else _FILES[manifest.kind, manifest.layout]
    return {path for pattern in patterns for path in folder.glob(pattern)}


@contextmanager
def new_export(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """A folder to write an export into; at the end its files move to where they belong, the manifest last."""
    # Inside a folder that exists: it may be a file system of its own, across which files cannot be moved.
    beside = folder if folder.is_dir() else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=beside))
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        before = _files(folder, read_manifest(folder))
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in before:
            path.unlink()
        for path in partial.iterdir():
            path.replace(folder / path.name)
        write_manifest(manifest, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def without_refusal(folder: Path) -> Iterator[Path]:
    """A model's folder as stock diffusers loads it: the same files, and a configuration without `REFUSAL`."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.needs_conditioning:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name)
        for path in folder.iterdir():
            (plain / path.name).symlink_to(path.resolve())
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        (plain / "config.json").unlink()
        (plain / "config.json").write_text(json.dumps(config))
        yield plain
