"""Grids of images: nothing covers anything, and captions are there to read."""

import warnings

import numpy as np
import pytest
from PIL import Image

from twinflow.train.logging.image_grid import image_grid, wrapped

SENTENCE = "a very old temple on a hill above a lake, with golden light on its roofs, " * 6


def picture(colour: str, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize("text", [SENTENCE, "x" * 300, "short", "a " + "y" * 90 + " b", "猫" * 60])
def test_lines_fit_and_hold_all_words(text):
    lines, letter = wrapped(text, 14, 200, 99), 14 if text[0] == "猫" else 8.5
    assert all(len(line) * letter <= 200 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    fewer = wrapped(text, 14, 200, 3)
    assert len(fewer) == min(3, len(lines)) and fewer[:2] == lines[:2] and (fewer[-1][-1] == "…") == (len(lines) > 3)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 48), (64, 96)), ((128, 128), (128, 128)), ((512, 384), (512, 384)), ((1024, 768), (512, 384)),
     ((2048, 64), (512, 16)), ((48, 32), (96, 64))],
)  # fmt: skip
def test_every_image_is_whole_and_nothing_lies_on_it(size, shown):
    colours = [["red", "lime"], ["blue", "yellow"], ["cyan", "magenta"]]
    texts = ("", SENTENCE * 9, "z" * 500)
    rows = [(text, [picture(c, size) for c in row]) for text, row in zip(texts, colours, strict=True)]
    found = np.asarray(image_grid("EMA weights, step 500", ["30 steps, guidance 4.25", "1 step"], rows))
    corners = []
    for colour in (c for row in colours for c in row):
        ys, xs = np.nonzero((found == np.array(picture(colour, (1, 1)))[0, 0]).all(2))
        assert len(ys) == shown[0] * shown[1]
        assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == shown
        corners.append((xs.min(), ys.min()))
    assert len({x for x, _ in corners}) == 2 and len({y for _, y in corners}) == 3
    left = min(x for x, _ in corners)
    dark = (found.max(2) < 100).nonzero()
    captions = [y for y, x in zip(*dark, strict=True) if x < left and y >= corners[0][1]]
    assert len(captions) > 500 and all((found[:, k] == 255).all() for k in (0, left - 1, found.shape[1] - 1))
    assert (found[0] == 255).all() and (found[-1] == 255).all()


def test_letters_that_the_font_lacks_come_from_others():
    """𝛼 is in matplotlib's STIX fonts alone; one that no font has is a box, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = [np.asarray(image_grid("x", ["x"], [(c, [picture("red", (8, 8))])])) for c in "𝛼𝛽\U000f0000\U000f0001"]
    assert not np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])
    assert np.array_equal(shown[2], shown[3])
