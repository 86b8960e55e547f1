"""`image_grid()`: images in rows and columns with captions, as one picture to look at."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from PIL import Image

_DPI = 64  # pixels of the picture to an inch: a power of two, so that sizes in inches are exact
_MARGIN = 12  # px
_LARGE, _SMALL = 512, 128  # px: the longer edge of a cell is at most, and where images are tiny at least about, this
_MOST_LETTERS = 2000  # of a caption that are looked at
_FEWEST_LINES = 8  # that a caption may have beside a flat image
_FONT = "DejaVu Sans Mono"  # comes with matplotlib; its letters are as wide as one another
_WIDTH, _HEIGHT = 0.62, 1.25  # of a letter and of a line of it, to the font's size


def image_grid(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """A picture with a title, a heading above each column, and a caption at the left of each row.

    Large images are scaled down to 512 px, tiny ones are enlarged without smoothing.

    Args:
        title: one line.
        columns: one line each.
        rows: caption, of any length, and an image for each column; all images have one size.

    Returns:
        The picture, RGB.
    """
    width, height = _cell(rows[0][1][0].size)
    size, beside = (14, 200) if width <= 256 else (18, 300)
    step = round(size * _HEIGHT)
    figure = Figure(dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    heads = [_text(figure, words, size) for words in (title, *columns)]
    widths = [head.get_window_extent().width for head in heads]
    wide = max(width, *(round(length) for length in widths[1:]))
    captions = [wrapped(text, size, beside, max(height // step, _FEWEST_LINES)) for text, _ in rows]
    lefts = [beside + 2 * _MARGIN + k * (wide + _MARGIN) for k in range(len(columns))]
    tops, down = [], 3 * _MARGIN + 2 * step
    for lines in captions:
        tops.append(down)
        down += max(height, step * len(lines)) + _MARGIN
    across = max(lefts[-1] + wide, _MARGIN + round(widths[0])) + _MARGIN
    figure.set_size_inches(across / _DPI, down / _DPI)
    heads[0].set_position((_MARGIN, down - _MARGIN))
    for left, head in zip(lefts, heads[1:], strict=True):
        head.set_position((left, down - 2 * _MARGIN - step))
    for top, lines, (_, images) in zip(tops, captions, rows, strict=True):
        for number, line in enumerate(lines):
            _text(figure, line, size).set_position((_MARGIN, down - top - number * step))
        for left, image in zip(lefts, images, strict=True):
            sampling = Image.Resampling.LANCZOS if width < image.width else Image.Resampling.NEAREST
            figure.figimage(np.asarray(image.resize((width, height), sampling)), left, down - top - height)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """A text in lines; words that are too long for one are cut, and the last of `most` may end with an ellipsis.

    Args:
        text: of any length.
        size, width: of the letters and of a line, px.
        most: lines.
    """
    shown = "".join(c if c.isprintable() else " " for c in text[:_MOST_LETTERS])
    letter = size * (_WIDTH if max(shown, default="") < "\u1100" else 1.1)  # Hangul, Chinese, emoji
    return textwrap.wrap(shown, int(width / letter), max_lines=most, placeholder="…") or ["(empty prompt)"]


def _cell(size: tuple[int, int]) -> tuple[int, int]:
    """The size that images are shown in."""
    long = max(size)
    if long > _LARGE:
        return max(1, round(size[0] * _LARGE / long)), max(1, round(size[1] * _LARGE / long))
    times = max(1, _SMALL // long)
    return size[0] * times, size[1] * times


def _text(figure: Figure, words: str, size: int) -> Text:
    """Words by pixels from the left and from below; letters that the font lacks come from the machine's others."""
    fonts = [_FONT]
    if not words.isascii():
        found = font_manager.fontManager.ttflist
        fonts += sorted({font.name for font in found if (font.weight, font.style) == (400, "normal")})
    return figure.text(
        0, 0, words, fontsize=size * 72 / _DPI, family=fonts, va="top", transform=IdentityTransform(), parse_math=False
    )
