"""Images and captions from files that anyone may have written."""

import json
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from PIL import Image, features
from sklearn.datasets import load_sample_images

from twinflow.train.data.images import read_folder, read_prompts, unread_images

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
    (r"text in 'text', got '\\u200b'", '{"file_name": "a.png", "text": "\\u200b"}'),
    (r"text in 'text', got '\\ud83d'", '{"file_name": "a.png", "text": "\\ud83d"}'),
    ("files that exist, got 'xxx", f'{{"file_name": "{"x" * 999}.png", "text": "x"}}'),
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
    with pytest.raises(
        ValueError, match=r"got none for 0.png, 1.png, 2.png, 4.png, 5.png, 6.png; skip_bad leaves them out$"
    ):
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
        ("c.jsonl", '"x"\n3', "each line must hold a prompt, got 3 in .* line 2"),
        ("d.jsonl", '{"x": 1}', "one of prompt, text, caption, got x in .* line 1"),
        ("p.csv", "x", "a .txt or .jsonl file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"^read_prompts: .*{match}"):
            read_prompts(tmp_path / name)


def captions_of_csv(folder, text, **options):
    for name in "abc":
        save(folder / f"{name}.png")
    (folder / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return {item.name: item.caption for item in read_folder(folder, **options)}


def test_rows_of_csv_end_at_line_ends_alone(tmp_path):
    words = {"a.png": "one\u2028line", "b.png": "form\x0cfeed\x1c and\x85more", "c.png": 'two\nlines, "quoted"'}
    rows = [f"{name},{words[name]}" for name in ("a.png", "b.png")]
    rows.append('c.png,"two\nlines, ""quoted"""')
    for end in ("\n", "\r\n", "\r"):
        assert captions_of_csv(tmp_path, end.join(["file_name,text", *rows, "", ",", ""])) == words


@pytest.mark.parametrize("row, said", [
    ("b.png,a cat, asleep on a sofa", "2 cells in each row, .* got 3 in .* line 3"),
    ('b.png, "a cat, asleep"', "got 3 in .* line 3"),
    ("b.png", "got 1 in .* line 3"),
    ('b.png,"a cat" asleep', "CSV, got .* line 3"),
    ('b.png,"a cat\n', "CSV, got .* line 3: unexpected end of data"),
])  # fmt: skip
def test_rows_of_csv_that_do_not_fit_their_header(tmp_path, row, said):
    text = f'file_name,text\na.png,"a dog, awake"\n{row}'
    with pytest.raises(ValueError, match=said):
        captions_of_csv(tmp_path, text)
    skipped = {}
    assert captions_of_csv(tmp_path, text, skipped=skipped) == {"a.png": "a dog, awake"}
    assert {"b.png", "c.png"} < {*skipped} and f"{tmp_path}/metadata.csv line 3" in skipped


def test_headers_of_csv(tmp_path):
    for header, said in (("file_name;text", "column 'file_name', got file_name;text"), ("file_name,text,text", "once")):
        with pytest.raises(ValueError, match=said):
            captions_of_csv(tmp_path, f"{header}\na.png;x,y,z\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_texts_whose_byte_order_mark_says_their_encoding(tmp_path, encoding):
    rows = "file_name,text\na.png,zwei Bäume\nb.png,b\nc.png,c\n"
    assert captions_of_csv(tmp_path, rows.encode(encoding))["a.png"] == "zwei Bäume"
    (tmp_path / "metadata.csv").unlink()
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes("ein Baum".encode(encoding))
    assert {item.caption for item in read_folder(tmp_path)} == {"ein Baum"}
    (tmp_path / "a.txt").write_bytes("ein Baum".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"in UTF-8, got .*a.txt with zero bytes"):
        read_folder(tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    for k in range(20):
        save(tmp_path / f"{k:02}.png", text="" if k < 12 else "seen")
    (tmp_path / "12.txt").write_bytes(b"\xff")
    (tmp_path / "13.txt").unlink()
    with pytest.raises(ValueError) as caught:
        read_folder(tmp_path)
    said = str(caught.value)
    assert said.count("the empty") == 10 and "09.txt and 2 more" in said
    assert "12.txt with byte 0" in said and "none for 13.png" in said and said.endswith("skip_bad leaves them out")
    skipped = {}
    assert [item.name for item in read_folder(tmp_path, skipped=skipped)] == [f"{k}.png" for k in range(14, 20)]
    assert [*skipped] == [f"{k:02}.png" for k in range(14)]
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="each image must have a caption"):
        read_folder(tmp_path, skipped={})


def test_prompts_that_are_none_are_said_at_once(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"a cat"\n{\n3\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"JSON, got .* line 2: '{'; each line .* got 3 in .* line 3, '' in .* line 4"):
        read_prompts(path)
    skipped = {}
    assert read_prompts(path, skipped=skipped) == ["a cat"] and len(skipped) == 3


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_normalisation(tmp_path, form, other):
    name = unicodedata.normalize(form, "café")
    save(tmp_path / f"{name}.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": unicodedata.normalize(other, "café.png"), "text": "of the table"}))
    assert [item.caption for item in read_folder(tmp_path)] == ["of the table"]
    table.unlink()
    (tmp_path / f"{unicodedata.normalize(other, 'café')}.txt").write_text("of the file")
    assert [item.caption for item in read_folder(tmp_path)] == ["of the file"]
    (tmp_path / f"{name}.txt").write_text("of its very name")
    assert [item.caption for item in read_folder(tmp_path)] == ["of its very name"]


def test_images_of_all_suffixes_are_read_or_counted(tmp_path):
    read = (".jfif", ".jpe", ".JPG", ".apng", ".mpo", ".dib", ".ppm", ".pgm", ".tif", ".avif")
    counted = {".heic": 1, ".gif": 1, ".dng": 1, ".jpg_large": 1, "(no suffix)": 2}
    for k, suffix in enumerate((*read, ".heic", ".gif", ".dng", ".jpg_large", "", "")):
        save(tmp_path / "x.png", text="a caption")
        (tmp_path / "x.png").rename(tmp_path / f"{k}{suffix}")
        (tmp_path / "x.txt").rename(tmp_path / f"{k}.txt")
    (tmp_path / "notes").write_text("no image")
    taken = {item.path.suffix for item in read_folder(tmp_path)}
    assert taken == {suffix for suffix in read if suffix != ".avif" or features.check("avif")}
    assert unread_images(tmp_path) == dict(sorted((counted | ({} if ".avif" in taken else {".avif": 1})).items()))


def test_folders_that_runs_fill_are_no_data(tmp_path):
    save(tmp_path / "a.png", text="a")
    save(tmp_path / "run" / "wandb" / "b.png")
    for place in ("run/samples/base", "other/samples/step-000001"):
        save(tmp_path / place / "01-2.png")
        (tmp_path / place / "samples.json").write_text("{}")
    (tmp_path / "run" / "icon.heic").write_bytes(b"")
    out = tmp_path / "run"
    assert [item.name for item in read_folder(tmp_path, leave_out=[out])] == ["a.png"]
    assert unread_images(tmp_path, [out]) == {} and unread_images(tmp_path) == {".heic": 1}
    (out / "samples" / "base" / "01-2.txt").write_text("samples that are asked for")
    assert len(read_folder(out / "samples" / "base")) == 1
