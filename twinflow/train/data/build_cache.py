"""`build_cache()`: encodes what is not encoded yet, so that training needs neither encoders nor images."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from twinflow.atomic_files import remove_partials, write_file
from twinflow.errors import ArgumentError, require, require_type
from twinflow.train.checkpoint.folder_lock import acquire
from twinflow.train.data.buckets import (
    MAX_CUT,
    MAX_UPSCALE,
    ImageError,
    Size,
    as_model_input,
    cut_share,
    nearest_bucket,
    read_pixels,
    resize_rule,
    upright_size,
    upscale,
)
from twinflow.train.data.cache import INDEX, Cache, Entry, Index, open_cache
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import Item
from twinflow.train.data.shards import Shards, ShardWriter

Progress = Callable[[str, int, int], None]  # what, done, of
Part = TypeVar("Part")
LOCK = "lock"
_READERS = 4  # threads that read and resize images


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How a cache is built.

    Args:
        vae_batch, text_batch: images and prompts encoded at once.
        skip_bad: leave out images that cannot be read; they are listed in any case.
        shard_bytes: of encodings kept back before a file is written: what a kill loses at most.
    """

    uncond: str = ""
    vae_batch: int = 4
    text_batch: int = 16
    skip_bad: bool = False
    shard_bytes: int = 128_000_000

    def __post_init__(self) -> None:
        for name in ("vae_batch", "text_batch", "shard_bytes"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, "CacheOptions", name, "an integer >= 1", repr(value))
        kind = type(self.uncond)
        require_type(issubclass(kind, str), "CacheOptions", "uncond", "a prompt", kind.__name__)


@dataclass
class _Work:
    """What a build has found so far."""

    entries: list[Entry] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)  # name -> file
    bad: dict[str, str] = field(default_factory=dict)  # name -> why
    enlarged: dict[str, float] = field(default_factory=dict)  # name -> times
    cut: dict[str, float] = field(default_factory=dict)  # name -> share of its area
    warnings: list[str] = field(default_factory=list)


def build_cache(
    folder: str | Path,
    items: Sequence[Item] | Sequence[str],
    encoders: Encoders,
    sizes: Sequence[Size],
    *,
    options: CacheOptions | None = None,
    skipped: Mapping[str, str] | None = None,
    progress: Progress = lambda what, done, of: None,
    main_process: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Cache:
    """Encodes images and captions, or prompts, and the unconditional prompt, unless they are there already.

    Latents are kept by the image's bytes, size, resize rule and autoencoder; conditions by the words and the text
    encoders. A build that was ended in whatever way goes on where its last file was written. Encodings that no item
    needs any more stay.

    Args:
        folder: of the cache; others may use and build it at the same time.
        items: of `read_folder`, or prompts for training without images.
        encoders: loaded only if something is missing, and let go at the end.
        sizes: of `buckets`; prompts take the one most like a square.
        skipped: what was left out before -> why, for the cache to tell.
        progress: called with what is done (as "encoding images"), how many, of how many.
        main_process: whether this process encodes; others read what it has encoded.
        wait: called by all, when the main process is done: a barrier.

    Returns:
        The cache.

    Raises:
        ValueError: no items, unfit sizes, or images that cannot be read, all of them listed, unless `skip_bad`.
        OSError: no room; what was written before stays.
    """
    folder, options = Path(folder), options or CacheOptions()
    check_request(items, encoders, sizes)
    request = request_of(items, encoders, sizes, options.uncond, options.skip_bad)
    if not main_process:
        wait()
        cache = open_cache(folder)
        wanted = "been built by the main process"
        require(cache.request == request, "build_cache", str(folder), wanted, "one for other data", verb="have")
        return cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder / LOCK, lambda holder: progress(f"waiting for {holder}", 0, 0))
        try:
            cache = _build(folder, list(items), encoders, sizes, options, progress, request, skipped or {})
        finally:
            lock.release()
    finally:
        encoders.free()
        wait()
    return cache


