"""`to_srgb()`: an image's colours as its embedded ICC profile means them, in sRGB."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# mode of an image without its transparency -> a profile's name of such colours
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_OPAQUE = {"RGBA": "RGB", "RGBX": "RGB", "RGBa": "RGB", "P": "RGB", "PA": "RGB", "LA": "L", "La": "L"}
_SAME = 2  # levels of 255: a profile that moves no colour further is sRGB's own


def converted_mode(image: Image.Image) -> str:
    """The mode in which an image's colours go through its profile; "": they are sRGB as they stand."""
    mode = "L" if image.mode.startswith("I") else _OPAQUE.get(image.mode, image.mode)
    return mode if _transform(image.info.get("icc_profile"), mode) is not None else ""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image, RGB, L or CMYK, in sRGB, by a profile for which `converted_mode` names its mode."""
    converted = ImageCms.applyTransform(image, _transform(profile, image.mode))
    assert converted is not None  # it is only where the image itself is changed
    return converted


@lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> Any:
    """A transform to sRGB; None: no profile, a damaged one, one of other colours, or sRGB's own."""
    if not profile or mode not in _SPACES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    probe = _probe(mode)
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if mode == "CMYK" or abs(moved).max() > _SAME else None


def _probe(mode: str) -> Image.Image:
    """Every seventeenth level of each channel, in all combinations."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    channels = np.stack(np.meshgrid(*[levels] * 3), -1).reshape(1, -1, 3)
    return Image.fromarray(channels).convert(mode)
