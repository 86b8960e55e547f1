"""What encodings are kept by, and what a cache is asked for, as hashes; checks of that."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from twinflow.train.data.buckets import Size
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import Item


def entry_name(item: Item) -> str:
    """The name that an item is known by."""
    return item.name or str(item.path)


def hashed(*parts: object) -> str:
    """A hash of numbers and texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_key(words: str, encoders: Encoders) -> str:
    """What the condition of a prompt is kept by."""
    return hashed(words, encoders.text_identity, encoders.family)


def request_of(items: Iterable[Item | str], encoders: Encoders, sizes: Sequence[Size], *how: object) -> str:
    """What a cache is built for, from what every rank knows without reading an image."""
    told = [item if isinstance(item, str) else [entry_name(item), item.caption] for item in items]
    return hashed(told, list(sizes), encoders.family, encoders.vae_identity, encoders.text_identity, how)


def check_request(items: Sequence[Item] | Sequence[str], encoders: Encoders, sizes: Sequence[Size]) -> None:
    """Raises ValueError unless there are items of one kind, with different names, and sizes that the model takes."""
    if not items:
        raise ValueError("build_cache: items must be images or prompts, got none")
    if len({isinstance(item, str) for item in items}) != 1:
        raise ValueError("build_cache: items must be images or prompts, got both")
    names = [entry_name(item) for item in items if isinstance(item, Item)]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"build_cache: items must have different names, got {twice!r} twice")
    unfit = [size for size in sizes if size[0] % encoders.multiple or size[1] % encoders.multiple or min(size) < 1]
    if unfit or not sizes:
        got = unfit[0] if unfit else "none"
        raise ValueError(f"build_cache: sizes must be multiples of {encoders.multiple} px, got {got}")
