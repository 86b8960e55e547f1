"""`read_json()`: a config file as a mapping, or one line that says what is wrong with it and where."""

import json
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError

_MOST_BYTES = 1_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8 text, with a byte-order mark or without.

    Raises:
        ArgumentError: no such file, none that can be read, no JSON, no object, or a key that is there twice.
    """
    try:
        value = json.loads(_text(path), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno} column {error.colno}"
        raise _error("JSON", f"{where}: {error.msg}{_explanation(error)}") from None
    except RecursionError:
        raise _error("JSON", f"{path}, nested too deeply") from None
    except ArgumentError:
        raise
    except ValueError:
        raise _error("JSON", f"{path} with an integer too long to read") from None
    if not isinstance(value, dict):
        raise ArgumentError("train", "config", "an object {...}", f"{path} with a {type(value).__name__}", verb="hold")
    return value


def _error(wanted: str, got: str) -> ArgumentError:
    return ArgumentError("train", "config", wanted, got)


def _text(path: Path) -> str:
    wanted = "a JSON file"
    try:
        if path.is_dir():
            raise _error(wanted, f"the folder {path}")
        if not path.is_file():
            raise _error(f"{wanted} that exists", repr(str(path)))
        if path.stat().st_size > _MOST_BYTES:
            raise _error(f"{wanted} of at most {_MOST_BYTES} bytes", f"{path} with {path.stat().st_size}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _error(f"{wanted} that can be read", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _error(f"{wanted} in UTF-8", f"{path} with byte {error.start} of another encoding") from None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in mapping if keys.count(key) > 1)
        raise ArgumentError("train", repr(twice), "given once", f"it twice in {path}")
    return mapping


def _explanation(error: json.JSONDecodeError) -> str:
    """What JSON lacks and other formats have, where that is what stands there."""
    here, before = error.doc[error.pos :].lstrip(), error.doc[: error.pos].rstrip()
    if not error.doc.strip():
        return " (the file is empty)"
    if here[:2] in ("//", "/*") or here[:1] == "#":
        return " (JSON has no comments)"
    if (here[:1] in ("}", "]") and before.endswith(",")) or (here[:1] == "," and here[1:].lstrip()[:1] in ("}", "]")):
        return " (JSON has no comma after the last entry)"
    return " (JSON has double quotes only)" if here[:1] == "'" else ""