def _build(
    folder: Path,
    items: Sequence[Item | str],
    encoders: Encoders,
    sizes: Sequence[Size],
    options: CacheOptions,
    progress: Progress,
    request: str,
    skipped: Mapping[str, str],
) -> Cache:
    shards, work = Shards(folder, verify=True), _Work()
    remove_partials(folder)
    for path in shards.damaged:
        path.unlink(missing_ok=True)
    work.warnings += [f"{path.name} was damaged: what it held is encoded again" for path in shards.damaged]
    for done, item in enumerate(items, 1):
        _find(item, done, work, encoders, sizes)
        progress(f"looking at {'images' if isinstance(item, Item) else 'prompts'}", done, len(items))
    words, uncond = {e.condition: e.caption for e in work.entries}, text_key(options.uncond, encoders, negative=True)
    if uncond not in shards and uncond != text_key(options.uncond, encoders):
        with ShardWriter(shards, options.shard_bytes) as writer:
            writer.add({uncond: encoders.negative_prompt(options.uncond)})
    elif uncond not in words:
        words = {uncond: options.uncond} | words
    _encode_prompts(words, shards, encoders, options, progress)
    _encode_images(work, shards, encoders, options, progress)
    entries = [e for e in work.entries if e.name not in work.bad]
    if work.bad and not (options.skip_bad and entries):
        listed = "; ".join(f"{name}: {why}" for name, why in sorted(work.bad.items()))
        wanted = "readable" if options.skip_bad else "readable (skip_bad leaves them out)"
        raise ArgumentError("build_cache", "images", wanted, f"{len(work.bad)} that are not: {listed}")
    work.warnings += _warnings(work, entries, encoders)
    shapes = {f"{height} {width}": list(encoders.latent_shape((height, width))) for height, width in sizes}
    index = Index(request, encoders.family, uncond, shapes, entries, {**skipped, **work.bad}, work.warnings)
    write_file(folder / INDEX, json.dumps(asdict(index)).encode())
    return Cache(folder, index, shards)


def _warnings(work: _Work, entries: list[Entry], encoders: Encoders) -> list[str]:
    """What enlarging, cutting and encoding do to many images and captions."""
    said, images = [], f"of {len(entries)} images"
    large = {name: times for name, times in work.enlarged.items() if times > MAX_UPSCALE}
    if large:
        most = max(large, key=lambda name: large[name])
        said.append(
            f"{len(large)} {images} are enlarged more than {MAX_UPSCALE} times, the most is "
            f"{most}, {large[most]:.1f} times: a smaller resolution would fit them"
        )
    cut = {name: share for name, share in work.cut.items() if share > MAX_CUT}
    if cut:
        most = max(cut, key=lambda name: cut[name])
        said.append(
            f"{len(cut)} {images} lose more than {MAX_CUT:.0%} of their area at their edges, where they are cut to the "
            f"aspect ratio that they are trained in, the most is {most}, {cut[most]:.0%}"
        )
    counts = encoders.unread_tokens([entry.caption for entry in entries])
    long = [(count, entry.name) for count, entry in zip(counts, entries, strict=True) if count]
    if long:
        count, name = max(long)
        said.append(
            f"{len(long)} of {len(entries)} captions are longer than the text encoder reads: their ends are lost, "
            f"the most is the last {count} tokens of {name}"
        )
    return said


def _find(item: Item | str, number: int, work: _Work, encoders: Encoders, sizes: Sequence[Size]) -> None:
    """Notes what an item is and by which keys it is cached."""
    if isinstance(item, str):
        size = nearest_bucket(sizes, (1, 1))
        key = text_key(item, encoders)
        work.entries.append(Entry(f"prompt {number}", item, hashed(item), size, None, key))
        return
    name = item.name
    try:
        data = item.path.read_bytes()
        shown, rule = upright_size(data), resize_rule(data)
    except (ImageError, OSError) as error:
        work.bad[name] = getattr(error, "strerror", None) or str(error)
        return
    bucket, content = nearest_bucket(sizes, shown), hashlib.sha256(data).hexdigest()
    work.paths[name] = item.path
    work.enlarged[name], work.cut[name] = upscale(shown, bucket), cut_share(shown, bucket)
    latents = hashed(content, bucket, rule, encoders.vae_identity, encoders.family)
    condition = text_key(item.caption, encoders)
    work.entries.append(Entry(name, item.caption, content, bucket, latents, condition))


