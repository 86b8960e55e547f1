"""`buckets()`: the sizes that images are trained in; `read_pixels()`: an image file as pixels of one of them."""

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from twinflow.errors import require

Size = tuple[int, int]  # height, width
RESIZE = "centre box, Lanczos, on white, 1"  # another rule, another name: cached latents are kept by it
MAX_UPSCALE = 1.25
_LONGEST = 2.0  # most that a long edge may be of the short one
_AREA = 0.12  # of the square's area, by which a bucket's may differ
_SIXTEEN_BITS = 65535


class ImageError(ValueError):
    """An image file that cannot be read, and why."""


def buckets(resolution: int, multiple: int, *, aspect: bool = True) -> list[Size]:
    """Sizes of nearly the area of a square.

    Args:
        resolution: edge of the square, px.
        multiple: what heights and widths must be multiples of, px: pixels per latent x the model's `latent_multiple`.
        aspect: False: the square alone.

    Returns:
        (height, width), px, flattest first; each is there turned, too.

    Raises:
        ValueError: no such square.
    """
    for name, value in (("resolution", resolution), ("multiple", multiple)):
        require(type(value) is int and value >= 1, "buckets", name, "an integer >= 1", repr(value))
    require_multiples("buckets", "resolution", (resolution,), multiple)
    sizes = {(resolution, resolution)}
    area = resolution**2
    for short in range(multiple, resolution, multiple) if aspect else ():
        long = round(area / short / multiple) * multiple
        if long <= _LONGEST * short and abs(long * short / area - 1) <= _AREA:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def require_multiples(function: str, argument: str, edges: Sequence[int], multiple: int) -> None:
    """Raises ArgumentError, with the nearest that would do, unless edges in pixels are multiples of a number."""
    near = "x".join(str(max(multiple, round(edge / multiple) * multiple)) for edge in edges)
    wanted, got = f"a multiple of {multiple} pixels (such as {near})", "x".join(map(str, edges))
    require(not any(edge % multiple for edge in edges), function, argument, wanted, got)


def nearest_bucket(sizes: Sequence[Size], size: Size) -> Size:
    """The bucket whose aspect ratio is most like an image's."""
    require(min(size) >= 1, "nearest_bucket", "size", "positive", size)
    wanted = math.log(size[0] / size[1])
    return min(sizes, key=lambda at: (abs(math.log(at[0] / at[1]) - wanted), -at[0] * at[1], at))


def upscale(size: Size, bucket: Size) -> float:
    """How many times an image is enlarged along an edge to fill a bucket; below 1: reduced."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def upright_size(data: bytes) -> Size:
    """The size that a file's header and its orientation give.

    Raises:
        ImageError: no image.
    """
    with _opened(data) as image:
        width, height = image.size
        turned = _guarded(lambda: image.getexif().get(0x0112, 1)) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def read_pixels(data: bytes, bucket: Size) -> torch.Tensor:
    """An image file's pixels, upright, on white where it is transparent, cut about its centre and resized to a bucket.

    Args:
        bucket: height and width, px.

    Returns:
        (3, height, width) uint8: red, green, blue. The same bytes give the same pixels.

    Raises:
        ImageError: no image, a damaged one, or one whose values have no known range.
    """
    with _opened(data) as image:
        picture = _guarded(lambda: _rgb(ImageOps.exif_transpose(image)))
    width, height = picture.size
    scale = upscale((height, width), bucket)
    cut_height, cut_width = min(bucket[0] / scale, height), min(bucket[1] / scale, width)
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    box = (left, top, left + cut_width, top + cut_height)
    resized = picture.resize((bucket[1], bucket[0]), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def as_model_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in -1 .. 1, as diffusers' image processor has them."""
    return pixels.float() / 255 * 2 - 1


def _opened(data: bytes) -> Image.Image:
    return _guarded(lambda: Image.open(io.BytesIO(data)))


def _guarded(read):  # type: ignore[no-untyped-def]
    """The result of reading an image; whatever a file from anywhere makes Pillow raise is one kind of error."""
    try:
        return read()
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        text = "not an image that can be recognised" if "cannot identify" in str(error) else str(error)
        raise ImageError(text or type(error).__name__) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit values in 8 bits: v 255 / 65535, rounded."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _SIXTEEN_BITS:
        raise ImageError(f"pixels must be of 16 bits, got values {values.min()} .. {values.max()}")
    return Image.fromarray(((values * 255 + _SIXTEEN_BITS // 2) // _SIXTEEN_BITS).astype(np.uint8))
