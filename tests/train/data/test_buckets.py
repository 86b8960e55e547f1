"""The sizes that images are trained in, and image files as pixels of one of them."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from twinflow.train.data.buckets import (
    ImageError,
    as_model_input,
    buckets,
    cut_share,
    nearest_bucket,
    read_pixels,
    upright_size,
    upscale,
)

CHINA, FLOWER = map(np.copy, load_sample_images().images)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("resolution, multiple", [(1024, 64), (1024, 16), (512, 32), (64, 4), (768, 32), (64, 64)])
def test_buckets(resolution, multiple):
    sizes = buckets(resolution, multiple)
    assert (resolution, resolution) in sizes and len({*sizes}) == len(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert (width, height) in sizes
        assert abs(height * width / resolution**2 - 1) <= 0.12 and max(height, width) <= 2 * min(height, width)
    assert buckets(resolution, multiple, aspect=False) == [(resolution, resolution)]
    assert [h / w for h, w in sizes] == sorted(h / w for h, w in sizes)


def test_buckets_refuse():
    for arguments, match in (
        ((1000, 64), r"a multiple of 64 pixels \(such as 1024\), got 1000"),
        ((0, 8), "resolution must be an integer >= 1"),
        ((64, True), "multiple must be"),
    ):
        with pytest.raises(ValueError, match=match):
            buckets(*arguments)


def test_nearest_and_upscale():
    sizes = buckets(1024, 64)
    assert nearest_bucket(sizes, (500, 500)) == (1024, 1024)
    assert nearest_bucket(sizes, (900, 1600)) == (768, 1344) and nearest_bucket(sizes, (1600, 900)) == (1344, 768)
    assert nearest_bucket(sizes, (10, 4000)) == sizes[0] and nearest_bucket(sizes, (4000, 10)) == sizes[-1]
    assert upscale((512, 512), (1024, 1024)) == 2 and upscale((2048, 4096), (1024, 1024)) == 0.5


def test_pixels_are_the_whole_image_resized_where_the_ratio_is_the_buckets():
    image = Image.fromarray(CHINA[:400, :600])
    expected = np.array(image.resize((60, 40), Image.Resampling.LANCZOS))
    found = read_pixels(encoded(image), (40, 60))
    assert found.dtype == torch.uint8 and found.shape == (3, 40, 60)
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(expected))


def test_pixels_are_cut_about_the_centre():
    image = Image.fromarray(CHINA[:200, :300])
    assert torch.equal(read_pixels(encoded(image), (200, 200)).permute(1, 2, 0), torch.from_numpy(CHINA[:200, 50:250]))
    assert torch.equal(read_pixels(encoded(image), (100, 300)).permute(1, 2, 0), torch.from_numpy(CHINA[50:150, :300]))


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_upright(orientation, kind):
    """A file with an orientation is the image that viewers show, size and pixels."""
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    upright = Image.fromarray(FLOWER[:24, :40])
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    assert upright_size(data) == (24, 40)
    assert torch.equal(read_pixels(data, (24, 40)).permute(1, 2, 0), torch.from_numpy(FLOWER[:24, :40]))


def chunk(kind, data, wrong=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


LONG = zlib.compress(b"a workflow " * 500_000)


@pytest.mark.parametrize("metadata", [
    chunk(b"zTXt", b"workflow\0\0" + LONG), chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    chunk(b"tEXt", b"prompt\0" + b"x" * 2_000_000) * 40, chunk(b"tEXt", b"a\0b", wrong=1), chunk(b"pHYs", b"12"),
    chunk(b"iCCP", b"icc\0\0" + LONG), chunk(b"iCCP", b"icc\0\0damaged"), chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
])  # fmt: skip
@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.filterwarnings("ignore")
def test_a_png_with_whole_pixels_is_read_whatever_its_metadata(metadata, place):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = b"eXIf" not in metadata
    plain = encoded(Image.fromarray(FLOWER[:24, :40]), **({"exif": exif} if turned else {}))
    data, size = plain[:place] + metadata + plain[place:], (40, 24) if turned else (24, 40)
    assert upright_size(data) == size
    assert torch.equal(read_pixels(data, size), read_pixels(plain, size))


@pytest.mark.parametrize("marker, metadata", [
    (0xE0, b"JFIF\0"), (0xE1, b"Exif\0\0damaged!"), (0xE1, b"Exif\0\0"),
    (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"),
    (0xE2, b"MPF\0damaged"), (0xE2, b"ICC_PROFILE\0\1\2damaged"), (0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_jpeg_with_whole_pixels_is_read_whatever_its_metadata(marker, metadata):
    plain = encoded(Image.fromarray(FLOWER[:24, :40]), "jpeg")
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(metadata) + 2) + metadata
    data = plain[:2] + segment + plain[2:]
    assert upright_size(data) == (24, 40)
    assert torch.equal(read_pixels(data, (24, 40)), read_pixels(plain, (24, 40)))


def test_how_much_is_cut_away():
    assert cut_share((64, 64), (32, 32)) == 0 and cut_share((40, 400), (32, 64)) == pytest.approx(0.8)


def test_transparency_is_on_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)  # the other half: black, but clear
    clear = Image.fromarray(rgba)
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 32, "L").convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    grey = Image.fromarray(np.stack([np.zeros((8, 8)), rgba[..., 3]], -1).astype(np.uint8))
    for image, options, shown in (
        (clear, {}, (255, 0, 0)),
        (grey, {}, (0, 0, 0)),
        (palette.transpose(Image.Transpose.ROTATE_270), {"transparency": 0}, None),
    ):
        found = read_pixels(encoded(image, **options), (8, 8)).permute(1, 2, 0)
        white = (found == 255).all(-1)
        assert white.sum() == 32, image.mode
        if shown:
            assert found[0, 0].tolist() == [*shown] and white[:, 4:].all()


def test_other_modes():
    digit = load_digits().images[0]  # 0 .. 16
    wide = (digit * 4095).astype(np.uint16)
    expected = torch.from_numpy(((wide.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    for kind in ("png", "tiff"):
        found = read_pixels(encoded(Image.fromarray(wide), kind), (8, 8))
        assert all(torch.equal(channel, expected) for channel in found), kind
    colour = Image.fromarray(FLOWER[:16, :16])
    for mode, kind in (("CMYK", "tiff"), ("L", "png"), ("1", "png"), ("P", "png"), ("YCbCr", "tiff"), ("LAB", "tiff")):
        image = Image.fromarray(np.zeros((16, 16, 3), np.uint8) + 90, "RGB") if mode == "LAB" else colour
        image = image.convert(mode) if mode != "LAB" else Image.frombytes("LAB", (16, 16), image.tobytes())
        data = encoded(image, kind)
        assert read_pixels(data, (16, 16)).shape == (3, 16, 16)
        assert torch.equal(read_pixels(data, (16, 16)), read_pixels(data, (16, 16)))
    black = read_pixels(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "tiff"), (4, 4))
    assert not black.any()


def test_what_cannot_be_read_is_one_kind_of_error():
    whole = encoded(Image.fromarray(FLOWER))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (b"", b"no image", whole[:2000], whole[:-20000], bytes(flipped), whole[:40] + b"\0" * 500):
        with pytest.raises(ImageError, match=r"."):
            upright_size(data)
            read_pixels(data, (16, 16))
    with pytest.raises(ImageError, match="floating-point"):
        read_pixels(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), (4, 4))


def test_model_input_is_the_image_processors():
    from diffusers.image_processor import VaeImageProcessor

    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(CHINA[200:264, :64]))
    found = as_model_input(read_pixels(encoded(Image.fromarray(CHINA[200:264, :64])), (64, 64))[None])
    assert torch.equal(found, expected) and found.min() < -0.5 and found.max() > 0.5