def _encode_prompts(
    words: dict[str, str], shards: Shards, encoders: Encoders, options: CacheOptions, progress: Progress
) -> None:
    missing = [key for key in words if key not in shards]
    with ShardWriter(shards, options.shard_bytes) as writer:
        for done, keys in _parts(missing, options.text_batch):
            found = encoders.prompts([words[key] for key in keys])
            writer.add(dict(zip(keys, found, strict=True)))
            progress("encoding prompts", done, len(missing))


def _encode_images(work: _Work, shards: Shards, encoders: Encoders, options: CacheOptions, progress: Progress) -> None:
    """Encodes the images whose latents are missing, size by size; equal ones once."""
    missing: dict[Size, dict[str, list[Entry]]] = {}
    for entry in work.entries:
        if entry.latents is not None and entry.latents not in shards:
            missing.setdefault(entry.size, {}).setdefault(entry.latents, []).append(entry)
    before, total = 0, sum(map(len, missing.values()))
    with ShardWriter(shards, options.shard_bytes) as writer, ThreadPoolExecutor(_READERS) as readers:
        for of_size in missing.values():
            for done, keys in _parts(list(of_size), options.vae_batch):
                firsts = [of_size[key][0] for key in keys]
                read = list(readers.map(lambda e: _pixels(e, work.paths[e.name]), firsts))
                good = {key: x for key, x in zip(keys, read, strict=True) if isinstance(x, torch.Tensor)}
                for key, why in zip(keys, read, strict=True):
                    work.bad |= {} if key in good else {e.name: str(why) for e in of_size[key]}
                if good:
                    found = encoders.images(as_model_input(torch.stack(list(good.values()))))
                    writer.add({key: {"latents": x} for key, x in zip(good, found, strict=True)})
                progress("encoding images", before + done, total)
            before += len(of_size)


def _pixels(entry: Entry, path: Path) -> torch.Tensor | str:
    """An image's pixels, or why there are none."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.content:
            return "it was changed while the cache was built"
        return read_pixels(data, entry.size)
    except (ImageError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)


def _parts(of: list[Part], length: int) -> Iterator[tuple[int, list[Part]]]:
    for first in range(0, len(of), length):
        yield min(first + length, len(of)), of[first : first + length]


def hashed(*parts: object) -> str:
    """A hash of numbers and texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_key(words: str, encoders: Encoders, negative: bool = False) -> str:
    """What the condition of a prompt, or of a negative one, is kept by; an empty prompt is a negative one."""
    apart = encoders.student.negative_prompts_differ and (negative or not words)
    return hashed(words, encoders.text_identity, encoders.family, *(["negative"] if apart else []))


def request_of(items: Iterable[Item | str], encoders: Encoders, sizes: Sequence[Size], *how: object) -> str:
    """What a cache is built for, from what every rank knows without reading an image."""
    told = [item if isinstance(item, str) else [item.name, item.caption] for item in items]
    return hashed(told, list(sizes), encoders.family, encoders.vae_identity, encoders.text_identity, how)


def check_request(items: Sequence[Item] | Sequence[str], encoders: Encoders, sizes: Sequence[Size]) -> None:
    """Raises ArgumentError unless there are items of one kind, with different names, and sizes that the model takes."""
    kinds = {isinstance(item, str) for item in items}
    require(len(kinds) == 1, "build_cache", "items", "images or prompts", "both" if kinds else "none")
    names = [item.name for item in items if isinstance(item, Item)]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError("build_cache", "items", "different names", f"{twice!r} twice", verb="have")
    multiple = encoders.multiple
    require(sizes, "build_cache", "sizes", f"multiples of {multiple} px", "none")
    for size in sizes:
        fits = min(size) >= 1 and not any(edge % multiple for edge in size)
        require(fits, "build_cache", "sizes", f"multiples of {multiple} px", size)
