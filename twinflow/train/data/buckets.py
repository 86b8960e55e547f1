"""`buckets()`: the sizes that images are trained in; `read_pixels()`: an image file as pixels of one of them."""

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from twinflow.errors import require
from twinflow.train.data.colour import converted_mode, to_srgb

Size = tuple[int, int]  # height, width
RESIZE = "centre box, Lanczos, on white, 1"  # another rule, another name: cached latents are kept by it
MAX_UPSCALE = 1.25
MAX_CUT = 0.25  # of an image's area
_LONGEST = 2.0  # most that a long edge may be of the short one
_AREA = 0.12  # of the square's area, by which a bucket's may differ
_SIXTEEN_BITS = 65535
# What is kept of an image's metadata, at the first try all; and how an orientation is made upright.
_PROFILE, _EXIF = (b"iCCP", b"ICC_PROFILE"), (b"eXIf", b"Exif")
_METADATA = ((), _PROFILE + _EXIF, _PROFILE, _EXIF, ())
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
Result = TypeVar("Result")


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


def cut_share(size: Size, bucket: Size) -> float:
    """The share of an image's area that is cut away where it fills a bucket."""
    scale = upscale(size, bucket)
    return 1 - bucket[0] * bucket[1] / (scale**2 * size[0] * size[1])


def upright_size(data: bytes) -> Size:
    """The size that a file's header and its orientation give.

    Raises:
        ImageError: no image.
    """
    return _read(data, _upright_size)


def resize_rule(data: bytes) -> str:
    """What `read_pixels` does with an image file beside its bucket: cached latents are kept by it.

    Raises:
        ImageError: no image.
    """
    return _read(data, lambda image: f"{RESIZE}, to sRGB, 1" if converted_mode(image) else RESIZE)


def read_pixels(data: bytes, bucket: Size) -> torch.Tensor:
    """An image file's pixels, upright, in sRGB, on white where it is transparent, cut about its centre and resized.

    Args:
        bucket: height and width, px.

    Returns:
        (3, height, width) uint8: red, green, blue. The same bytes give the same pixels.

    Raises:
        ImageError: no image, a damaged one, or one whose values have no known range.
    """
    picture = _read(data, lambda image: _rgb(_upright(image)))
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


def _read(data: bytes, read: Callable[[Image.Image], Result]) -> Result:
    """What is read of an image file; metadata are left away where it cannot be read with them.

    Raises:
        ImageError: whatever a file from anywhere makes Pillow raise.
    """
    failure: Exception | None = None
    for kept in _METADATA:
        try:
            with Image.open(io.BytesIO(_without_metadata(data, kept) if failure else data)) as image:
                return read(image)
        except (MemoryError, ImageError):
            raise
        except Exception as error:
            failure = failure or error
    text = "not an image that can be recognised" if "cannot identify" in str(failure) else str(failure)
    raise ImageError(text or type(failure).__name__) from None


def _without_metadata(data: bytes, kept: tuple[bytes, ...]) -> bytes:
    """A PNG or JPEG file with its pixels and only these kinds of metadata; other files as they are."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[:8] + b"".join(_png_chunks(data, kept))
    return b"\xff\xd8" + b"".join(_jpeg_segments(data, kept)) if data.startswith(b"\xff\xd8") else data


def _png_chunks(data: bytes, kept: tuple[bytes, ...]) -> Iterator[bytes]:
    start = 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind, checksum = data[start + 4 : start + 8], int.from_bytes(data[end - 4 : end], "big")
        whole = kind in kept and zlib.crc32(data[start + 4 : end - 4]) == checksum
        if whole or kind[:1].isupper() or kind == b"tRNS":  # a capital letter: the pixels need it
            yield data[start:end]
        start = end


def _jpeg_segments(data: bytes, kept: tuple[bytes, ...]) -> Iterator[bytes]:
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1] != 0xDA:  # from there on it is pixels
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        known = 0xE0 <= data[start + 1] <= 0xED or data[start + 1] in (0xEF, 0xFE)  # all but Adobe's
        if not known or data[start + 4 : end].startswith(kept):
            yield data[start:end]
        start = end
    yield data[start:]


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how an image is turned; 1, upright, where its metadata cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        if isinstance(error, MemoryError) or image.format in ("PNG", "JPEG", "MPO"):  # `_read` tries again without it
            raise
        return 1


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    if isinstance(image, TiffImageFile):  # its `size` is turned already, or not yet, by the version of Pillow
        width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF is turned by it, and has no orientation any more
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers, whose range is not known")
    profile, mode = image.info.get("icc_profile", b""), converted_mode(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    clear = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    shown = image.convert("RGBA") if clear else image
    colours = to_srgb(shown.convert(mode), profile) if mode else shown.convert("RGB")
    if not clear:
        return colours
    colours.putalpha(shown.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colours.size, (255, 255, 255, 255)), colours).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit values in 8 bits: v 255 / 65535, rounded."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _SIXTEEN_BITS:
        raise ImageError(f"pixels must be of 16 bits, got values {values.min()} .. {values.max()}")
    return Image.fromarray(((values * 255 + _SIXTEEN_BITS // 2) // _SIXTEEN_BITS).astype(np.uint8))
