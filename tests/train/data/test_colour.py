"""Images with an embedded ICC profile: what a viewer shows is what is trained on."""

import io
import itertools
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images

from twinflow.train.data.buckets import RESIZE, read_pixels, resize_rule

FLOWER = Image.fromarray(load_sample_images().images[1][:48, :64])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, pcs="XYZ ", **tags):
    """An ICC profile of version 2, from its tags."""
    tags = {
        "desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        "cprt": b"text" + bytes(5),
    } | tags
    tags["wtpt"] = b"XYZ " + bytes(4) + s15(0.9642, 1, 0.8249)
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    whole = struct.pack(">I", len(tags)) + table + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(whole), b"lcms", 0x02100000, b"mntr", space.encode(), pcs.encode())
    head += bytes(12) + b"acsp" + bytes(28) + s15(0.9642, 1, 0.8249)
    return head + bytes(128 - len(head)) + whole


def gamma(value):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256)) + bytes(2)


ADOBE = profile("RGB ", rTRC=gamma(2.2), gTRC=gamma(2.2), bTRC=gamma(2.2), **{
    name: b"XYZ " + bytes(4) + s15(*values) for name, values in {
        "rXYZ": (0.60974, 0.31111, 0.01947), "gXYZ": (0.20528, 0.62567, 0.06087), "bXYZ": (0.14919, 0.06322, 0.74457),
    }.items()
})  # fmt: skip
GREY = profile("GRAY", kTRC=gamma(1.0))


def inks():
    """A table of what inks look like, two levels of each, as Lab."""
    head = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    body = b""
    for c, m, y, k in itertools.product((0, 1), repeat=4):
        shade = 1 - k
        body += bytes([int(255 * shade * (1 - 0.25 * c - 0.4 * m - 0.08 * y)), 128 + 60 * (m - c) * shade])
        body += bytes([128 + (80 * y - 50 * c) * shade])
    return head + bytes(range(256)) * 4 + body + bytes(range(256)) * 3


INKS = profile("CMYK", "Lab ", A2B0=inks())


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data):
    """What a viewer shows, (3, H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        found = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return torch.from_numpy(np.array(found)).permute(2, 0, 1)


@pytest.mark.parametrize("kind, mode, embedded", [
    ("png", "RGB", ADOBE), ("jpeg", "RGB", ADOBE), ("tiff", "RGB", ADOBE), ("webp", "RGB", ADOBE), ("png", "L", GREY),
    ("jpeg", "CMYK", INKS), ("tiff", "CMYK", INKS),
])  # fmt: skip
def test_colours_are_those_that_a_viewer_shows(kind, mode, embedded):
    data = encoded(FLOWER.convert(mode), kind, icc_profile=embedded)
    plain = read_pixels(encoded(FLOWER.convert(mode), kind), (48, 64))
    found = read_pixels(data, (48, 64))
    assert torch.equal(found, shown(data)) and (found.int() - plain.int()).abs().max() > 8
    assert resize_rule(data) != RESIZE, "latents of the other colours are not taken for these"


def test_transparency_and_palettes_have_profiles_too():
    clear = FLOWER.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 128))
    opaque = shown(encoded(FLOWER, icc_profile=ADOBE)).float()
    found = read_pixels(encoded(clear, icc_profile=ADOBE), (48, 64)).float()
    assert (found - (opaque * 128 + 255 * 127) / 255).abs().max() < 1.01
    palette = FLOWER.quantize(16)
    expected = shown(encoded(palette.convert("RGB"), icc_profile=ADOBE))
    assert torch.equal(read_pixels(encoded(palette, icc_profile=ADOBE), (48, 64)), expected)


def test_profiles_that_change_nothing_leave_pixels_and_their_latents_as_they_were():
    for mode, embedded in (("RGB", SRGB), ("RGB", b"no profile"), ("RGB", GREY), ("L", ADOBE), ("1", GREY)):
        image = FLOWER.convert(mode)
        data = encoded(image, icc_profile=embedded)
        assert torch.equal(read_pixels(data, (48, 64)), read_pixels(encoded(image), (48, 64)))
        assert resize_rule(data) == RESIZE == "centre box, Lanczos, on white, 1"
