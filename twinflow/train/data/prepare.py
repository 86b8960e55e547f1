"""`prepare_data()`: what a run trains on, encoded."""

import inspect
from pathlib import Path
from typing import Any

import torch

from twinflow.errors import ArgumentError, require
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.buckets import Size, buckets, require_multiples
from twinflow.train.data.build_cache import CacheOptions, build_cache
from twinflow.train.data.cache import Cache
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import IMAGE_SUFFIXES, Item, read_folder, read_prompts, unread_images
from twinflow.train.model.student import build_student

_OPTION_OF = {
    "folder": "instance_data_dir", "strategy": "caption_strategy", "metadata": "metadata_file", "path": "prompts_file",
}  # fmt: skip


def items_of(settings: TrainSettings, skipped: dict[str, str] | None = None) -> list[Item] | list[str]:
    """Images with their captions, or prompts.

    Args:
        skipped: gets what `skip_bad` leaves out -> why.

    Raises:
        ValueError: neither is given, or what is there cannot be trained on.
    """
    settings.require_data()
    skipped = {} if skipped is None else skipped
    noted = skipped if settings.skip_bad else None
    try:
        if settings.prompts_file is not None:
            return read_prompts(settings.prompts_file, skipped=noted)
        assert settings.instance_data_dir is not None
        return read_folder(
            settings.instance_data_dir,
            settings.caption_column,
            image_column=settings.image_column,
            strategy=settings.caption_strategy,
            metadata_file=settings.metadata_file,
            leave_out=_of_the_run(settings),
            skipped=noted,
        )
    except ArgumentError as error:
        raise error.renamed("train", _OPTION_OF.get(error.argument)) from None


def _of_the_run(settings: TrainSettings) -> tuple[Path, ...]:
    """Folders that a run writes, which may be in the folder of its images, or that folder itself."""
    run = RunFolder(settings.output_dir)
    return run.root, settings.cache_dir, run.samples, run.logs, run.root / "wandb"


def unread(settings: TrainSettings) -> list[str]:
    """A warning of the images that are passed over for their type; empty where there are none."""
    if settings.instance_data_dir is None:
        return []
    found = unread_images(settings.instance_data_dir, _of_the_run(settings))
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


def require_fitting(settings: TrainSettings, encoders: Encoders) -> list[Size]:
    """The sizes that images are trained in, once the model's configuration says that it takes them.

    What it tells is refused here, before hours of encoding.

    Raises:
        ArgumentError: a model that looks at a second image (to edit, fill or follow), or a resolution that it does not
            take.
    """
    _require_text_to_image(encoders)
    multiple, edge = encoders.multiple, encoders.student.longest_edge()
    require_multiples("train", "resolution", (settings.resolution,), multiple)
    sizes = _sizes(settings, settings.resolution, multiple)
    if edge is None:
        return sizes
    most = edge * encoders.factor
    longest = max(max(size) for size in sizes)
    if longest > most:
        fitting = range(most - most % multiple, 0, -multiple)
        least = next((r for r in fitting if max(map(max, _sizes(settings, r, multiple))) <= most), multiple)
        got = f"{settings.resolution}, whose longest bucket has an edge of {longest} pixels"
        wanted = f"at most {least}, as the {encoders.student.component} has positions for {most} pixels along an edge"
        hint = "aspect_buckets false crops squares" if settings.aspect_buckets else ""
        raise ArgumentError("train", "resolution", wanted, got, hint)
    return sizes


def _sizes(settings: TrainSettings, resolution: int, multiple: int) -> list[Size]:
    aligned = -(-settings.aspect_bucket_alignment // multiple) * multiple  # what the model takes, not below the option
    coarse = resolution % aligned == 0
    return buckets(resolution, aligned if coarse else multiple, aspect=settings.aspect_buckets)


def _require_text_to_image(encoders: Encoders) -> None:
    import diffusers

    student, folder = encoders.student, encoders.folder
    name, wanted = "pretrained_model_name_or_path", "a text-to-image model"
    hint = "models that look at a second image, to edit, fill or follow it, are not trained here"
    takes, makes = student.latent_channels(), encoders.vae_channels
    got = f"one whose {student.component} takes {takes} channels where its autoencoder makes {makes} ({folder})"
    require(makes in (None, takes), "train", name, wanted, got, hint)
    encode = getattr(getattr(diffusers, encoders.pipeline, None), "encode_prompt", None)
    looks = encode is not None and "image" in inspect.signature(encode).parameters
    require(not looks, "train", name, wanted, f"a {encoders.pipeline} ({folder})", hint)


def prepare_data(settings: TrainSettings, encoders: Encoders, **how: Any) -> Cache:
    """The cache of a run's data; what is not in it yet is encoded.

    Args:
        how: `progress`, `main_process` and `wait`, see `build_cache`.

    Raises:
        ValueError: no data, a resolution that the model does not take, or images or captions that cannot be read.
    """
    sizes = require_fitting(settings, encoders)
    options = CacheOptions(
        uncond=settings.unconditional_prompt, vae_batch=settings.vae_batch_size, text_batch=settings.text_batch_size,
        skip_bad=settings.skip_bad,
    )  # fmt: skip
    skipped: dict[str, str] = {}
    items = items_of(settings, skipped)
    return build_cache(settings.cache_dir, items, encoders, sizes, options=options, skipped=skipped, **how)
