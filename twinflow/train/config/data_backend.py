"""`read_backend()`: the one local image folder of a SimpleTuner `data_backend_config` as options of ours."""

import json
import math
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError, require
from twinflow.train.config.option_types import shown

# Keys of a data set that say how a trainer works and not what it trains; `repeats` and `probability` weigh data sets.
_IGNORED = (
    "id", "type", "dataset_type", "disabled", "default", "cache_dir", "cache_dir_vae", "text_embeds", "image_embeds",
    "repeats", "probability", "metadata_backend", "preserve_data_backend_cache", "skip_file_discovery",
    "write_batch_size", "read_batch_size", "vae_batch_size", "image_processing_batch_size",
    "vae_cache_clear_each_epoch",
    "aspect_bucket_worker_count", "crop", "crop_aspect", "crop_style", "resolution_type",
)  # fmt: skip
_TAKEN = ("instance_data_dir", "caption_strategy", "resolution")
_ENCODINGS = ("text_embeds", "image_embeds")  # kinds of entries that are caches: ours is cache_dir
_NAME = "data_backend_config"


def read_backend(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The options that a file of data backends stands for, and warnings; none where there is no such file yet.

    Raises:
        ArgumentError: no JSON, not exactly one local folder of images, or settings of it that are not supported, all
            of them listed.
    """
    if not path.is_file():
        return {}, []
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError("train", _NAME, "a JSON file", f"{path}: {error}") from None
    alike = isinstance(found, list) and all(isinstance(entry, dict) for entry in found)
    require(alike, "train", _NAME, "a list of data sets", f"{path} without one", verb="hold")
    entries = [entry for entry in found if not entry.get("disabled")]
    images = [entry for entry in entries if entry.get("dataset_type", "image") not in _ENCODINGS]
    local = len(images) == 1 and images[0].get("type", "local") == "local"
    kinds = [f"{e.get('id')} ({e.get('type', 'local')}, {e.get('dataset_type', 'image')})" for e in images]
    hint = "put the images into one folder, as instance_data_dir"
    ours = local and images[0].get("dataset_type", "image") == "image"
    require(ours, "train", _NAME, "one local folder of images", shown(", ".join(kinds)), hint, "have")
    warnings = [f"{e.get('id')}: {e['dataset_type']} are kept in cache_dir" for e in entries if e is not images[0]]
    options, more = _options(images[0])
    return options, [f"{_NAME}: {text}" for text in (*warnings, *more)]


def _options(entry: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    neutral: tuple[Any, ...] = (None, False, 0, "", [], {})
    lost = [f"{k} {shown(v)}" for k, v in entry.items() if k not in (*_TAKEN, *_IGNORED) and v not in neutral]
    square = bool(entry.get("crop")) and entry.get("crop_aspect", "square") == "square"
    kind = entry.get("resolution_type", "pixel_area")
    if kind not in ("pixel_area", "area") and not (kind == "pixel" and square):
        lost.append(f"resolution_type {shown(kind)} (pixel_area or area)")
    require(not lost, "train", _NAME, "settings that are supported", "; ".join(lost), verb="have")
    options = {name: entry[name] for name in _TAKEN if entry.get(name) not in (None, "")}
    if kind == "area" and isinstance(options.get("resolution"), (int, float)):
        # 1 megapixel is a square of 1024 pixels there.
        options["resolution"] = max(64, round(1024 * math.sqrt(max(options["resolution"], 0)) / 64) * 64)
    if "crop" in entry:
        options["aspect_buckets"] = not square
    middle = entry.get("crop_style", "center") in ("center", "centre")
    return options, [] if middle else [f"images are cropped to the middle, not {entry['crop_style']}"]
