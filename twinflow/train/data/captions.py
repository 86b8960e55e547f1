"""`metadata_captions()`: captions from the tables that image folders carry, as `datasets` lays them out."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".csv", ".parquet")
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
        rows = list(_rows(table))
        for where, row in rows:
            name = _value(where, row, image_column)
            column = caption_column
            if column == "text" and column not in row and "caption" in row:
                column = "caption"
            path = _inside(root, (table.parent if base is None else base), name, where)
            if path in captions:
                raise ValueError(f"read_folder: metadata must name an image once, got {name!r} again in {where}")
            captions[path] = _value(where, row, column).strip()
    return captions


def read_text(path: Path, argument: str) -> str:
    """A file's UTF-8 text, with a byte-order mark or without, its line ends as \\n.

    Raises:
        ValueError: no such file, none that can be read, or another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise ValueError(f"{argument} must be a file that can be read, got {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument} must be in UTF-8, got {path} with byte {error.start} of another encoding"
        ) from None


def _value(where: str, row: dict[str, Any], column: str) -> str:
    if column not in row:
        there = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"read_folder: metadata must have the column {column!r}, got {there} in {where}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"read_folder: metadata must have text in {column!r}, got {value!r} in {where}")
    return value


def _inside(root: Path, base: Path, name: str, where: str) -> Path:
    """The file of a name, which must be there and under the root."""
    parts = Path(name.replace("\\", "/")).parts
    path = base.joinpath(*parts)
    if ".." in parts or Path(name).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"read_folder: metadata must name files inside {root}, got {name!r} in {where}")
    if "\0" in name or not path.is_file():
        raise ValueError(f"read_folder: metadata must name files that exist, got {name!r} in {where}")
    return path


def _rows(table: Path) -> Iterator[Row]:
    suffix = table.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"read_folder: metadata must be one of {', '.join(_SUFFIXES)}, got {str(table)!r}")
    found = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix](table)
    some = False
    for row in found:
        some = True
        yield row
    if not some:
        raise ValueError(f"read_folder: metadata must have rows, got none in {table}")


def _jsonl(table: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(table, "read_folder: metadata").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{table} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(
                f"read_folder: metadata must be a JSON object a line, got {where}: {line[:60]!r}"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"read_folder: metadata must be a JSON object a line, got {where}: {line[:60]!r}")
        yield where, row


def _csv(table: Path) -> Iterator[Row]:
    text = read_text(table, "read_folder: metadata")
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield f"{table} line {reader.line_num}", {name: value for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise ValueError(f"read_folder: metadata must be CSV, got {table} line {reader.line_num}: {error}") from None


def _parquet(table: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ImportError(f"read_folder: {table} needs pyarrow, got none installed; pip install pyarrow") from None
    try:
        rows = parquet.read_table(table).to_pylist()
    except Exception as error:  # whatever pyarrow finds in a file that anyone may have written
        raise ValueError(f"read_folder: metadata must be a Parquet table, got {table}: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{table} row {number}", row
