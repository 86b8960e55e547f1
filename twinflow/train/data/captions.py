"""`metadata_captions()`: captions from the tables that image folders carry, as `datasets` lays them out."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError, require

Row = tuple[str, dict[str, Any]]  # where it stands, and column -> value
Faults = dict[str, ArgumentError]  # which image, or which row -> what is wrong with it
_MOST_NAMED = 10  # faults of a kind that a message names
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def metadata_captions(
    tables: list[Path],
    image_column: str,
    caption_column: str,
    root: Path,
    files: Iterable[Path],
    faults: Faults,
    base: Path | None = None,
) -> dict[Path, str]:
    """The captions that tables give to image files.

    Args:
        tables: .jsonl, .csv or .parquet files.
        image_column: names of files, in any Unicode normalisation.
        caption_column: their captions; `caption` where it is `text` and there is none.
        root: a folder that no name may lead out of.
        files: all that is in it.
        faults: gets the rows that have no such name or caption, or name a file that is not there, or one again.
        base: the folder that names are relative to; None: each table's own.

    Raises:
        ValueError: a table that cannot be read, or lacks a column.
        ImportError: .parquet without pyarrow.
    """
    captions: dict[Path, str] = {}
    columns = ("text", "caption") if caption_column == "text" else (caption_column,)
    alike = normalised(files)
    for table in tables:
        rows = _rows(table, image_column, faults)
        for names in ((image_column,), columns):
            if not any(name in row for _, row in rows for name in names):
                _value(*rows[0], names[0])
        for where, row in rows:
            key = where
            try:
                name = _value(where, row, image_column)
                path = _inside(root, (table.parent if base is None else base), name, where, alike)
                _check(path not in captions, "an image once", f"{name!r} again in {where}", "name")
                key = path.relative_to(root).as_posix()
                column = next((column for column in columns if column in row), caption_column)
                captions[path] = _value(where, row, column).strip()
            except ArgumentError as error:
                faults[key] = error
    return captions


def raise_faults(faults: Sequence[ArgumentError], hint: str) -> None:
    """Raises faults, if there are any, as one error: each kind once, with its first places and a count of the others.

    Args:
        hint: what to do instead of mending them.
    """
    kinds: dict[tuple[str, str, str], list[ArgumentError]] = {}
    for fault in faults:
        kinds.setdefault((fault.argument, fault.verb, fault.wanted), []).append(fault)
    if kinds:
        first, *others = [of[0].renamed(got=listed([str(fault.got) for fault in of])) for of in kinds.values()]
        raise first.renamed(hint="; ".join([*(fault.without_function for fault in others), hint]))


def listed(names: Sequence[str]) -> str:
    """The first ten names, and how many there are beside them."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def normalised(paths: Iterable[Path]) -> dict[str, Path]:
    """Names of paths -> the paths: macOS writes letters with accents as two characters, other systems as one."""
    return {unicodedata.normalize("NFC", str(path)): path for path in paths}


def has_words(text: object) -> bool:
    """Whether it is a text of which something can be seen, and which can be encoded."""
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        return False
    return any(letter.isprintable() and letter != " " for letter in text)


def read_text(path: Path, function: str, argument: str) -> str:
    """A file's text, its line ends as \\n: in UTF-8, or in UTF-16 or UTF-32 where a byte-order mark says so.

    Raises:
        ArgumentError: no such file, none that can be read, or another encoding.
    """
    try:
        data = path.read_bytes()
        text = data.decode(next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8-sig"))
    except OSError as error:
        raise ArgumentError(function, argument, "a file that can be read", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        got = f"{path} with byte {error.start} of another encoding"
        raise ArgumentError(function, argument, "in UTF-8", got) from None
    require("\0" not in text, function, argument, "in UTF-8", f"{path} with zero bytes, as UTF-16 has them")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check(condition: object, wanted: str, got: str, verb: str = "be") -> None:
    require(condition, "read_folder", "metadata", wanted, got, verb=verb)


def _fault(wanted: str, got: str, verb: str = "be") -> ArgumentError:
    return ArgumentError("read_folder", "metadata", wanted, got, verb=verb)


def _value(where: str, row: dict[str, Any], column: str) -> str:
    there = ", ".join(map(str, row)) or "nothing"
    _check(column in row, f"the column {column!r}", f"{there} in {where}", "have")
    value = row[column]
    _check(has_words(value), f"text in {column!r}", f"{value!r} in {where}", "have")
    return str(value)


def _inside(root: Path, base: Path, name: str, where: str, alike: dict[str, Path]) -> Path:
    """The file of a name, which must be there and under the root; `alike`: its files by `normalised` names."""
    parts = Path(name.replace("\\", "/")).parts
    path = base.joinpath(*parts)
    outside = ".." in parts or Path(name).is_absolute() or not path.is_relative_to(root)
    _check(not outside, f"files inside {root}", f"{name!r} in {where}", "name")
    if not os.path.isfile(path):  # no error of names that are too long, or have a zero byte
        path = alike.get(unicodedata.normalize("NFC", str(path)), path)
    _check(os.path.isfile(path), "files that exist", f"{name!r} in {where}", "name")
    return path


def _rows(table: Path, image_column: str, faults: Faults) -> list[Row]:
    suffix, readers = table.suffix.lower(), {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    _check(suffix in readers, f"one of {', '.join(readers)}", repr(str(table)))
    rows = list(readers[suffix](table, image_column, faults))
    if not rows:
        raise_faults([*faults.values()], "none of its rows can be read")
    _check(rows, "rows", f"none in {table}", "have")
    return rows


def _jsonl(table: Path, image_column: str, faults: Faults) -> Iterator[Row]:
    for number, line in enumerate(read_text(table, "read_folder", "metadata").split("\n"), 1):
        if not line.strip():
            continue
        row: Any = None
        where = f"{table} line {number}"
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if isinstance(row, dict):
            yield where, row
        else:
            faults[where] = _fault("a JSON object a line", f"{where}: {line[:60]!r}")


def _csv(table: Path, image_column: str, faults: Faults) -> Iterator[Row]:
    """Rows by the names of their header; a row stands where its first line does."""
    reader = csv.reader(io.StringIO(read_text(table, "read_folder", "metadata"), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{table} line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults[where] = _fault("CSV", f"{where}: {error}")
            _check(header is not None, "CSV", f"{where}: {error}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = cells
            there = f"{', '.join(header)} in {where}"
            _check(len({*header}) == len(header), "each column once", there, "name")
            _check(image_column in header, f"the column {image_column!r}", there, "have")
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            wanted = f"{len(header)} cells in each row, as its header has (quotes around texts with commas)"
            faults[where] = _fault(wanted, f"{len(cells)} in {where}", "have")


def _parquet(table: Path, image_column: str, faults: Faults) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        said = f"read_folder: {table} needs pyarrow, got none installed; pip install pyarrow"
        raise ModuleNotFoundError(said, name="pyarrow") from None
    try:
        rows = parquet.read_table(table).to_pylist()
    except Exception as error:  # whatever pyarrow finds in a file that anyone may have written
        raise ArgumentError("read_folder", "metadata", "a Parquet table", f"{table}: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{table} row {number}", row
