"""`validation_prompts()`: what the samples of a run are drawn for, encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinflow.errors import ArgumentError
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.buckets import Size, require_multiples
from twinflow.train.data.build_cache import CacheOptions, build_cache, hashed
from twinflow.train.data.cache import Cache
from twinflow.train.data.encoders import Condition, Encoders

FOLDER = "validation"  # in the cache's folder
_CAPTIONS = 4  # of the data, where no prompts are given


@dataclass(frozen=True)
class ValidationPrompts:
    """Prompts with their conditions; all images have one size.

    Args:
        conditions: of each, of one row, on the CPU.
        size: height and width, px.
        latent_shape: (C, H, W) of an image's latents.
        family: whose encoders they come from.
    """

    texts: tuple[str, ...]
    conditions: tuple[Condition, ...]
    negative: Condition
    size: Size
    latent_shape: tuple[int, int, int]
    family: str


def require_resolution(settings: TrainSettings, encoders: Encoders) -> None:
    """Raises ValueError unless the model takes images of `validation_resolution`."""
    size, edge = settings.validation_resolution, encoders.student.longest_edge()
    require_multiples("train", "validation_resolution", size, encoders.multiple)
    if edge is not None and max(size) > edge * encoders.factor:
        wanted = f"at most {edge * encoders.factor} pixels along an edge, for which the model has positions"
        raise ArgumentError("train", "validation_resolution", wanted, "x".join(map(str, size)))


def validation_prompts(settings: TrainSettings, cache: Cache, encoders: Encoders, **how: Any) -> ValidationPrompts:
    """The prompts of a run's samples, or captions of its data where it has none, from a cache of their own.

    Args:
        encoders: loaded only if something is missing, and let go at the end unless `kept`.
        how: `progress`, `main_process` and `wait`, see `build_cache`.

    Raises:
        ValueError: a resolution that the model does not take.
    """
    require_resolution(settings, encoders)
    size = settings.validation_resolution[::-1]
    texts = settings.validation_prompts or captions(cache)
    options = CacheOptions(uncond=settings.validation_negative_prompt, text_batch=settings.text_batch_size)
    encoded = build_cache(settings.cache_dir / FOLDER, texts, encoders, [size], options=options, **how)
    return ValidationPrompts(
        tuple(texts), tuple(encoded.condition([entry]) for entry in encoded.entries), encoded.uncond_at(size), size,
        encoders.latent_shape(size), encoders.family,
    )  # fmt: skip


def captions(cache: Cache) -> Sequence[str]:
    """Up to four captions of the data, different ones: the same whatever the order, few others when images come or go.

    Those with words are taken before the empty one.
    """
    different = {entry.caption for entry in cache.entries}
    return sorted(different, key=lambda words: (not words.strip(), hashed(words)))[:_CAPTIONS]
