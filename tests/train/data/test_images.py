"""Images and captions from files that anyone may have written."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from twinflow.train.data.images import read_folder, read_prompts

FLOWER = load_sample_images().images[1]


def save(path, pixels=FLOWER[:20, :30], text=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text)


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
