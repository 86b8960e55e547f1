"""Images and captions from files that anyone may have written, and the sizes they are trained in."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from twinflow.train.buckets import ImageError, as_model_input, buckets, look, nearest, read_pixels, upscale
from twinflow.train.images import read_folder, read_prompts

CHINA, FLOWER = map(np.copy, load_sample_images().images)


def save(path, pixels=FLOWER[:20, :30], text=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_images_of_every_kind_in_nested_folders(tmp_path):
    for k, name in enumerate(("a.png", "B.JPG", "c/d.jpeg", "c/e/f.WEBP", "g.bmp", "h.TIFF")):
        save(tmp_path / name, text=f"\n picture {k} \n")
    save(tmp_path / ".thumbs" / "x.png")
    save(tmp_path / "._a.png", text="a Mac's own")
    (tmp_path / "notes.md").write_text("no image")
    found = read_folder(tmp_path)
    assert [item.name for item in found] == ["B.JPG", "a.png", "c/d.jpeg", "c/e/f.WEBP", "g.bmp", "h.TIFF"]
    assert [item.caption for item in found] == [f"picture {k}" for k in (1, 0, 2, 3, 4, 5)]
    assert all(item.path == tmp_path / item.name for item in found)


def test_links_are_followed_once(tmp_path):
    save(tmp_path / "elsewhere" / "a.png", text="a")
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(data)
    assert [item.name for item in read_folder(data)] == ["linked/a.png"]


def write_table(path, rows, monkeypatch):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        cells = [[f'"{value}"' for value in row.values()] for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *map(",".join, cells)]) + "\n", encoding="utf-8-sig")
    else:  # pyarrow is optional: what is tested is what is made of its rows
        path.write_bytes(b"PAR1")
        table = SimpleNamespace(to_pylist=lambda: rows)
        parquet = SimpleNamespace(read_table=lambda _: table)
        monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_as_datasets_lays_it_out(tmp_path, monkeypatch, kind, column):
    save(tmp_path / "a.png")
    save(tmp_path / "deep" / "b.png")
    rows = [{"file_name": "a.png", column: "one, with a comma"}, {"file_name": "deep/b.png", column: "zwei Bäume"}]
    write_table(tmp_path / f"metadata.{kind}", rows, monkeypatch)
    assert [item.caption for item in read_folder(tmp_path)] == ["one, with a comma", "zwei Bäume"]


def test_metadata_in_the_folder_of_its_images_and_of_another_name(tmp_path):
    save(tmp_path / "x" / "a.png")
    save(tmp_path / "y" / "a.png")
    for name in "xy":
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": f"in {name}"}))
    assert [item.caption for item in read_folder(tmp_path)] == ["in x", "in y"]
    table = tmp_path / "captions.csv"
    table.write_text("image,words\nx/a.png,of x\ny/a.png,of y\n")
    found = read_folder(tmp_path, "words", image_column="image", strategy="metadata", metadata_file=table)
    assert [item.caption for item in found] == ["of x", "of y"]


def folder_with(tmp_path, line=None, text=None, name="metadata.jsonl"):
    save(tmp_path / "a.png", text=text)
    if line is not None:
        (tmp_path / name).write_bytes(line if isinstance(line, bytes) else line.encode())
    return tmp_path


@pytest.mark.parametrize("match, line", [
    ("the column 'text', got file_name, label in .*metadata.jsonl line 1", '{"file_name": "a.png", "label": "x"}'),
    ("the column 'file_name', got nothing", "{}"),
    ("files that exist, got 'b.png'", '{"file_name": "b.png", "text": "x"}'),
    ("files inside .*, got '../a.png'", '{"file_name": "../a.png", "text": "x"}'),
    ("files inside .*, got '/etc/passwd'", '{"file_name": "/etc/passwd", "text": "x"}'),
    ("name an image once, got 'a.png' again in .* line 2", '{"file_name": "a.png", "text": "x"}\n' * 2),
    ("text in 'text', got ' '", '{"file_name": "a.png", "text": " "}'),
    ("text in 'text', got None", '{"file_name": "a.png", "text": null}'),
    ("a JSON object a line, got .* line 1: '{broken'", "{broken"),
    ("a JSON object a line", "[1]"),
    ("in UTF-8, got .* byte 30", b'{"file_name": "a.png", "text":\xff "x"}'),
    ("rows, got none", "\n\n"),
])  # fmt: skip
def test_metadata_that_does_not_fit(tmp_path, match, line):
    with pytest.raises(ValueError, match=f"^read_folder: metadata must .*{match}"):
        read_folder(folder_with(tmp_path, line))


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be a folder that exists, got '.*nowhere'"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder must hold images"):
        read_folder(tmp_path)
    for k in range(7):
        save(tmp_path / f"{k}.png", text="seen" if k == 3 else None)
    with pytest.raises(ValueError, match=r"got none for 0.png, 1.png, 2.png, 4.png, 5.png and 1 more$"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="strategy must be one of auto, textfile, metadata, got 'filename'"):
        read_folder(tmp_path, strategy="filename")
    with pytest.raises(ValueError, match=r"must hold metadata.jsonl"):
        read_folder(tmp_path, strategy="metadata")


def test_captions_that_cannot_be_told(tmp_path):
    line = '{"file_name": "a.png", "text": "of the table"}'
    both = folder_with(tmp_path / "both", line, "of the file")
    with pytest.raises(ValueError, match="strategy must be textfile or metadata where both exist"):
        read_folder(both)
    assert read_folder(both, strategy="textfile")[0].caption == "of the file"
    assert read_folder(both, strategy="metadata")[0].caption == "of the table"
    with pytest.raises(ValueError, match=r"captions must hold text, got the empty .*a.txt"):
        read_folder(folder_with(tmp_path / "empty", text=" \n"))
    shared = folder_with(tmp_path / "shared", text="whose?")
    save(shared / "a.jpg")
    with pytest.raises(ValueError, match=r"of one image, got .*a.txt for a.jpg and a.png"):
        read_folder(shared)
    other = folder_with(tmp_path / "other")
    (other / "a.txt").write_bytes("Bäume".encode("latin-1"))
    with pytest.raises(ValueError, match=r"in UTF-8, got .*a.txt with byte 1"):
        read_folder(other)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_folder(folder_with(tmp_path, "PAR1", name="metadata.parquet"))


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  a dog \r\nlast")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog", "last"]
    (tmp_path / "p.jsonl").write_text('"a cat"\n{"prompt": "a dog"}\n{"caption": "a bird", "id": 1}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a cat", "a dog", "a bird"]
    for name, text, match in (
        ("e.txt", " \n", "a prompt a line"),
        ("b.jsonl", "{", "JSON, got .* line 1"),
        ("c.jsonl", '"x"\n3', "line 2 must hold a prompt, got 3"),
        ("d.jsonl", '{"x": 1}', "one of prompt, text, caption, got x"),
        ("p.csv", "x", "a .txt or .jsonl file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"^read_prompts: .*{match}"):
            read_prompts(tmp_path / name)


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
        ((1000, 64), r"a multiple of 64 \(such as 1024\), got 1000"),
        ((0, 8), "resolution must be an integer >= 1"),
        ((64, True), "multiple must be"),
    ):
        with pytest.raises(ValueError, match=match):
            buckets(*arguments)
    with pytest.raises(ValueError, match="longest must be a ratio"):
        buckets(64, 8, longest=0.5)


def test_nearest_and_upscale():
    sizes = buckets(1024, 64)
    assert nearest(sizes, (500, 500)) == (1024, 1024)
    assert nearest(sizes, (900, 1600)) == (768, 1344) and nearest(sizes, (1600, 900)) == (1344, 768)
    assert nearest(sizes, (10, 4000)) == sizes[0] and nearest(sizes, (4000, 10)) == sizes[-1]
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_upright(orientation):
    """A file with an orientation is the image that viewers show, size and pixels."""
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}.get(orientation)  # fmt: skip
    upright = Image.fromarray(FLOWER[:24, :40])
    stored = upright if turn is None else upright.transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    assert look(data).size == (24, 40)
    assert torch.equal(read_pixels(data, (24, 40)).permute(1, 2, 0), torch.from_numpy(FLOWER[:24, :40]))


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
            look(data)
            read_pixels(data, (16, 16))
    with pytest.raises(ImageError, match="floating-point"):
        read_pixels(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), (4, 4))


def test_model_input_is_the_image_processors():
    from diffusers.image_processor import VaeImageProcessor

    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(Image.fromarray(CHINA[200:264, :64]))
    found = as_model_input(read_pixels(encoded(Image.fromarray(CHINA[200:264, :64])), (64, 64))[None])
    assert torch.equal(found, expected) and found.min() < -0.5 and found.max() > 0.5
