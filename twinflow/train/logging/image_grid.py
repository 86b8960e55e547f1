"""`image_grid()`: images in rows and columns with captions, as one picture to look at."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
_MARGIN = 12  # px
_LARGE, _SMALL = 512, 128  # px: the longer edge of a cell is at most, and where images are tiny at least about, this
_MOST_LETTERS = 2000  # of a caption that are looked at
_FEWEST_LINES = 8  # that a caption may have beside a flat image
_PAPER, _INK = "white", "black"


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
    images = [image for _, found in rows for image in found]
    width, height = _cell(images[0].size)
    letters, beside = (14, 200) if width <= 256 else (18, 300)
    title_font = _font(title, letters + 4)
    head_font = _font("".join(columns), letters)
    wide = max(width, *(round(head_font.getlength(text)) for text in columns))
    step = _line_height(head_font)
    captions = [_caption(text, letters, beside, max(height // step, _FEWEST_LINES)) for text, _ in rows]
    heights = [max(height, step * len(lines)) for _, lines in captions]
    top = 2 * _MARGIN + _line_height(title_font)
    lefts = [beside + 2 * _MARGIN + k * (wide + _MARGIN) for k in range(len(columns))]
    across = max(lefts[-1] + wide, _MARGIN + round(title_font.getlength(title))) + _MARGIN
    down = top + step + _MARGIN + sum(heights) + _MARGIN * len(rows)
    picture = Image.new("RGB", (across, down), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), title, _INK, title_font)
    for left, text in zip(lefts, columns, strict=True):
        draw.text((left, top), text, _INK, head_font)
    y = top + step + _MARGIN
    for (font, lines), tall, (_, found) in zip(captions, heights, rows, strict=True):
        for number, line in enumerate(lines):
            draw.text((_MARGIN, y + number * step), line, _INK, font)
        for left, image in zip(lefts, found, strict=True):
            picture.paste(_scaled(image, (width, height)), (left, y))
        y += tall + _MARGIN
    return picture


def _cell(size: tuple[int, int]) -> tuple[int, int]:
    """The size that images are shown in."""
    long = max(size)
    if long > _LARGE:
        return max(1, round(size[0] * _LARGE / long)), max(1, round(size[1] * _LARGE / long))
    times = max(1, _SMALL // long)
    return size[0] * times, size[1] * times


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    shrinks = size[0] < image.width
    return image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)


def _caption(text: str, letters: int, width: int, most: int) -> tuple[Font, list[str]]:
    """A font for a caption, and its lines."""
    shown = "".join(c if c.isprintable() else " " for c in text[:_MOST_LETTERS])
    font = _font(shown, letters)
    return font, wrapped(shown, font, width, most) if shown.strip() else ["(empty prompt)"]


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """A text in lines.

    Args:
        text: words with spaces between; one that is too long for a line is cut.
        font: it is drawn with.
        width: of a line, px.
        most: lines; where there are more the last one ends with an ellipsis.
    """
    lines = [""]
    for word in text.split():
        while word:
            piece = _fitting(word, font, width)
            word = word[len(piece) :]
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if font.getlength(joined) <= width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(piece)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last.rstrip()}…"]


def _fitting(word: str, font: Font, width: int) -> str:
    """The beginning of a word that fits into a line, one letter at least."""
    if font.getlength(word) <= width:
        return word
    length = 1
    while font.getlength(word[: length + 1]) <= width:
        length += 1
    return word[:length]


def _line_height(font: Font) -> int:
    return sum(font.getmetrics()) + 2


def _font(text: str, size: int) -> Font:
    """The font that comes with matplotlib; where letters are missing, the one of this machine that has the most."""
    own = _own()
    letters = {ord(c) for c in text if not c.isspace()}
    if _known(own, letters) == len(letters):
        return ImageFont.truetype(own, size)
    from matplotlib import font_manager

    best = max([own, *sorted(font_manager.findSystemFonts())], key=lambda path: _known(path, letters))
    return ImageFont.truetype(best, size)


def _own() -> str:
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _known(path: str, letters: set[int]) -> int:
    """How many letters a font that can be scaled has."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, 16)
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return -1
    return sum(font.get_char_index(letter) != 0 for letter in letters)
