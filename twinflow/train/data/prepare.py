"""`prepare_data()`: what a run trains on, encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.buckets import buckets
from twinflow.train.data.build_cache import Cache, CacheOptions, Progress, build_cache
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import IMAGE_SUFFIXES, Item, read_folder, read_prompts, unread_images
from twinflow.train.model.student import build_student

_OPTION_OF = {
    "read_folder: folder": "instance_data_dir", "read_folder: strategy": "caption_strategy",
    "read_folder: metadata": "metadata_file", "read_prompts: path": "prompts_file",
}  # fmt: skip


def items_of(settings: TrainSettings) -> list[Item] | list[str]:
    """Images with their captions, or prompts.

    Raises:
        ValueError: neither is given, or what is there cannot be trained on.
    """
    settings.require_data()
    try:
        if settings.prompts_file is not None:
            return read_prompts(settings.prompts_file)
        assert settings.instance_data_dir is not None
        return read_folder(
            settings.instance_data_dir,
            settings.caption_column,
            image_column=settings.image_column,
            strategy=settings.caption_strategy,
            metadata_file=settings.metadata_file,
        )
    except ValueError as error:
        said = str(error)
        for argument, option in _OPTION_OF.items():
            said = said.replace(argument, f"train: {option}", 1) if said.startswith(argument) else said
        raise ValueError(said) from None


def unread(settings: TrainSettings) -> list[str]:
    """A warning of the images that are passed over for their type; empty where there are none."""
    found = {} if settings.instance_data_dir is None else unread_images(settings.instance_data_dir)
    if not found:
        return []
    counts = ", ".join(f"{count} {suffix}" for suffix, count in found.items())
    return [f"images of these types are passed over: {counts}; those read are {' '.join(IMAGE_SUFFIXES)}"]


def encoders_of(settings: TrainSettings, folder: Path, device: torch.device) -> Encoders:
    """The encoders of a pipeline, not loaded yet: in bfloat16 on a GPU, in float32 on a CPU or where that is asked."""
    bridged = not (folder / "transformer").is_dir()
    student = build_student(settings, folder, weights=False) if bridged else None
    half = device.type != "cpu" and settings.mixed_precision == "bf16"
    return Encoders(folder, dtype=torch.bfloat16 if half else torch.float32, device=device, student=student)


def prepare_data(
    settings: TrainSettings,
    encoders: Encoders,
    *,
    progress: Progress,
    main_process: bool = True,
    wait: Callable[[], None] = lambda: None,
    **more: Any,
) -> Cache:
    """The cache of a run's data; what is not in it yet is encoded.

    Args:
        settings: of the run.
        encoders: of its pipeline.
        progress: see `build_cache`.
        main_process, wait: whether this one encodes, and how the others wait.
        more: for `build_cache`.

    Raises:
        ValueError: no data, a resolution that the model does not take, or images that cannot be read.
    """
    multiple = encoders.multiple
    if settings.resolution % multiple:
        near = max(multiple, round(settings.resolution / multiple) * multiple)
        raise ValueError(
            f"train: resolution must be a multiple of {multiple} (such as {near}), got {settings.resolution}"
        )
    aligned = _aligned(settings.aspect_bucket_alignment, multiple)
    coarse = settings.resolution % aligned == 0
    sizes = buckets(settings.resolution, aligned if coarse else multiple, aspect=settings.aspect_buckets)
    options = CacheOptions(
        uncond=settings.unconditional_prompt,
        vae_batch=settings.vae_batch_size,
        text_batch=settings.text_batch_size,
        skip_bad=settings.skip_bad,
    )
    return build_cache(
        settings.cache_dir,
        items_of(settings),
        encoders,
        sizes,
        options=options,
        progress=progress,
        main_process=main_process,
        wait=wait,
        **more,
    )


def _aligned(alignment: int, multiple: int) -> int:
    """The smallest multiple of both an alignment and of what the model takes that is not below either."""
    return alignment if alignment % multiple == 0 else -(-alignment // multiple) * multiple
