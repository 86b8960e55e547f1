"""`metadata_captions()`: captions from the tables that image folders carry, as `datasets` lays them out."""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError, require

Row = tuple[str, dict[str, Any]]  # where it stands, and column -> value


def metadata_captions(
    tables: list[Path], image_column: str, caption_column: str, root: Path, base: Path | None = None
) -> dict[Path, str]:
    """The captions that tables give to image files.

    Args:
        tables: .jsonl, .csv or .parquet files.
        image_column: names of files.
        caption_column: their captions; `caption` where it is `text` and there is none.
        root: a folder that no name may lead out of.
        base: the folder that names are relative to; None: each table's own.

    Raises:
        ValueError: a table that cannot be read, lacks a column, names a file twice or one that is not there, or has an
            empty caption.
        ImportError: .parquet without pyarrow.
    """
    captions: dict[Path, str] = {}
    for table in tables:
        for where, row in _rows(table):
            name = _value(where, row, image_column)
            column = caption_column
            if column == "text" and column not in row and "caption" in row:
                column = "caption"
            path = _inside(root, (table.parent if base is None else base), name, where)
            _check(path not in captions, "an image once", f"{name!r} again in {where}", "name")
            captions[path] = _value(where, row, column).strip()
    return captions


def read_text(path: Path, function: str, argument: str) -> str:
    """A file's UTF-8 text, with a byte-order mark or without, its line ends as \\n.

    Raises:
        ArgumentError: no such file, none that can be read, or another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise ArgumentError(function, argument, "a file that can be read", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        got = f"{path} with byte {error.start} of another encoding"
        raise ArgumentError(function, argument, "in UTF-8", got) from None


def _check(condition: object, wanted: str, got: str, verb: str = "be") -> None:
    require(condition, "read_folder", "metadata", wanted, got, verb=verb)


def _value(where: str, row: dict[str, Any], column: str) -> str:
    there = ", ".join(map(str, row)) or "nothing"
    _check(column in row, f"the column {column!r}", f"{there} in {where}", "have")
    value = row[column]
    _check(isinstance(value, str) and value.strip(), f"text in {column!r}", f"{value!r} in {where}", "have")
    return value


def _inside(root: Path, base: Path, name: str, where: str) -> Path:
    """The file of a name, which must be there and under the root."""
    parts = Path(name.replace("\\", "/")).parts
    path = base.joinpath(*parts)
    outside = ".." in parts or Path(name).is_absolute() or not path.is_relative_to(root)
    _check(not outside, f"files inside {root}", f"{name!r} in {where}", "name")
    _check("\0" not in name and path.is_file(), "files that exist", f"{name!r} in {where}", "name")
    return path


def _rows(table: Path) -> list[Row]:
    suffix, readers = table.suffix.lower(), {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    _check(suffix in readers, f"one of {', '.join(readers)}", repr(str(table)))
    rows = list(readers[suffix](table))
    _check(rows, "rows", f"none in {table}", "have")
    return rows


def _jsonl(table: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(table, "read_folder", "metadata").split("\n"), 1):
        if not line.strip():
            continue
        row: Any = None
        where = f"{table} line {number}"
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        _check(isinstance(row, dict), "a JSON object a line", f"{where}: {line[:60]!r}")
        yield where, row


def _csv(table: Path) -> Iterator[Row]:
    text = read_text(table, "read_folder", "metadata")
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield f"{table} line {reader.line_num}", {name: value for name, value in row.items() if name is not None}
    except csv.Error as error:
        _check(False, "CSV", f"{table} line {reader.line_num}: {error}")


def _parquet(table: Path) -> Iterator[Row]:
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
