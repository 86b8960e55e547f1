"""A folder of digits with captions, and encoders that note what they encode."""

from pathlib import Path

import numpy as np
import torch
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from sklearn.datasets import load_digits

from twinflow.train.data.buckets import buckets
from twinflow.train.data.build_cache import CacheOptions, build_cache
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import read_folder

FAMILIES = ("sd3", "qwen_image", "flux", "z_image", "sana")
PROMPTS = ["a cat", "a small dog in front of a house", ""]
SMALL = CacheOptions(vae_batch=2, text_batch=2, shard_bytes=20_000)


def digits(folder: Path, count: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    data = load_digits()
    for k in range(count):
        image = Image.fromarray((data.images[k] * 15).astype(np.uint8)).resize((32, 32 if k % 2 else 48))
        image.save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"the digit {data.target[k]}, number {k}")
    return folder


class Counted(Encoders):
    """Encoders that note what they encode."""

    def __init__(self, family: str = "sd3", loads: bool = True, **options) -> None:
        super().__init__(saved_pipeline(family), **options)
        self.encoded, self.loads = {"images": 0, "prompts": []}, loads

    def images(self, pixels):
        assert self.loads, "nothing was to be encoded"
        self.encoded["images"] += len(pixels)
        return super().images(pixels)

    def prompts(self, prompts):
        assert self.loads, "nothing was to be encoded"
        self.encoded["prompts"] += prompts
        return super().prompts(prompts)


def build(folder: Path, data: Path, encoders: Encoders | None = None, **options):
    encoders = encoders or Counted()
    sizes = buckets(32, encoders.multiple)
    return build_cache(folder, read_folder(data), encoders, sizes, **{"options": SMALL, **options})


def contents(cache) -> dict:
    return {e.name: (cache.latents([e]), cache.condition([e])) for e in cache.entries}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k][0], b[k][0]) and all(torch.equal(x, b[k][1][name]) for name, x in a[k][1].items()) for k in a
    )


def assert_close(found: dict, expected: dict) -> None:
    """Equal up to the rounding of encoding in other batches."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
