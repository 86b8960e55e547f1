"""`Cache`: what was encoded, read from its folder alone; `open_cache()`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twinflow.errors import ArgumentError, require
from twinflow.models.registry import FAMILIES
from twinflow.train.data.encoders import Condition, collate
from twinflow.train.data.shards import Shards

INDEX = "index.json"
_LOOKED_AT = 256  # prompts whose length is read
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """An image with its caption, or a prompt without an image.

    Args:
        name: path of the image, or number of the prompt; no two are equal.
        content: sha256 of the image's bytes, or of the prompt.
        size: height and width it is trained in, px.
        latents: key of its latents; None: there is no image, they are zeros.
        condition: key of its condition.
    """

    name: str
    caption: str
    content: str
    size: tuple[int, int]
    latents: str | None
    condition: str


@dataclass(frozen=True)
class Index:
    """The file that names what is cached; written when all of it is."""

    request: str  # hash of what was asked for
    family: str
    uncond: str  # key of the unconditional condition
    shapes: dict[str, list[int]]  # "height width" -> C, H, W
    entries: list[Entry]
    skipped: dict[str, str]  # images that cannot be read -> why
    warnings: list[str]
    format: int = FORMAT


class Cache:
    """Latents and conditions of a data set, mapped from the cache's files.

    Attributes:
        entries: what there is to train on.
        family: whose encoders made it.
        uncond: condition of the unconditional prompt, of one row, with all its entries.
        skipped: name -> reason of images that were left out.
        warnings: what the user should know of the data, in words.
        request: hash of what the cache was built for.
    """

    def __init__(self, folder: Path, index: Index, shards: Shards) -> None:
        self.folder, self.family, self.request = folder, index.family, index.request
        self.entries = tuple(index.entries)
        self.skipped, self.warnings = dict(index.skipped), tuple(index.warnings)
        self._shapes = {tuple(map(int, size.split())): tuple(shape) for size, shape in index.shapes.items()}
        self._shards = shards
        keys = {index.uncond} | {e.condition for e in self.entries} | {e.latents for e in self.entries if e.latents}
        lost, wanted = sum(key not in shards for key in keys), "all that its index names"
        require(not lost, "open_cache", str(folder), wanted, f"{lost} missing", "cache again", "hold")
        self.uncond: Condition = collate([shards.read(index.uncond)])

    def latents(self, entries: Sequence[Entry]) -> torch.Tensor:
        """(B, C, H, W) of entries of one size, in the autoencoder's dtype; float32 zeros for prompts without images.

        Raises:
            ValueError: entries of several sizes, or latents of another shape than the cache says.
        """
        sizes = {e.size for e in entries}
        require(len(sizes) == 1, "Cache", "entries", "of one size", sorted(sizes))
        shape = self._shapes[sizes.pop()]
        found = [torch.zeros(shape) if e.latents is None else self._shards.read(e.latents)["latents"] for e in entries]
        for x in found:
            got = f"{tuple(x.shape)} in {self.folder}"
            require(tuple(x.shape) == shape, "Cache", "latents", f"of shape {shape}", got)
        return torch.stack(found)

    def condition(self, entries: Sequence[Entry]) -> Condition:
        """The condition of entries of one size, with `prompt_lengths` where prompts are of their own length."""
        collated = collate([self._shards.read(e.condition) for e in entries])
        return FAMILIES[self.family].at_size(collated, entries[0].size)

    def uncond_at(self, size: tuple[int, int]) -> Condition:
        """`uncond` for images of a size, px: the same, but for models that are told it."""
        return FAMILIES[self.family].at_size(self.uncond, size)


def held_out(entries: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on, and those held out for a validation loss.

    An entry's side is read from its content alone: it stays there when others come, go, or change their captions.

    Args:
        share: of contents held out, 0 to below 1; few entries may have none.

    Raises:
        ValueError: another share, or nothing left to train on.
    """
    require(0 <= share < 1, "held_out", "share", "a number in 0 .. 1, below 1", repr(share))
    out = [int(e.content[:13], 16) / 16**13 < share for e in entries]
    got = f"{share} of {len(entries)} entries"
    require(not entries or not all(out), "held_out", "share", "something to train on", got, verb="leave")
    return [e for e, held in zip(entries, out, strict=True) if not held], [
        e for e, held in zip(entries, out, strict=True) if held
    ]


def on_device(cond: Condition, device: torch.device) -> Condition:
    """A condition where a network computes; prompts' lengths stay on the host, which reads them."""
    return {name: leaf if name == "prompt_lengths" else uploaded(leaf, device) for name, leaf in cond.items()}


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device; to a GPU from pinned memory, so that its queue is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def open_cache(folder: str | Path) -> Cache:
    """The cache that `build_cache` last completed in a folder.

    Raises:
        ValueError: there is none, or its files are not as they were written.
    """
    path = Path(folder) / INDEX
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        index = _index(saved)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArgumentError("open_cache", "folder", "a cache", f"{path}: {error}", verb="hold") from None
    return Cache(Path(folder), index, Shards(Path(folder)))


def _index(saved: dict[str, Any]) -> Index:
    require(saved.get("format") == FORMAT, "", "its format", str(FORMAT), repr(saved.get("format")))
    entries = [Entry(**entry | {"size": tuple(map(int, entry["size"]))}) for entry in saved["entries"]]
    for entry in entries:
        int(entry.content[:13], 16)
        if f"{entry.size[0]} {entry.size[1]}" not in saved["shapes"]:
            raise ValueError(f"no shape for the size of {entry.name!r}")
    return Index(**saved | {"entries": entries})


def longest_prompt(cache: Cache) -> int | None:
    """Tokens of the longest prompt of a data set, of a few hundred prompts of it; None: not known."""
    stride = max(1, len(cache.entries) // _LOOKED_AT)
    lengths = [int(cache.condition([entry])["prompt_embeds"].shape[1]) for entry in cache.entries[::stride]]
    return max(lengths, default=None)
