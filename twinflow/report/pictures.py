"""`data_uris()`: images inside a page, as wide as it may weigh."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

WIDTHS = (512, 384, 256, 192, 128, 96)  # pixels, of the longer edge
MOST_BYTES = 12_000_000  # of all images of a page, as text
_LOSSLESS = 128  # pixels: smaller images are kept exactly
_QUALITY = 82
_TRIED = 12  # images, to see how wide all may be


def data_uris(paths: Sequence[Path], most_bytes: int = MOST_BYTES) -> list[str | None]:
    """The images as data URIs of WebP, scaled down alike until all of them fit.

    Args:
        most_bytes: of all URIs together; at the smallest width they may be more.

    Returns:
        A URI each; None for an image that cannot be read.
    """
    some = paths[:: max(1, len(paths) // _TRIED)]
    for width in WIDTHS:
        if width != WIDTHS[-1] and _size(some, width) * len(paths) > most_bytes * len(some):
            continue
        uris = [_uri(path, width) for path in paths]
        if width == WIDTHS[-1] or sum(len(uri or "") for uri in uris) <= most_bytes:
            return uris
    raise AssertionError


def _size(paths: Sequence[Path], width: int) -> int:
    return sum(len(_uri(path, width) or "") for path in paths)


def _uri(path: Path, width: int) -> str | None:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((width, width), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "WEBP", quality=_QUALITY, lossless=max(image.size) <= _LOSSLESS)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
