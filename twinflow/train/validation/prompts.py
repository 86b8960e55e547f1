"""`validation_prompts()`: what the samples of a run are drawn for, encoded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.buckets import Size
from twinflow.train.data.build_cache import Cache, CacheOptions, Progress, build_cache
from twinflow.train.data.cache_keys import hashed
from twinflow.train.data.encoders import Condition, Encoders

FOLDER = "validation"  # in the cache's folder
_CAPTIONS = 4  # of the data, where no prompts are given


@dataclass(frozen=True)
class ValidationPrompts:
    """Prompts with their conditions; all images have one size.

    Args:
        texts: the prompts.
        conditions: of each, of one row, on the CPU.
        negative: of the negative prompt.
        size: height and width, px.
        latent_shape: (C, H, W) of an image's latents.
        family: whose encoders they come from.
        given: False: they are captions of the data.
    """

    texts: tuple[str, ...]
    conditions: tuple[Condition, ...]
    negative: Condition
    size: Size
    latent_shape: tuple[int, int, int]
    family: str
    given: bool


def require_resolution(settings: TrainSettings, encoders: Encoders) -> None:
    """Raises ValueError unless the model takes images of `validation_resolution`."""
    multiple, (width, height) = encoders.multiple, settings.validation_resolution
    if width % multiple or height % multiple:
        near = "x".join(str(max(multiple, round(edge / multiple) * multiple)) for edge in (width, height))
        raise ValueError(
            f"train: validation_resolution must be multiples of {multiple} px (such as {near}), got {width}x{height}"
        )


def validation_prompts(
    settings: TrainSettings,
    cache: Cache,
    encoders: Encoders,
    *,
    progress: Progress = lambda what, done, of: None,
    main_process: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> ValidationPrompts:
    """The prompts of a run's samples, or captions of its data where it has none, from a cache of their own.

    Args:
        settings: of the run.
        cache: of its data.
        encoders: loaded only if something is missing, and let go at the end unless `kept`.
        progress, main_process, wait: as for `build_cache`.

    Raises:
        ValueError: a resolution that the model does not take.
    """
    require_resolution(settings, encoders)
    size = settings.validation_resolution[::-1]
    texts = settings.validation_prompts or captions(cache)
    options = CacheOptions(uncond=settings.validation_negative_prompt, text_batch=settings.text_batch_size)
    how: dict[str, Any] = {"options": options, "progress": progress, "main_process": main_process, "wait": wait}
    encoded = build_cache(settings.cache_dir / FOLDER, texts, encoders, [size], **how)
    return ValidationPrompts(
        texts=tuple(texts),
        conditions=tuple(encoded.condition([entry]) for entry in encoded.entries),
        negative=encoded.uncond_at(size),
        size=size,
        latent_shape=encoders.latent_shape(size),
        family=encoders.family,
        given=bool(settings.validation_prompts),
    )


def captions(cache: Cache) -> Sequence[str]:
    """Up to four captions of the data, different ones: the same whatever the order, few others when images come or go.

    Those with words are taken before the empty one.
    """
    different = {entry.caption for entry in cache.entries}
    return sorted(different, key=lambda words: (not words.strip(), hashed(words)))[:_CAPTIONS]
